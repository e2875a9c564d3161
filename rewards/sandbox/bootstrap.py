"""From a fresh interpreter to a fork server in its namespaces; and, under bubblewrap, to one program.

Root builds the root file system first, where it may, so that an environment in root's home can be read, and then becomes an unused
user, for good. An ordinary user makes a user namespace and builds the same in there.
"""

import json
import os
import pwd
import select
import signal
import socket
import sys
import tempfile
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from rewards.sandbox import bubblewrap, folders, kernel, landlock, program, seccomp, view
from rewards.sandbox.confine import Confinement, confine
from rewards.sandbox.limits import Limits, SandboxError
from rewards.sandbox.server import Server

_DYNAMIC_UIDS = range(61184, 65520)
"""Set aside for users without a name (systemd's DynamicUser), and present in the id maps of most containers."""
_END_S = 3.0
"""How long a server may take to end by itself when its judge is gone."""
_NAMESPACES = (
    kernel.CLONE_NEWUSER | kernel.CLONE_NEWNS | kernel.CLONE_NEWPID | kernel.CLONE_NEWNET | kernel.CLONE_NEWIPC | kernel.CLONE_NEWUTS
)


def serve(config: dict[str, Any]) -> None:
    """The fork server: `config` has `backend` and `paths`. Says on the control socket that it is ready, or why it cannot be."""
    control = socket.socket(fileno=config["control"])
    try:
        how, own_pids = _prepare(control, config["backend"], config["paths"])
    except (OSError, SandboxError) as error:
        control.send(json.dumps({"refused": str(error)}).encode())
        return
    control.send(json.dumps({"ready": {"landlock": how.landlock, "uid": os.getuid(), "proc": Path("/proc/self").exists()}}).encode())
    Server(control, how, own_pids).serve()


def inside(config: dict[str, Any]) -> NoReturn:
    """One program in a namespace that bubblewrap made."""
    try:
        with open(3, "rb", closefd=False) as file:
            job = json.load(file)
        how = Confinement("bubblewrap", tuple(config["paths"]), config["landlock"])
        confine(how, Limits(**job["limits"]), "/tmp")
        os.pwrite(3, b"ok\n", 0)
        os.close(3)
    except BaseException:  # noqa: BLE001 - the judge reads it
        os.pwrite(3, b"no\n" + traceback.format_exc().encode(), 0)
        os._exit(70)
    program.run(job)


def _prepare(control: socket.socket, backend: str, extra: list[str]) -> tuple[Confinement, int]:
    if sys.platform != "linux" or os.uname().machine not in seccomp.MACHINES:
        raise SandboxError(f"{os.uname().sysname} on {os.uname().machine} has no filter here; Linux on x86_64 or aarch64 has")
    version = kernel.landlock_version()
    if backend == "landlock" and not version:
        raise SandboxError("the kernel has no Landlock (Linux 5.13 and newer, with `landlock` in the kernel's list of LSMs)")
    if backend == "bubblewrap":
        bubblewrap.find()
        extra = [*extra, os.path.dirname(__file__)]
    paths = tuple(view.readable_paths(extra))
    how = Confinement(backend, paths, version)
    built = os.geteuid() == 0 and _build_as_root(paths)
    if os.geteuid() == 0:
        _become(unused_uid())
    elif backend == "landlock" and version < landlock.TRUNCATION_SINCE:
        raise SandboxError(
            f"the kernel's Landlock {version} does not keep programs from emptying files of user {os.getuid()}; "
            f"version {landlock.TRUNCATION_SINCE} (Linux 6.2) does, or start as root, which gives programs a user of their own"
        )
    if backend != "namespaces":
        how = replace(how, folders=tempfile.mkdtemp(prefix=folders.PREFIX) if backend == "landlock" else "")
        _go_on_under_a_guard(control, how.folders)
        kernel.prctl(kernel.PR_SET_CHILD_SUBREAPER, 1)
        return how, -1
    uid, gid = os.getuid(), os.getgid()
    kernel.unshare(_NAMESPACES)
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1")
    Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1")
    if not built:
        view.build_root(paths, Limits())
    _go_on_under_a_guard(control)
    own_pids = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
    view.mount_proc()
    return how, own_pids


def _build_as_root(paths: tuple[str, ...]) -> bool:
    """Whether root may have a mount namespace here; in many containers it may not."""
    try:
        kernel.unshare(kernel.CLONE_NEWNS)
    except PermissionError:
        return False
    view.build_root(paths, Limits())
    return True


def unused_uid() -> int:
    """A user id that has no name and no process."""
    taken = set()
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            taken.add(os.stat(f"/proc/{name}").st_uid)
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended
    start = os.getpid() % len(_DYNAMIC_UIDS)
    for uid in (*_DYNAMIC_UIDS[start:], *_DYNAMIC_UIDS[:start]):
        if uid not in taken and not _has_name(uid):
            return uid
    raise SandboxError(f"every user id from {_DYNAMIC_UIDS[0]} to {_DYNAMIC_UIDS[-1]} is in use")


def _has_name(uid: int) -> bool:
    try:
        pwd.getpwuid(uid)
    except KeyError:
        return False
    return True


def _become(uid: int) -> None:
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    kernel.prctl(kernel.PR_SET_DUMPABLE, 1)  # or /proc/self, where ids are mapped, would stay root's


def _go_on_under_a_guard(control: socket.socket, folder: str = "") -> None:
    """Goes on in a child, in `namespaces` the first process of the new process id namespace; this process guards it.

    The guard ends the server if the judge is gone and the server does not end by itself, waits for all that it leaves, and removes
    `folder`. The server ends with its guard.
    """
    kernel.prctl(kernel.PR_SET_CHILD_SUBREAPER, 1)
    ours, theirs = os.pipe()
    pid = os.fork()
    if not pid:
        kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
        os.close(theirs)
        if os.read(ours, 1) != b"g":
            os._exit(1)  # the guard died before the first line
        os.close(ours)
        return
    os.write(theirs, b"g")
    server = os.pidfd_open(pid)
    poll = select.poll()
    poll.register(server, select.POLLIN)
    poll.register(control, 0)  # says that the judge is gone
    if server not in dict(poll.poll()):
        poll.unregister(control)
        if not poll.poll(1000 * _END_S):
            os.kill(pid, signal.SIGKILL)
    try:
        while True:
            os.wait()
    except ChildProcessError:
        pass
    if folder:
        folders.remove(folder)
    os._exit(0)


def main(config: dict[str, Any]) -> None:
    if "inside" in config:
        inside(config["inside"])
    serve(config["serve"])
