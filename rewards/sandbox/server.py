"""The fork server: a clean interpreter that forks a process for each job, watches it and says how it ended.

It never runs model text and never reads it: a job's text is in a file whose descriptor it hands on. Requests and replies are datagrams
on one socket to the judge and carry the job's number. When the judge is gone, by kill -9 too, the socket ends and so does everything
here.

In `namespaces` the server is process 1 of a process id namespace, and each program of one of its own inside: the kernel ends all of a
program with its first process. Elsewhere each program has a tracer, and the kernel ends all of the program with that.
"""

import gc
import importlib
import json
import os
import select
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

from rewards.sandbox import bubblewrap, confine, folders, kernel, processes, program, seccomp, semaphores, tracer
from rewards.sandbox.limits import PATIENCE, REQUEST_BYTES, Limits

_TICK_S = 0.05
_WARM = (
    "abc", "array", "bisect", "collections", "copy", "dataclasses", "datetime", "decimal", "enum", "fractions", "functools", "heapq",
    "io", "itertools", "json", "math", "operator", "random", "re", "statistics", "string", "threading", "typing", "_multiprocessing",
)  # fmt: skip
"""What programs often import; a fork has it for nothing."""


@dataclass
class _Running:
    """A job in a process of its own."""

    number: int
    pid: int
    """Of its first process, or of its tracer: all of it ends with that."""
    limits: Limits
    folder: str
    report: int
    """Where its tracer writes how it ended; -1 without one."""
    began: float = field(default_factory=time.monotonic)
    cpu_s: float = 0.0
    waited_s: float = 0.0
    """For a CPU, while it was alone. Both as far as was seen while it lived."""
    alone: bool = True
    """It never had a second thread or process, which it could have kept from the CPU itself."""
    ended_by: str = ""
    """The limit it was killed for, or `stopped` where the judge had no more use for it."""


