"""A lane: the worker processes that hold the functions of one source, and the calls that wait for them.

Plugins of one file or module share processes and state, as they would in trl; two sources never do, so a plugin that breaks its
process breaks no other function, and no builtin one. A lane starts with one process and takes more, up to its limit, while calls
wait; where all functions are async one is enough, and what a function limits over its calls (a judge's requests) holds in all. A
worker takes one call at a time; calls of async functions run beside it, `at_once` of each function at most. Each call has a time
limit, from when its worker can begin it; a worker that does not answer in time, dies or writes what is no reply is killed, its call
fails, and another takes its place. Of several calls that ran when a worker died none is blamed: each is asked again alone. A lane
whose first worker cannot load its functions is broken; a later one that cannot is tried again after a pause, as calls wait, until
FAILED_STARTS of them failed in a row and no other is left. All of it runs in the scorer's thread and never blocks.
"""

import json
import math
import selectors
import sys
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
PREPARE_TIMEOUT_S = 1800.0
"""A builtin may fetch and load a large model."""
PREFETCH = 16
"""Calls that a worker may have at hand while they are quick: a round trip on a busy machine takes longer than such a call."""
QUICK_S = 0.005
FAILED_STARTS = 5
FIRST_PAUSE_S = 1.0
"""After a worker that could not load its functions; twice as long after each further one."""
LONGEST_PAUSE_S = 30.0
DETAIL = "detail"
"""What a function logs by `log_extra` under this name becomes the detail of the Score, not a column."""


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
    at_once: int = 1


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
class _Beside:
    """A call of an async function, which runs beside others."""

    call: Call
    ahead: int
    """Calls that its worker, which reads one line after another, has to answer before it comes to this one."""
    began: float
    """When the worker could begin it; not known while some are ahead."""


