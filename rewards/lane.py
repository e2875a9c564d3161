"""A lane: the worker processes that hold the functions of one source, and the calls that wait for them.

Plugins of one file or module share processes and state, as they would in trl; two sources never do, so a plugin that breaks its
process breaks no other function, and no builtin one. A lane starts with one process and takes more, up to its limit, while calls
wait. Each call has a time limit, from when its worker can begin it; a worker that does not answer in time, dies or writes what is
no reply is killed, its call fails, and another takes its place. All of it runs in the scorer's thread and never blocks.
"""

import json
import math
import selectors
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rewards.combine import Outcome
from rewards.process import WorkerLost, WorkerProcess

LOAD_TIMEOUT_S = 120.0
"""A plugin may import torch from a cold disk."""
PREFETCH = 16
"""Calls that a worker may have at hand while they are quick: a round trip on a busy machine takes longer than such a call."""
QUICK_S = 0.005


@dataclass(frozen=True)
class Call:
    """One call of one function, on a whole group or on one completion of it."""

    id: int
    function: str
    group: int
    """The scorer's number of the group."""
    indices: Sequence[int]
    """Places of its completions in the group."""
    line: bytes
    timeout_s: float


@dataclass(frozen=True)
class Answer:
    """What came of a call."""

    outcomes: Sequence[Outcome]
    """One for each of its completions."""
    failed: bool = False
    """The call as a whole failed, so asking again one by one may find the culprit."""
    seconds: float = 0.0
    traceback: str = ""
    metrics: Sequence[tuple[str, float]] = ()
    extras: dict[str, list[Any]] = field(default_factory=dict)


@dataclass
class _Work:
    """What a worker has to do, in this order; it replies in the same order."""

    calls: deque[Call | None]
    """None stands for the import of its functions."""
    began: float
    """When it could begin the first of them, by `time.monotonic`."""

    @property
    def limit_s(self) -> float:
        return self.calls[0].timeout_s if self.calls[0] else LOAD_TIMEOUT_S


