"""How a fresh fork becomes a program's process: its descriptors, its folders, its limits, and then the locks, each for good.

The order matters: mounts need rights that the new user namespace takes away; Landlock and seccomp come last, as they would refuse the
rest. Nothing of a program is read before all of it holds.
"""

import os
import resource
import signal
import sys
import tempfile
from dataclasses import dataclass

from rewards.sandbox import kernel, landlock, seccomp, view
from rewards.sandbox.limits import Limits

FIRST_FREE_FD = 6
"""0 to 2 are stdin, stdout, stderr; 3 the job, 4 the result, 5 the channel between a program and its asserts."""
ENVIRONMENT = {
    "PATH": "/usr/local/bin:/usr/bin:/bin",
    "LANG": "C.UTF-8",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "PYTHONHASHSEED": "0",  # the order of a set must not decide a reward
    "PYTHONUTF8": "1",
}


@dataclass(frozen=True)
class Confinement:
    """What the fork server knows of its machine."""

    backend: str
    paths: tuple[str, ...]
    """What programs may read."""
    landlock: int
    """Version, 0 for none."""
    folders: str = ""
    """The folder with the temporary folders of programs; none where each program has its own /tmp."""

    @property
    def own_processes(self) -> int:
        """Processes of the backend itself among those of a program: bubblewrap has two."""
        return 2 if self.backend == "bubblewrap" else 0


def confine(how: Confinement, limits: Limits, folder: str) -> None:
    """Locks this process in; `folder` is its temporary folder, and where it is left."""
    if how.backend == "namespaces":
        kernel.unshare(kernel.CLONE_NEWNS)
        view.mount_own_folders(view.under_tmp(how.paths), limits)
        # One more user namespace: the kernel counts processes in each, so that one program's bomb does not take another's share.
        kernel.unshare(kernel.CLONE_NEWUSER)
    os.chdir(folder)
    set_limits(limits, own_count=how.backend != "landlock")
    kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
    if how.landlock:
        readable = [*how.paths, *([] if how.backend == "landlock" else ["/proc"])]
        shared = [] if how.backend == "landlock" else ["/dev/shm"]
        landlock.restrict(how.landlock, readable, [folder, *shared, *view.DEVICES])
    if how.backend == "bubblewrap":
        return  # it dropped capabilities and set the filter
    kernel.drop_capabilities()
    kernel.prctl(kernel.PR_SET_DUMPABLE, 1)  # or its own /proc/self would be closed to it
    weak = how.backend == "landlock"
    signals = os.getpid() if weak and how.landlock < landlock.SIGNALS_SINCE else None
    kernel.set_seccomp(seccomp.filter_program(os.uname().machine, weak, signals))


def set_limits(limits: Limits, own_count: bool) -> None:
    """The rlimits. `own_count`: the kernel counts processes of this program alone, and not all of its user."""
    megabytes = 1 << 20
    values = {
        resource.RLIMIT_AS: limits.memory_mb * megabytes,
        resource.RLIMIT_CPU: limits.cpu_s,
        resource.RLIMIT_FSIZE: limits.output_mb * megabytes,
        resource.RLIMIT_NOFILE: limits.open_files,
        resource.RLIMIT_STACK: 64 * megabytes,
        resource.RLIMIT_CORE: 1,  # bytes: no file is that small, and only 1 keeps the kernel from a handler that it would pipe to
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
    }
    if own_count:
        values |= {resource.RLIMIT_NPROC: limits.processes}
    for which, value in values.items():
        hard = resource.getrlimit(which)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(which, (value, value))


def take_descriptors(fds: list[int]) -> None:
    """Puts stdin, stdout, stderr, job, result and the channel, if any, at their places, and closes all others."""
    high = [os.dup2(fd, 100 + index) for index, fd in enumerate(fds)]
    for index, fd in enumerate(high):
        os.dup2(fd, index, inheritable=index < 3)
    os.closerange(len(fds), 1024)


def clean_process(folder: str) -> None:
    """What a new interpreter would have: default signals, standard streams, environment, a process group of its own."""
    os.setpgid(0, 0)  # a new session would cost milliseconds: the kernel's scheduler makes a group for each
    kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
    os.umask(0o022)
    tempfile.tempdir = None  # the server's
    os.environ["HOME"] = os.environ["TMPDIR"] = folder
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        fd = {"stdin": 0, "stdout": 1, "stderr": 2}[name]
        errors = "backslashreplace" if name == "stderr" else "surrogateescape"
        stream = open(fd, mode, encoding="utf-8", errors=errors, closefd=False, buffering=1 if name == "stderr" else -1)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