@dataclass
class _Work:
    """What a worker has to do."""

    calls: deque[Call | None]
    """One after another, in this order; it replies in the same order. None stands for the import of its functions."""
    began: float
    """When it could begin the first of them, by `time.monotonic`."""
    beside: dict[int, _Beside] = field(default_factory=dict)
    """Calls of async functions, by id."""

    def running(self) -> list[tuple[Call | None, float]]:
        """What it is at now, and when that began."""
        return [(call, self.began) for call in list(self.calls)[:1]] + [(b.call, b.began) for b in self.beside.values() if not b.ahead]

    def answered(self) -> None:
        """It has answered the first of its calls, and is at the next line."""
        self.calls.popleft()
        for beside in self.beside.values():
            if beside.ahead:
                beside.ahead -= 1
                beside.began = time.monotonic()


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
        load_timeout_s: float = LOAD_TIMEOUT_S,
    ) -> None:
        self.name = name
        self.loaded = threading.Event()
        """Set when the first worker is ready, or cannot be."""
        self.broken = ""
        """Why its functions cannot be imported."""
        self.named: dict[str, list[str]] = {}
        """Arguments that each function names."""
        self.said: list[str] = []
        """What its functions have to tell the user before they begin."""
        self._queue: deque[Call] = deque()
        self._waiting: dict[str, deque[Call]] = {}
        """Calls of async functions, by function."""
        self._load = json.dumps(load).encode() + b"\n"
        self._env, self._limit, self._log_dir = env, limit, log_dir
        self._selector, self._finish = selector, finish
        self._workers: dict[WorkerProcess, _Work] = {}
        self._load_timeout_s = load_timeout_s
        self._pace_s = math.inf
        self._started = 0
        self._failed_starts = 0
        """In a row."""
        self._next_start = 0.0

    def add(self, call: Call) -> None:
        """A call that waits for its turn."""
        self._queue_of(call).append(call)

    def add_first(self, calls: Sequence[Call]) -> None:
        """Calls that go before all others, in this order."""
        for call in reversed(calls):
            self._queue_of(call).appendleft(call)

    def _queue_of(self, call: Call) -> deque[Call]:
        return self._waiting[call.function] if call.function in self._waiting else self._queue

    def pump(self) -> None:
        """Hands waiting calls to workers, and starts a worker if calls still wait."""
        for queue in [self._queue, *self._waiting.values()] if self.broken else ():
            while queue:
                call = queue.popleft()
                self._finish(call, _failure(call, "error", f"{call.function}: {self.broken}", 0.0))
        depth = PREFETCH if self._pace_s < QUICK_S else 1
        loaded = [worker for worker, work in self._workers.items() if None not in work.calls]
        while self._queue and loaded:
            worker = min(loaded, key=lambda worker: len(self._workers[worker].calls))
            work = self._workers[worker]
            alone = self._is_suspect(self._queue[0])
            if len(work.calls) >= (1 if alone else depth) or (alone and work.beside) or self._has_suspect(worker):
                break
            self._send(worker, self._queue.popleft())
        for function, queue in self._waiting.items():
            busy = sum(beside.call.function == function for work in self._workers.values() for beside in work.beside.values())
            open_to = [worker for worker in loaded if not self._has_suspect(worker)]
            while queue and open_to and busy < queue[0].at_once:
                self._send_beside(min(open_to, key=lambda worker: len(self._workers[worker].beside)), queue.popleft())
                busy += 1
        wanted = self._queue or (any(self._waiting.values()) and not self._workers)
        if wanted and len(loaded) == len(self._workers) < self._limit and time.monotonic() >= self._next_start:
            self.start_worker()

    def _is_suspect(self, call: Call | None) -> bool:
        """A call of an async function that has to run alone, as it was at work when a worker died."""
        return call is not None and call.function in self._waiting

    def _has_suspect(self, worker: WorkerProcess) -> bool:
        return any(map(self._is_suspect, self._workers[worker].calls))

    def start_worker(self) -> None:
        log = self._log_dir / f"rewards-{Path(self.name).stem}-{self._started}.log" if self._log_dir else None
        self._started += 1
        worker = WorkerProcess(self._env, log)
        self._workers[worker] = _Work(deque(), 0.0)
        self._selector.register(worker.replies, selectors.EVENT_READ, (self, worker))
        self._send(worker, None)

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
                if worker in self._workers:  # not lost by the reply before
                    self._take(worker, reply)
        except WorkerLost as lost:
            self._lose(worker, "error", str(lost), worker.said())

    def check(self) -> float:
        """Kills what is overdue and buries what died silently; the seconds until this must be done again."""
        for worker in list(self._workers):
            self.wake(worker, worker.replies)
        now = time.monotonic()
        next_s = math.inf
        for worker, work in list(self._workers.items()):
            for call, began in work.running():
                limit_s = call.timeout_s if call else self._load_timeout_s
                left_s = began + limit_s - now
                if left_s <= 0:
                    said = worker.stack()
                    self._lose(worker, "timeout", f"no answer within {limit_s:g} s, its process was killed", said, (call, began))
                    break
                next_s = min(next_s, left_s)
        return next_s

    def close(self) -> None:
        for worker in self._workers:
            worker.kill()

    def _send(self, worker: WorkerProcess, call: Call | None) -> None:
        work = self._workers[worker]
        work.calls.append(call)
        if len(work.calls) == 1:
            self._begin(worker)
        self._write(worker, call.line if call else self._load)

    def _send_beside(self, worker: WorkerProcess, call: Call) -> None:
        work = self._workers[worker]
        work.beside[call.id] = _Beside(call, len(work.calls), time.monotonic())
        self._write(worker, call.line)

    def _write(self, worker: WorkerProcess, line: bytes) -> None:
        if worker.send(line) and worker.requests not in self._selector.get_map():
            self._selector.register(worker.requests, selectors.EVENT_WRITE, (self, worker))

    def _begin(self, worker: WorkerProcess) -> None:
        self._workers[worker].began = time.monotonic()
        worker.mark_log()

    def _take(self, worker: WorkerProcess, reply: dict[str, Any]) -> None:
        work = self._workers[worker]
        try:
            beside = work.beside.get(reply["id"]) if "id" in reply else None
            if beside is not None:
                done = _read(reply, beside.call)
                del work.beside[beside.call.id]
                self._finish(beside.call, done)
                return
            if not work.calls:
                raise WorkerLost("its process spoke without being asked")
            call = work.calls[0]
            answer = _read(reply, call) if call else None
            unfit = f"{reply['failed']}: cannot be loaded: {reply['error']}" if call is None and "failed" in reply else ""
            if call is None and not unfit:
                self._learn(reply)
        except (KeyError, TypeError, ValueError):
            raise WorkerLost("its process wrote what is no reply on the reply pipe") from None
        if unfit:
            self._drop(worker)
            self._start_failed(unfit)
            return
        work.answered()
        if work.calls:
            self._begin(worker)
        if call and answer:
            self._pace_s = answer.seconds if math.isinf(self._pace_s) else 0.8 * self._pace_s + 0.2 * answer.seconds
            self._finish(call, answer)
        else:
            self._failed_starts = 0
            self.loaded.set()

    def _learn(self, reply: dict[str, Any]) -> None:
        """What a worker says of the functions that it has loaded."""
        self.named = dict(reply["named"])
        self.said = [str(line) for line in reply["said"]]
        for function in reply["async"]:
            self._waiting.setdefault(function, deque())
        if set(self._waiting) == set(self.named):
            self._limit = 1

    def _lose(self, worker: WorkerProcess, status: str, why: str, said: str, overdue: tuple[Call | None, float] | None = None) -> None:
        """Kills a worker. The call that it was at fails; those that only waited behind it go to another."""
        work = self._drop(worker)
        running = work.running()
        if not running:
            return
        blamed = overdue or (running[0] if len(running) == 1 else None)
        # One after another from now on, so that the next death has one culprit.
        suspects = [call for call, _ in running if call and (blamed is None or call is not blamed[0])]
        self._queue.extendleft(reversed([*suspects, *(call for call in list(work.calls)[1:] if call)]))
        self.add_first([beside.call for beside in work.beside.values() if beside.ahead])
        if blamed is None:
            return
        call, began = blamed
        if call is None:
            self._start_failed(f"{self.name}: cannot be loaded: {why}{_last_line(said)}")
        else:
            seconds = time.monotonic() - began
            self._finish(call, _failure(call, status, f"{call.function}: {why}", seconds, said))

    def _drop(self, worker: WorkerProcess) -> _Work:
        """Kills a worker; what it had to do."""
        for fd in (worker.replies, worker.requests):
            if fd in self._selector.get_map():
                self._selector.unregister(fd)
        worker.kill()
        return self._workers.pop(worker)

    def _start_failed(self, why: str) -> None:
        """A worker, dropped by now, did not come to load its functions."""
        self._failed_starts += 1
        others = any(None not in work.calls for work in self._workers.values())
        if not self.loaded.is_set() or (self._failed_starts >= FAILED_STARTS and not others):
            self.broken = why
            self.loaded.set()
            return
        pause_s = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** (self._failed_starts - 1))
        self._next_start = time.monotonic() + pause_s
        print(f"rewards: {why}; the next worker starts in {pause_s:g} s at the earliest", file=sys.stderr, flush=True)


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
    details = extras.pop(DETAIL, [""] * len(values))
    outcomes = [_outcome(call.function, value, str(detail or "")) for value, detail in zip(values, details, strict=True)]
    return Answer(outcomes, False, seconds, "", metrics, extras)


def _outcome(function: str, value: Any, detail: str) -> Outcome:
    if value is None:
        return Outcome(None, "unscored", detail)
    if isinstance(value, dict) and "failed" in value:
        return Outcome(None, "error", f"{function}: {value['failed']}")
    if isinstance(value, dict):
        return Outcome(None, "error", f"{function}: returned {value['bad']}, which is no number")
    if not math.isfinite(value):
        return Outcome(None, "error", f"{function}: returned {value}")
    return Outcome(float(value), "ok", detail)