class Lane:
    """`load` is the first line a worker gets; `finish` takes each call with its answer."""

    def __init__(
        self,
        name: str,
        load: dict[str, Any],
        env: Sequence[str],
        limit: int,
        log_dir: Path | None,
        selector: selectors.BaseSelector,
        finish: Callable[[Call, Answer], None],
    ) -> None:
        self.name = name
        self.loaded = threading.Event()
        """Set when the first worker is ready, or cannot be."""
        self.broken = ""
        """Why its functions cannot be imported."""
        self.named: dict[str, list[str]] = {}
        """Arguments that each function names."""
        self.queue: deque[Call] = deque()
        self._load = json.dumps(load).encode() + b"\n"
        self._env, self._limit, self._log_dir = env, limit, log_dir
        self._selector, self._finish = selector, finish
        self._workers: dict[WorkerProcess, _Work] = {}
        self._pace_s = math.inf
        self._started = 0

    def pump(self) -> None:
        """Hands waiting calls to workers, and starts a worker if calls still wait."""
        while self.broken and self.queue:
            call = self.queue.popleft()
            self._finish(call, _failure(call, "error", f"{call.function}: {self.broken}", 0.0))
        depth = PREFETCH if self._pace_s < QUICK_S else 1
        loaded = [worker for worker, work in self._workers.items() if None not in work.calls]
        while self.queue and loaded:
            worker = min(loaded, key=lambda worker: len(self._workers[worker].calls))
            if len(self._workers[worker].calls) >= depth:
                break
            call = self.queue.popleft()
            self._send(worker, call, call.line)
        if self.queue and len(loaded) == len(self._workers) < self._limit:
            self.start_worker()

    def start_worker(self) -> None:
        log = self._log_dir / f"rewards-{Path(self.name).stem}-{self._started}.log" if self._log_dir else None
        self._started += 1
        worker = WorkerProcess(self._env, log)
        self._workers[worker] = _Work(deque(), 0.0)
        self._selector.register(worker.replies, selectors.EVENT_READ, (self, worker))
        self._send(worker, None, self._load)

    def wake(self, worker: WorkerProcess, fd: int) -> None:
        """Something can be read from, or written to, a worker."""
        if worker not in self._workers:
            return  # lost by another event of the same moment
        if fd == worker.requests:
            if not worker.flush():
                self._selector.unregister(worker.requests)
            return
        try:
            for reply in worker.read():
                self._take(worker, reply)
        except WorkerLost as lost:
            self._lose(worker, "error", str(lost), worker.said())

    def check(self) -> float:
        """Kills what is overdue and buries what died silently; the seconds until this must be done again."""
        for worker in list(self._workers):
            self.wake(worker, worker.replies)
        now = time.monotonic()
        next_s = math.inf
        for worker, work in [(worker, work) for worker, work in self._workers.items() if work.calls]:
            left_s = work.began + work.limit_s - now
            if left_s <= 0:
                self._lose(worker, "timeout", f"no answer within {work.limit_s:g} s, its process was killed", worker.stack())
            else:
                next_s = min(next_s, left_s)
        return next_s

    def close(self) -> None:
        for worker in self._workers:
            worker.kill()

    def _send(self, worker: WorkerProcess, call: Call | None, line: bytes) -> None:
        work = self._workers[worker]
        work.calls.append(call)
        if len(work.calls) == 1:
            self._begin(worker)
        if worker.send(line) and worker.requests not in self._selector.get_map():
            self._selector.register(worker.requests, selectors.EVENT_WRITE, (self, worker))

    def _begin(self, worker: WorkerProcess) -> None:
        self._workers[worker].began = time.monotonic()
        worker.mark_log()

    def _take(self, worker: WorkerProcess, reply: dict[str, Any]) -> None:
        work = self._workers[worker]
        if not work.calls:
            raise WorkerLost("its process spoke without being asked")
        call = work.calls[0]
        try:
            answer = _read(reply, call) if call else None
            self.named = self.named if call or "failed" in reply else dict(reply["named"])
        except (KeyError, TypeError, ValueError):
            raise WorkerLost("its process wrote what is no reply on the reply pipe") from None
        work.calls.popleft()
        if work.calls:
            self._begin(worker)
        if call and answer:
            self._pace_s = answer.seconds if math.isinf(self._pace_s) else 0.8 * self._pace_s + 0.2 * answer.seconds
            self._finish(call, answer)
        elif "failed" in reply:
            self._break(f"{reply['failed']}: cannot be loaded: {reply['error']}")
        else:
            self.loaded.set()

    def _lose(self, worker: WorkerProcess, status: str, why: str, said: str) -> None:
        """Kills a worker. The call that it was at fails; those that only waited behind it go to another."""
        for fd in (worker.replies, worker.requests):
            if fd in self._selector.get_map():
                self._selector.unregister(fd)
        work = self._workers.pop(worker)
        worker.kill()
        if not work.calls:
            return
        call = work.calls.popleft()
        self.queue.extendleft(waiting for waiting in reversed(work.calls) if waiting)
        if call is None:
            self._break(f"{self.name}: cannot be loaded: {why}{_last_line(said)}")
        else:
            seconds = time.monotonic() - work.began
            self._finish(call, _failure(call, status, f"{call.function}: {why}", seconds, said))

    def _break(self, why: str) -> None:
        self.broken = why
        self.loaded.set()


def _failure(call: Call, status: Any, detail: str, seconds: float, traceback: str = "") -> Answer:
    return Answer([Outcome(None, status, detail)] * len(call.indices), True, seconds, traceback)


def _last_line(said: str) -> str:
    return f" ({said.splitlines()[-1]})" if said else ""


def _read(reply: dict[str, Any], call: Call) -> Answer:
    """A reply as an answer; KeyError, TypeError or ValueError if it is none. A plugin shares its process with whoever wrote it."""
    if reply["id"] != call.id:
        raise ValueError(reply["id"])
    if "error" in reply:
        return _failure(call, "error", f"{call.function}: {reply['error']}", 0.0, str(reply["traceback"]))
    values, seconds = reply["values"], float(reply["seconds"])
    if len(values) != len(call.indices):
        said = f"{call.function}: returned {len(values)} values for {len(call.indices)} completions"
        return _failure(call, "error", said, seconds)
    metrics = [(str(name), float(value)) for name, value in reply["metrics"]]
    extras = {str(name): list(column) for name, column in reply["extras"].items()}
    return Answer([_outcome(call.function, value) for value in values], False, seconds, "", metrics, extras)


def _outcome(function: str, value: Any) -> Outcome:
    if value is None:
        return Outcome(None, "unscored")
    if isinstance(value, dict):
        return Outcome(None, "error", f"{function}: returned {value['bad']}, which is no number")
    if not math.isfinite(value):
        return Outcome(None, "error", f"{function}: returned {value}")
    return Outcome(float(value))
