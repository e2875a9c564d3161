"""What a program sees of the file system: the system's libraries and Python, read only, and a temporary folder of its own.

The root is built once, by the fork server, out of bind mounts on a tmpfs; the machine's other files, /home and /etc among them, are
not in it. A program adds its own /tmp, /dev/shm and /proc, in a mount namespace that ends with it.
"""

import os
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path

from rewards.sandbox import kernel
from rewards.sandbox.limits import Limits

_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache", "/etc/alternatives", "/etc/localtime")
DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
LINKS = {
    "/dev/fd": "/proc/self/fd",
    "/dev/stdin": "/proc/self/fd/0",
    "/dev/stdout": "/proc/self/fd/1",
    "/dev/stderr": "/proc/self/fd/2",
}
_UNDER_TMP = "/.under_tmp"
"""Where an environment that lies in /tmp is kept for the time when a program's own /tmp hides it."""
_KEPT_FLAGS = os.ST_NOSUID | os.ST_NODEV | os.ST_NOEXEC | os.ST_NOATIME | os.ST_NODIRATIME | os.ST_RELATIME
"""Their values are those of MS_*, and a mount from outside must keep them."""


def readable_paths(extra: Iterable[str] = ()) -> list[str]:
    """Absolute paths that programs may read, none inside another: the system, this Python and its environment, and `extra`."""
    python = [sys.prefix, sys.exec_prefix, sys.base_prefix, sys.base_exec_prefix, sysconfig.get_path("stdlib")]
    wanted = [*_SYSTEM, *python, *extra]
    every = {path for name in wanted for path in (os.path.abspath(name), os.path.realpath(name)) if os.path.exists(path)}
    assert "/" not in every, "a program must not see everything"
    links = {path for path in every if os.path.islink(path) and path in _SYSTEM}
    return sorted(path for path in every if path in links or not any(str(up) in every - links for up in Path(path).parents))


def under_tmp(paths: Iterable[str]) -> list[str]:
    return [path for path in paths if Path("/tmp") in Path(path).parents]


def build_root(paths: Iterable[str], limits: Limits) -> None:
    """Makes `paths` all that this process's own mount namespace has, at their places."""
    paths = list(paths)
    kernel.mount("none", "/", None, kernel.MS_REC | kernel.MS_PRIVATE)
    kernel.mount("tmpfs", "/tmp", "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, "mode=755,size=1m")
    os.makedirs("/tmp/old")
    kernel.pivot_root("/tmp", "/tmp/old")
    os.chdir("/")
    os.makedirs("/new")
    kernel.mount("tmpfs", "/new", "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, "mode=755,size=1m")
    for name in ("tmp", "proc", "dev/shm"):
        os.makedirs(f"/new/{name}")
    # Where a program cannot mount its own, this one is bounded too.
    kernel.mount("tmpfs", "/new/tmp", "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, f"mode=1777,size={8 * limits.files_mb}m")
    for path in paths:
        _bind(f"/old{path}", f"/new{path}", kernel.MS_NODEV)
    for index, path in enumerate(under_tmp(paths)):
        _bind(f"/old{path}", f"/new{_UNDER_TMP}/{index}", kernel.MS_NODEV)
    for path in DEVICES:
        _bind(f"/old{path}", f"/new{path}", 0, read_only=False)
    for path, target in LINKS.items():
        os.symlink(target, f"/new{path}")
    # The kernel lets a namespace mount /proc only where one is in sight; the server's own will cover this one.
    kernel.mount("/old/proc", "/new/proc", None, kernel.MS_BIND | kernel.MS_REC)
    kernel.mount("none", "/new", None, kernel.MS_REMOUNT | kernel.MS_BIND | kernel.MS_RDONLY | kernel.MS_NOSUID | kernel.MS_NODEV)
    os.chdir("/new")
    kernel.pivot_root(".", ".")
    kernel.unmount(".", kernel.MNT_DETACH)
    os.chdir("/")


def mount_proc() -> bool:
    """Mounts /proc of this process id namespace; where that is refused, as in some containers, there is an empty one."""
    try:
        kernel.mount("proc", "/proc", "proc", kernel.MS_NOSUID | kernel.MS_NODEV)
    except PermissionError:
        kernel.mount("tmpfs", "/proc", "tmpfs", kernel.MS_RDONLY, "size=4k")
        return False
    return True


def mount_own_folders(paths: Iterable[str], limits: Limits) -> None:
    """A program's own /tmp, /dev/shm and /proc, in the mount namespace that it is in."""
    flags = kernel.MS_NOSUID | kernel.MS_NODEV
    kernel.mount("tmpfs", "/tmp", "tmpfs", flags, f"mode=1777,size={limits.files_mb}m,nr_inodes=16384")
    kernel.mount("tmpfs", "/dev/shm", "tmpfs", flags, f"mode=1777,size={limits.files_mb}m,nr_inodes=1024")
    for index, path in enumerate(paths):
        os.makedirs(path)
        kernel.mount(f"{_UNDER_TMP}/{index}", path, None, kernel.MS_BIND | kernel.MS_REC)
    mount_proc()


def _bind(source: str, target: str, flags: int, read_only: bool = True) -> None:
    os.makedirs(os.path.dirname(target), exist_ok=True)
    if os.path.islink(source):
        os.symlink(os.readlink(source), target)
        return
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    else:
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o644))
    kernel.mount(source, target, None, kernel.MS_BIND | kernel.MS_REC)
    flags |= kernel.MS_NOSUID | (os.statvfs(target).f_flag & _KEPT_FLAGS)
    flags |= kernel.MS_RDONLY if read_only else 0
    kernel.mount("none", target, None, kernel.MS_REMOUNT | kernel.MS_BIND | flags)
