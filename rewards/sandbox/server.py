"""The fork server: a clean interpreter that forks a process for each job, watches it and says how it ended.

It never runs model text and never reads it: a job's text is in a file whose descriptor it hands on. Requests and replies are datagrams
on one socket to the judge and carry the job's number. When the judge is gone, by kill -9 too, the socket ends and so does everything
here.

In `namespaces` the server is process 1 of a process id namespace, and each program of one of its own inside: the kernel ends all of a
program with its first process. Elsewhere the server is told of orphans (it is their subreaper) and ends them itself.
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
from dataclasses import dataclass, field
from typing import Any, NoReturn

from rewards.sandbox import confine, folders, kernel, processes
from rewards.sandbox.limits import Limits

_TICK_S = 0.05
_REQUEST_BYTES = 1 << 16
_WARM = (
    "abc", "array", "bisect", "collections", "copy", "dataclasses", "datetime", "decimal", "enum", "fractions", "functools", "heapq",
    "io", "itertools", "json", "math", "operator", "random", "re", "statistics", "string", "sys", "threading", "traceback", "typing",
)  # fmt: skip
"""What programs often import; a fork has it for nothing."""


@dataclass
class _Running:
    """A job in a process of its own."""

    number: int
    pid: int
    limits: Limits
    folder: str
    began: float = field(default_factory=time.monotonic)
    ended_by: str = ""
    """The limit it was killed for: `timeout`, `memory`, `processes`; `stopped` where the judge has no more use for it."""


class Server:
    def __init__(self, control: socket.socket, how: confine.Confinement, server_command: list[str]) -> None:
        self._control = control
        self._how = how
        self._launcher = server_command
        self._running: dict[int, _Running] = {}
        """By the descriptor of its process."""
        self._poll = select.poll()
        self._own_pids = os.open("/proc/self/ns/pid", os.O_RDONLY) if how.backend == "namespaces" else -1

    def serve(self) -> None:
        """Returns when the judge is gone and nothing is left of any job."""
        for name in _WARM:
            importlib.import_module(name)
        gc.freeze()  # or the first collection in each fork would copy every page
        self._poll.register(self._control, select.POLLIN)
        next_watch = 0.0
        while True:
            for fd, _ in self._poll.poll(_TICK_S * 1000 if self._running else None):
                if fd != self._control.fileno():
                    self._ended(fd)
                elif not self._request():
                    return self._stop()
            now = time.monotonic()
            if self._running and now >= next_watch:
                self._watch(now)
                next_watch = time.monotonic() + _TICK_S

    def _request(self) -> bool:
        """Takes one request; False if the judge is gone."""
        message, fds, _, _ = socket.recv_fds(self._control, _REQUEST_BYTES, 8)
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
        limits = Limits(**request["limits"])
        folder = folders.make(self._how.backend)
        try:
            pid = self._fork()
        except OSError as error:
            folders.remove(folder)
            return self._reply({"id": request["id"], "failed": f"fork: {error}"})
        finally:
            if not self._is_child():
                pass
        if pid == 0:
            run_child(self._how, self._launcher, limits, folder, fds)
        for fd in fds:
            os.close(fd)
        pidfd = os.pidfd_open(pid)
        self._running[pidfd] = _Running(request["id"], pid, limits, folder)
        self._poll.register(pidfd, select.POLLIN)
