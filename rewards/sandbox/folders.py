"""Temporary folders of programs where there is no mount namespace to hold and to end them."""

import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

PREFIX = "cohort-sandbox-"
_MAPS = 4 << 20
"""Characters of a process's list of mappings; what has more of them hides something."""


def make(inside: str) -> str:
    """A program's temporary folder, an absolute path: a new one in the server's, or /tmp where there is none, as it has its own."""
    return tempfile.mkdtemp(dir=inside) if inside else "/tmp"


def is_over(folder: str, limit: int, pids: Iterable[int]) -> bool:
    """Whether it holds more bytes than `limit`, each entry counting 4 KiB at least; or folders that cannot be looked into.

    `pids`: processes that may hold files open, or mapped, that have no name any more.
    """
    try:
        total, waiting = _bytes_without_name(folder, pids), [folder]
        while waiting and total <= limit:
            with os.scandir(waiting.pop()) as entries:
                for entry in entries:
                    total += max(4096, entry.stat(follow_symlinks=False).st_blocks * 512)
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(entry.path)
    except FileNotFoundError:
        return False  # it changes while it is read; the next look is soon
    except OSError:
        return True  # closed, or so deep that its path has no name
    return total > limit


def _bytes_without_name(folder: str, pids: Iterable[int]) -> int:
    device = os.stat(folder).st_dev
    found: dict[int, int] = {}
    """By inode."""
    for pid in pids:
        try:
            for fd in os.listdir(f"/proc/{pid}/fd"):
                about = os.stat(f"/proc/{pid}/fd/{fd}")
                if about.st_dev == device and stat.S_ISREG(about.st_mode) and not about.st_nlink:
                    found[about.st_ino] = about.st_blocks * 512
            with open(f"/proc/{pid}/maps", errors="replace") as file:
                maps = file.read(_MAPS)
            if len(maps) == _MAPS:
                return sys.maxsize
            for line in maps.splitlines():
                if line.endswith("(deleted)") and f" {folder}/" in line:
                    addresses, _, _, _, inode, *_ = line.split()
                    begin, _, end = addresses.partition("-")
                    found.setdefault(int(inode), int(end, 16) - int(begin, 16))
        except (FileNotFoundError, ProcessLookupError):
            continue
        except PermissionError:
            if not _is_ending(pid):
                raise
    return sum(found.values())


def _is_ending(pid: int) -> bool:
    """Whether a process has given back its memory; its descriptors cannot be read then."""
    try:
        return Path(f"/proc/{pid}/statm").read_text().startswith("0 ")
    except (FileNotFoundError, ProcessLookupError):
        return True


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
