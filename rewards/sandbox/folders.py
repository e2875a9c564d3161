"""Temporary folders of programs where there is no mount namespace to hold and to end them."""

import os
import subprocess
import tempfile
from pathlib import Path

PREFIX = "cohort-sandbox-"


def make(inside: str) -> str:
    """A program's temporary folder, an absolute path: a new one in the server's, or /tmp where there is none, as it has its own."""
    return tempfile.mkdtemp(dir=inside) if inside else "/tmp"


def is_over(folder: str, limit: int) -> bool:
    """Whether it holds more bytes than `limit`, each entry counting 4 KiB at least; or folders that cannot be looked into."""
    total, waiting = 0, [folder]
    while waiting and total <= limit:
        try:
            with os.scandir(waiting.pop()) as entries:
                for entry in entries:
                    total += max(4096, entry.stat(follow_symlinks=False).st_blocks * 512)
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(entry.path)
        except FileNotFoundError:
            continue
        except OSError:
            return True  # closed, or so deep that its path has no name
    return total > limit


def remove(folder: str) -> None:
    """Removes a folder of `make`, whatever a program put into it: closed folders, or thousands of them inside each other."""
    if folder == "/tmp":
        return
    try:
        for entry in os.scandir(folder):
            if not entry.is_dir(follow_symlinks=False):
                os.unlink(entry)
        os.rmdir(folder)
    except OSError:
        subprocess.run(["chmod", "-R", "u+rwx", folder], stderr=subprocess.DEVNULL, check=False)
        subprocess.run(["rm", "-rf", "--", folder], stderr=subprocess.DEVNULL, check=False)
    assert not Path(folder).exists(), f"{folder} could not be removed"