class Server:
    """`own_pids`: a descriptor of the process id namespace that it is in, for `namespaces`."""

    def __init__(self, control: socket.socket, how: confine.Confinement, own_pids: int) -> None:
        self._control = control
        self._how = how
        self._own_pids = own_pids
        self._running: dict[int, _Running] = {}
        """By the descriptor of its process."""
        self._poll = select.poll()

    def serve(self) -> None:
        """Returns when the judge is gone and nothing is left of any job."""
        for name in _WARM:
            importlib.import_module(name)
        if self._how.backend == "landlock":
            semaphores.install()
        seccomp.filter_program(os.uname().machine, self._how.backend == "landlock", None)  # keeps it for the forks
        gc.freeze()  # or the first collection in each fork would copy every page
        self._poll.register(self._control, select.POLLIN)
        next_watch = 0.0
        while True:
            for fd, _ in self._poll.poll(_TICK_S * 1000 if self._running else None):
                if fd != self._control.fileno():
                    self._ended(fd)
                elif not self._request():
                    return self._stop()
            if self._running and time.monotonic() >= next_watch:
                self._watch()
                next_watch = time.monotonic() + _TICK_S

    def _request(self) -> bool:
        """Takes one request; False if the judge is gone."""
        try:
            message, fds, _, _ = socket.recv_fds(self._control, REQUEST_BYTES, 8)
        except ConnectionResetError:
            return False
        if not message:
            return False
        request = json.loads(message)
        if "stop" in request:
            for running in self._running.values():
                if running.number == request["stop"]:
                    self._kill(running, "stopped")
        else:
            self._start(request, fds)
        return True

    def _start(self, request: dict[str, Any], fds: list[int]) -> None:
        limits, folder = Limits(**request["limits"]), "/tmp"
        try:
            folder = folders.make(self._how.folders)
            pid, report = self._fork(limits, folder, fds)
        except OSError as error:
            folders.remove(folder)
            self._reply({"id": request["id"], "failed": f"fork: {error}"})
        else:
            pidfd = os.pidfd_open(pid)
            self._running[pidfd] = _Running(request["id"], pid, limits, folder, report)
            self._poll.register(pidfd, select.POLLIN)
        for fd in fds:
            os.close(fd)

    def _fork(self, limits: Limits, folder: str, fds: list[int]) -> tuple[int, int]:
        """Forks a job: its first process in a namespace of its own, or its tracer; and where the tracer reports."""

        def job() -> NoReturn:
            run_job(self._how, limits, folder, fds)

        if self._own_pids < 0:
            return self._fork_traced(replace(limits, processes=limits.processes + self._how.own_processes), job)
        kernel.unshare(kernel.CLONE_NEWPID)
        pid = -1
        try:
            pid = os.fork()
        finally:
            if pid:
                kernel.setns(self._own_pids, kernel.CLONE_NEWPID)  # or there could be no second one
        if not pid:
            job()
        return pid, -1

    def _fork_traced(self, limits: Limits, job: Callable[[], NoReturn]) -> tuple[int, int]:
        server = os.getpid()
        report, theirs = os.pipe()
        try:
            pid = os.fork()
            if not pid:
                tracer.trace(server, limits, theirs, job)
        except OSError:
            os.close(report)
            raise
        finally:
            os.close(theirs)
        return pid, report

    def _ended(self, pidfd: int) -> None:
        self._poll.unregister(pidfd)
        os.close(pidfd)
        running = self._running.pop(pidfd)
        status, cpu_s = _wait(running.pid)
        said = {"status": status, "ended_by": ""}
        if running.report >= 0:
            said = _read_report(running.report) or (said if running.ended_by else {"failed": "its tracer died"})
            if not said.pop("alone", False):
                cpu_s += self._reap_orphans()
        folders.remove(running.folder)
        self._reply(
            {
                "id": running.number,
                "by_bubblewrap": self._how.backend == "bubblewrap",
                "wall_s": time.monotonic() - running.began,
                "cpu_s": max(cpu_s, running.cpu_s),  # bubblewrap may end before it has waited for what it ran
                "waited_s": running.waited_s,
            }
            | said
            | ({"ended_by": running.ended_by} if running.ended_by else {})
        )

    def _watch(self) -> None:
        """Kills what is over a limit that the kernel does not hold for us."""
        by_parent = processes.children()
        for running in self._running.values():
            elapsed = time.monotonic() - running.began
            pids = processes.tree(running.pid, by_parent)[self._own_pids < 0 :]  # less its tracer
            running.cpu_s = max(running.cpu_s, processes.cpu_s(pids))
            threads, waited_s = processes.waiting(pids)
            running.alone = running.alone and threads <= 1 + self._how.own_processes
            if running.alone:
                running.waited_s = max(running.waited_s, min(waited_s, elapsed))
            wall_s = running.limits.wall_s
            if elapsed - running.waited_s > wall_s or elapsed > PATIENCE * wall_s:
                self._kill(running, "timeout")
            elif len(pids) > running.limits.processes + self._how.own_processes:
                self._kill(running, "processes")
            elif len(pids) > 1 and processes.memory(pids) > running.limits.memory_mb << 20:
                self._kill(running, "memory")
            elif len(pids) > 1 and running.cpu_s > running.limits.cpu_s:
                self._kill(running, "timeout")  # the kernel's limit is for each, and many would take the time of other programs
            elif self._how.backend == "landlock" and folders.is_over(running.folder, running.limits.files_mb << 20, pids):
                self._kill(running, "files")

    def _kill(self, running: _Running, why: str) -> None:
        if os.waitid(os.P_PID, running.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return  # it has ended by itself while we were busy
        running.ended_by = running.ended_by or why
        os.kill(running.pid, signal.SIGKILL)

    def _reap_orphans(self) -> float:
        """Waits for what a tracer left: children of the server (it is their subreaper) that the kernel is ending; their CPU seconds."""
        tracers = {running.pid for running in self._running.values()}
        left = [pid for pid in processes.children().get(os.getpid(), []) if pid not in tracers]
        return sum(_wait(pid)[1] for pid in left)

    def _stop(self) -> None:
        for running in self._running.values():
            self._kill(running, "stopped")
        for running in self._running.values():
            os.waitpid(running.pid, 0)
        self._running.clear()

    def _reply(self, reply: dict[str, Any]) -> None:
        try:
            self._control.send(json.dumps(reply).encode())
        except (BrokenPipeError, ConnectionResetError):
            pass  # the judge is gone; the next look at the socket says so


def _wait(pid: int) -> tuple[int, float]:
    """The exit code of a child, or minus its signal, and the CPU seconds of it and of what it waited for."""
    _, status, usage = os.wait4(pid, 0)
    return os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime


def _read_report(report: int) -> dict[str, Any]:
    """What a tracer said at its end; empty where it was killed before."""
    said = os.read(report, REQUEST_BYTES)
    os.close(report)
    return json.loads(said) if said else {}


def run_job(how: confine.Confinement, limits: Limits, folder: str, fds: list[int]) -> NoReturn:
    """In the fork: from its first instruction to the program's last. What fails before the program begins goes into the job's file."""
    try:
        confine.take_descriptors(fds)
        confine.clean_process(folder)
        if how.backend == "bubblewrap":
            bubblewrap.become_bubblewrap(how, limits)
        with open(3, "rb", closefd=False) as file:
            job = json.load(file)
        confine.confine(how, limits, folder)
        os.pwrite(3, b"ok\n", 0)
        os.close(3)
        for name in [name for name in sys.modules if name.partition(".")[0] == "rewards"]:
            del sys.modules[name]
    except BaseException:  # noqa: BLE001 - the judge reads it
        os.pwrite(3, b"no\n" + traceback.format_exc().encode(), 0)
        os._exit(70)
    try:
        program.run(job)
    finally:
        os._exit(70)  # whatever it raises: a fork of the server must not go on as one
