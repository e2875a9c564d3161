"""The scorer: groups in, Scores out, beside whatever else the trainer does.

`submit` hands over a group and returns; `poll` gives the groups that are done, in the order in which they became so. In between a
thread of its own moves calls to worker processes and answers back. A call holds one group and one function; a call that failed is
repeated one completion at a time, so that only the culprit fails. Not so where the function compares siblings (it takes
`group_ids`): alone, they would be judged differently.
"""

import itertools
import math
import os
import selectors
import sys
import threading
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Any

from data.recipe import InputError
from data.values import Score
from rewards.combine import Outcome, combine_group
from rewards.config import PartConfig, RewardsConfig
from rewards.job import ScoreJob, request_line
from rewards.lane import LOAD_TIMEOUT_S, PREPARE_TIMEOUT_S, Answer, Call, Lane
from rewards.plugins import Plugin
from rewards.registry import BUILTINS

_TICK_S = 0.5
"""How late, at most, a worker is found dead whose pipes something else holds open."""
_TRACEBACKS = 100
"""Tracebacks kept for messages, the latest."""
_EXTRAS = 4096
"""Groups whose `log_extra` columns wait to be asked for, the latest: of a group that is dropped nobody asks."""


@dataclass
class _Group:
    """A group that is being scored, and what came of it so far."""

    key: Hashable
    job: ScoreJob
    parts: Sequence[PartConfig]
    """That judge this row."""
    waiting: int
    """Calls that have not been answered."""
    outcomes: dict[str, list[Outcome]]
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    metrics: list[tuple[str, float]] = field(default_factory=list)
    extras: dict[str, list[Any]] = field(default_factory=dict)
    tracebacks: dict[str, str] = field(default_factory=dict)
    """By the detail of the failure."""


