"""bubblewrap as the maker of namespaces, with our seccomp filter, for those who prefer a program that others have audited.

It starts an interpreter for each program, so it is slower than forking. Its own /dev has folders without a limit on size, so devices
are bound one by one.
"""

import json
import os
import shutil
import tempfile

from rewards.sandbox import view
from rewards.sandbox.confine import ENVIRONMENT, Confinement
from rewards.sandbox.launch import python_command
from rewards.sandbox.limits import Limits, SandboxError
from rewards.sandbox.seccomp import filter_program

_FILTER_FD = 9


def find() -> str:
    found = shutil.which("bwrap")
    if not found:
        raise SandboxError("bubblewrap is not installed (Debian, Ubuntu, Fedora: package `bubblewrap`)")
    return found


def become_bubblewrap(how: Confinement, limits: Limits) -> None:
    """Replaces this process; descriptors 0 to 5 go to the program."""
    with tempfile.TemporaryFile() as file:
        file.write(filter_program(os.uname().machine))
        file.seek(0)
        os.dup2(file.fileno(), _FILTER_FD)
    for fd in range(3, 6):
        try:
            os.set_inheritable(fd, True)
        except OSError:
            break  # no channel
    config = json.dumps({"inside": {"paths": how.paths, "landlock": how.landlock}})
    command = [find(), *_arguments(how, limits), "--", *python_command(config)]
    os.execve(command[0], command, ENVIRONMENT | {"HOME": "/tmp", "TMPDIR": "/tmp"})


def _arguments(how: Confinement, limits: Limits) -> list[str]:
    size = str(limits.files_mb << 20)
    arguments = ["--unshare-user", "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--die-with-parent"]
    arguments += ["--new-session", "--cap-drop", "ALL", "--size", size, "--tmpfs", "/tmp", "--size", size, "--tmpfs", "/dev/shm"]
    for path in how.paths:
        arguments += ["--symlink", os.readlink(path), path] if os.path.islink(path) else ["--ro-bind", path, path]
    for path in view.DEVICES:
        arguments += ["--dev-bind", path, path]
    for path, target in view.LINKS.items():
        arguments += ["--symlink", target, path]
    return [*arguments, "--proc", "/proc", "--remount-ro", "/", "--chdir", "/tmp", "--seccomp", str(_FILTER_FD)]