class Scorer:
    """Scores groups by the reward functions of a recipe. Its methods belong to one thread.

    `log_dir`: where what the functions print is kept, a file a worker process; without one it is kept only for messages.
    """

    def __init__(self, config: RewardsConfig, log_dir: Path | None = None) -> None:
        self._config = config
        self._functions = config.functions()
        self._shadows = [shadow.key for shadow in config.shadow]
        self._selector = selectors.DefaultSelector()
        self._lanes = self._make_lanes(log_dir)
        self._ids = itertools.count()
        self._groups: dict[int, _Group] = {}
        self._inbox: SimpleQueue[tuple[int, _Group, list[Call]] | None] = SimpleQueue()
        self._done: SimpleQueue[_Group | Exception] = SimpleQueue()
        self._wake_read, self._wake_write = os.pipe()
        self._thread = threading.Thread(target=self._run, name="scorer", daemon=True)
        self._pending = 0
        self._closed = False
        self._times: dict[str, list[float]] = defaultdict(list)
        self._extras: dict[Hashable, dict[str, list[Any]]] = {}
        self._logged: dict[Hashable, list[tuple[str, float]]] = {}
        self._tracebacks: dict[str, str] = {}

    def start(self) -> None:
        """Starts the workers and returns when every function is imported; InputError names one that cannot be."""
        for name in self._functions:
            for variable in self._config.part(name).variables:
                if variable not in os.environ:
                    raise InputError(f"rewards.parts: {name}: the environment variable {variable} that it names is not set")
        self._thread.start()
        for lane in set(self._lanes.values()):
            lane.loaded.wait()
            if lane.broken:
                self.close()
                raise InputError(f"rewards: {lane.broken}")
            for line in lane.said:
                print(line, file=sys.stderr, flush=True)

    def submit(self, key: Hashable, job: ScoreJob) -> None:
        """Asks for the Scores of a group; `poll` gives them with its key. ValueError if a column cannot be handed to a function."""
        number, whole = next(self._ids), range(len(job.completions))
        parts = self._config.parts_for(job.columns)
        names = list(dict.fromkeys([*(p.key for p in parts), *self._shadows, *(p.requires for p in parts if p.requires)]))
        calls = [self._call(number, job, name, whole) for name in names]
        outcomes = {name: [Outcome(None, "unscored")] * len(whole) for name in names}
        self._pending += 1
        if not whole:  # of a group without a completion to judge nothing is asked
            self._done.put(_Group(key, job, parts, 0, outcomes))
            return
        self._inbox.put((number, _Group(key, job, parts, len(calls), outcomes), calls))
        os.write(self._wake_write, b"\0")

    def poll(self, timeout_s: float = 0.0) -> list[tuple[Hashable, list[Score]]]:
        """The groups that are done, each once; waits for a first one at most `timeout_s`, and not at all if none is pending."""
        done: list[tuple[Hashable, list[Score]]] = []
        while self._pending:
            try:
                group = self._done.get(timeout=timeout_s) if timeout_s and not done else self._done.get_nowait()
            except Empty:
                break
            if isinstance(group, Exception):
                raise RuntimeError("the scorer's thread failed") from group
            self._pending -= 1
            done.append((group.key, self._account(group)))
        return done

    def score(self, jobs: Sequence[ScoreJob]) -> list[list[Score]]:
        """Scores some groups and waits for them; not while submitted ones are pending."""
        assert not self._pending, "score() would mix its groups with those submitted"
        for index, job in enumerate(jobs):
            self.submit(index, job)
        scores: dict[Hashable, list[Score]] = {}
        while self._pending:
            scores |= dict(self.poll(timeout_s=60.0))
        return [scores[index] for index in range(len(jobs))]

    def extras(self, key: Hashable) -> dict[str, list[Any]]:
        """What functions logged by `log_extra` for a group that `poll` gave, a list over its completions by column; once."""
        return self._extras.pop(key, {})

    def logged(self, key: Hashable) -> list[tuple[str, float]]:
        """What functions logged by `log_metric` for a group that `poll` gave; once, and `metrics` then leaves it out."""
        return self._logged.pop(key, [])

    def metrics(self) -> dict[str, float]:
        """Means of what functions logged by `log_metric`, and `time/reward/<name>_s` in all; since it was last asked."""
        times = {name: math.fsum(values) for name, values in sorted(self._times.items())}
        means = means_of_logged(pair for pairs in self._logged.values() for pair in pairs)
        self._times.clear()
        self._logged.clear()
        return means | times

    @contextmanager
    def apart(self) -> Iterator[None]:
        """What is judged within, an evaluation, leaves nothing in `metrics`."""
        times, logged = dict(self._times), dict(self._logged)
        self._times.clear()
        self._logged.clear()
        try:
            yield
        finally:
            self._times.clear()
            self._times.update(times)
            self._logged = logged

    def explain(self, scores: Sequence[Score]) -> str:
        """One message for Scores without a value: how many failed, the function that failed most, what it said, a traceback."""
        failed = [score for score in scores if score.status in ("timeout", "error")]
        if not failed:
            parts = ", ".join(part.name for part in self._config.parts)
            return f"none of {len(scores)} completions could be judged by {parts}; do the prompts have the columns that they need?"
        names = Counter(score.detail.partition(":")[0] for score in failed)
        name, count = names.most_common(1)[0]
        detail = next(score.detail for score in failed if score.detail.startswith(f"{name}:"))
        where = detail if name.startswith("rollout.") else f"the reward function '{name}': {detail}"
        head = f"{len(failed)} of {len(scores)} scores failed, {count} of them in {where}"
        return "\n".join([head, *[trace for said, trace in self._tracebacks.items() if detail.startswith(said)][:1]])

    def close(self) -> None:
        """Kills the workers; may be called twice."""
        if self._closed:
            return
        self._closed = True
        if self._thread.is_alive():
            self._inbox.put(None)
            os.write(self._wake_write, b"\0")
            self._thread.join()
        self._selector.close()
        os.close(self._wake_read)
        os.close(self._wake_write)

    def __enter__(self) -> "Scorer":
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _make_lanes(self, log_dir: Path | None) -> dict[str, Lane]:
        """The lane of each function by its name; functions of one source share one."""
        by_source: dict[str, dict[str, Plugin]] = defaultdict(dict)
        for name, function in self._functions.items():
            builtin = BUILTINS.get(function.name)
            source = function.source if builtin is None else name if builtin.alone else "builtin"
            by_source[source][name] = function
        limit = self._config.workers or min(4, os.cpu_count() or 1)
        lanes: dict[str, Lane] = {}
        for source, functions in by_source.items():
            parts = {name: self._config.part(name) for name in functions}
            load = {
                "memory_mb": self._config.memory_mb,
                "functions": [
                    {
                        "name": name,
                        "source": f.source,
                        "function": f.function,
                        "options": _options(f, parts[name]),
                        "prepares": _prepares(f),
                    }
                    for name, f in functions.items()
                ],
            }
            env = [variable for part in parts.values() for variable in part.variables]
            one = any(f.name in BUILTINS and BUILTINS[f.name].one_process for f in functions.values())
            timeout_s = PREPARE_TIMEOUT_S if one else LOAD_TIMEOUT_S
            lane = Lane(source, load, env, 1 if one else limit, log_dir, self._selector, self._answered, timeout_s)
            lanes |= dict.fromkeys(functions, lane)
        return lanes

    def _call(self, number: int, job: ScoreJob, name: str, indices: Sequence[int]) -> Call:
        # A builtin names what it uses; a plugin gets everything, as from trl.
        named = self._lanes[name].named[name] if self._functions[name].name in BUILTINS else None
        call_id = next(self._ids)
        line = request_line(job, call_id, name, indices, named)
        part = self._config.part(name)
        return Call(call_id, name, number, indices, line, part.limit_s, part.at_once)

    def _account(self, group: _Group) -> list[Score]:
        for name, seconds in group.seconds.items():
            self._times[f"time/reward/{name}_s"].append(seconds)
        if group.metrics:
            self._logged.setdefault(group.key, []).extend(group.metrics)
        if group.extras:
            self._extras[group.key] = group.extras
        while len(self._extras) > _EXTRAS:
            del self._extras[next(iter(self._extras))]
        self._tracebacks |= group.tracebacks
        while len(self._tracebacks) > _TRACEBACKS:
            del self._tracebacks[next(iter(self._tracebacks))]
        each = [{name: outcomes[i] for name, outcomes in group.outcomes.items()} for i in range(len(group.job.completions))]
        return combine_group(group.parts, each, self._shadows, self._config.normalize == "group")

    # --- in the thread ------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        lanes = list(dict.fromkeys(self._lanes.values()))
        try:
            self._selector.register(self._wake_read, selectors.EVENT_READ, None)
            for lane in lanes:
                lane.start_worker()
            while self._take_submitted():
                for lane in lanes:
                    lane.pump()
                wait_s = min(_TICK_S, *(lane.check() for lane in lanes))
                for key, _ in self._selector.select(max(0.0, wait_s)):
                    if key.data is None:
                        os.read(self._wake_read, 4096)
                    else:
                        lane, worker = key.data
                        lane.wake(worker, key.fd)
        except Exception as error:  # noqa: BLE001 - a bug here must reach the caller of poll, not hang it
            self._done.put(error)
            for lane in lanes:
                lane.broken = lane.broken or "the scorer's thread failed"
                lane.loaded.set()
        finally:
            for lane in lanes:
                lane.close()

    def _take_submitted(self) -> bool:
        """Queues the calls of what was submitted; False if the scorer is being closed."""
        while not self._inbox.empty():
            submitted = self._inbox.get()
            if submitted is None:
                return False
            number, group, calls = submitted
            self._groups[number] = group
            for call in calls:
                self._lanes[call.function].add(call)
        return True

    def _answered(self, call: Call, answer: Answer) -> None:
        group = self._groups[call.group]
        group.waiting -= 1
        group.seconds[call.function] += answer.seconds
        if answer.traceback:
            group.tracebacks[answer.outcomes[0].detail] = answer.traceback
        lane = self._lanes[call.function]
        if answer.failed and len(call.indices) > 1 and not lane.broken and "group_ids" not in lane.named[call.function]:
            again = [self._call(call.group, group.job, call.function, [index]) for index in call.indices]
            lane.add_first(again)
            group.waiting += len(again)
            return
        for place, index in enumerate(call.indices):
            group.outcomes[call.function][index] = answer.outcomes[place]
            for column, values in answer.extras.items():
                group.extras.setdefault(column, [None] * len(group.job.completions))[index] = values[place]
        group.metrics += answer.metrics
        if not group.waiting:
            del self._groups[call.group]
            self._done.put(group)


def means_of_logged(logged: Iterable[tuple[str, float]]) -> dict[str, float]:
    """The mean of each name; whatever the order, to the bit, because fsum is exact."""
    values: dict[str, list[float]] = defaultdict(list)
    for name, value in logged:
        values[name].append(value)
    return {name: math.fsum(values[name]) / len(values[name]) for name in sorted(values)}


def _options(function: Plugin, part: PartConfig) -> dict[str, Any]:
    told = function.name in BUILTINS and BUILTINS[function.name].told_timeout
    return part.options | ({"timeout_s": part.limit_s} if told else {})


def _prepares(function: Plugin) -> bool:
    return function.name in BUILTINS and BUILTINS[function.name].prepares
