"""Random schedules of a run: sampling, scoring, learning, syncing, checkpoints, deaths of engines and of the run, resumes.

GroupStream, RolloutPool and Journal are the real ones; engines, reward functions and learner are tables that answer at random
moments, always the same for the same completion. A death of the run is an exception at any call of the journal, before it or after
it, or while completions are waited for; SQLite undoes an open transaction as it would after kill -9. Every group has one end, and sums
close after every transition. On-policy, a run ends as one that nothing disturbed: the same groups in the same steps with the same
tokens. Ahead of the learner, time decides what meets in a step; what then has to hold is that every step is full, and that none of its
tokens is older than `max_staleness` allows or from weights that the run went back behind.

    P  prompts a step      G  group size
"""

import json
import random
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from data.journal import Journal
from data.journal_sums import TRAINED
from data.prompt_stream import PromptStream
from data.values import Completion, Group, Prompt, Score
from rewards.job import ScoreJob
from rl.ahead import AheadStream
from rl.config import RolloutConfig
from rl.engines.base import Died, EngineDead, Finished, Health, Mailbox, Request, WeightChunk
from rl.metrics import teaches
from rl.pool import RolloutPool
from rl.stream import GroupStream


class Killed(BaseException):
    """The run is dead."""


@dataclass(frozen=True)
class Shape:
    """What a run is like."""

    steps: int = 6
    prompts: int = 7
    per_step: int = 3
    group_size: int = 3
    engines: int = 2
    whole_groups: bool = False
    resample_zero_groups: bool = False
    max_staleness: int = 0
    in_flight: bool = False
    oversample: float = 0.0
    every: int = 2
    keep: int = 2
    failures: float = 0.2
    """Chance of a completion to get no value."""
    engine_deaths: float = 0.03
    """Chance of an engine's death whenever completions are waited for."""
    run_deaths: float = 0.02
    """Chance of the run's death at each point where it can die."""


@dataclass
class World:
    """What goes on around a run, by one source of randomness; outlives the run's deaths."""

    shape: Shape
    rng: random.Random
    transitions: Counter[str] = field(default_factory=Counter)
    lineage: dict[int, list[tuple[Any, ...]]] = field(default_factory=dict)
    """By step: what was handed over, as the newest life has it."""
    deaths_left: int = 12
    """Then the run is left alone, so that it ends."""

    def note(self, what: str) -> None:
        self.transitions[what] += 1

    def may_die(self) -> None:
        if self.deaths_left and self.rng.random() < self.shape.run_deaths:
            self.deaths_left -= 1
            self.note("death of the run")
            raise Killed


# --- the parts that are tables ----------------------------------------------------------------------------------------


class SimEngine:
    """Answers when the world says so; what it answers follows from seed and weights alone."""

    def __init__(self, name: str, world: World):
        self.name = name
        self.slots = 4
        self.whole_groups = world.shape.whole_groups
        self.world = world
        self.given: list[Request] = []
        self.version = 0
        self.fresh = True
        """Nothing finished since its last death; the pool waits before it starts such a one again."""

    def start(self, mailbox: Mailbox) -> None:
        self.mailbox, self.version, self.given, self.paused, self.since = mailbox, 0, [], False, {}
        self.alive = True

    def submit(self, requests: Sequence[Request]) -> None:
        if not self.alive:
            raise EngineDead(self.name)
        self.given.extend(requests)
        self.since |= {request.id: self.version for request in requests}

    def finish(self, count: int) -> None:
        """Some of what it was given, in any order; a whole group at once where it takes these."""
        for _ in range(count):
            if not self.given:
                return
            first = self.world.rng.choice(self.given)
            done = [r for r in self.given if r.group_id == first.group_id] if self.whole_groups else [first]
            for request in done:
                self.given.remove(request)
                self.mailbox.put(Finished(self.name, completion(request, self.since.pop(request.id), self.version, self.name)))
                self.world.note("completion")
                self.fresh = False

    def die(self) -> None:
        self.given, self.fresh, self.alive = [], True, False
        self.world.note("death of an engine")
        self.mailbox.put(Died(self.name, "killed\n"))

    def abort(self, ids: Sequence[str]) -> None: ...
    def load(self, chunk: WeightChunk) -> None: ...
    def close(self) -> None: ...

    def pause(self) -> None:
        self.paused = True

    def resume(self) -> None:
        self.paused = False

    def begin_update(self, version: int) -> None:
        assert self.paused or not self.given, "an update in the middle of completions"
        self.next_version = version

    def end_update(self) -> None:
        self.version = self.next_version

    def health(self) -> Health:
        return Health(True, len(self.given), self.version, 0, 0.0)

    def last_words(self) -> str:
        return ""


def completion(request: Request, first: int, last: int, engine: str) -> Completion:
    """Its first token was written by version `first`, its last by `last`."""
    rng = np.random.default_rng([request.seed % 2**32, last])
    tokens = int(rng.integers(1, 6))
    versions = np.linspace(first, last, tokens).astype(np.int32) if tokens > 1 else np.array([last], np.int32)
    return Completion(
        request.prompt_id, request.group_id, request.index, request.attempt, request.seed, rng.integers(0, 99, tokens).astype(np.int32),
        np.ones(tokens, np.uint8), np.full(tokens, -1.0, np.float32), versions,
        "length" if tokens == 5 else "stop", engine.partition("-")[0],
    )  # fmt: skip


class SimScorer:
    """Judges groups at random moments; a completion's score follows from its tokens."""

    def __init__(self, world: World):
        self.world = world
        self.pending: dict[Hashable, ScoreJob] = {}

    def submit(self, key: Hashable, job: ScoreJob) -> None:
        self.pending[key] = job

    def poll(self, timeout_s: float = 0.0) -> list[tuple[Hashable, list[Score]]]:
        self.world.may_die()
        done = [key for key in self.pending if self.world.rng.random() < 0.5]
        return [(key, [self._score(ids) for ids in self.pending.pop(key).completion_ids]) for key in done]

    def _score(self, ids: Any) -> Score:
        self.world.note("score")
        luck = random.Random(bytes(ids)).random()
        if luck < self.world.shape.failures:
            return Score(None, "error" if luck < self.world.shape.failures / 2 else "unscored")
        return Score(float(int(ids[0]) % 2))

    def logged(self, key: Hashable) -> list[tuple[str, float]]:
        return [("seen", float(len(str(key))))]

    def metrics(self) -> dict[str, float]:
        return {}

    def explain(self, scores: Sequence[Score]) -> str:
        return "no reason"


class SimTokenizer:
    def decode(self, ids: Any, skip_special_tokens: bool) -> str:
        return ""


class DrivenPool(RolloutPool):
    """The real pool, whose engines do something whenever it is polled."""

    world: World

    def poll(self, timeout_s: float) -> list[Completion]:
        world = self.world
        world.may_die()
        for engine in self.engines:
            assert isinstance(engine, SimEngine)
            if engine.given and not engine.fresh and world.deaths_left and world.rng.random() < world.shape.engine_deaths:
                engine.die()
            else:
                engine.finish(world.rng.randint(0, 3))
        return super().poll(0.0 if any(engine.given for engine in self.engines) else 0.001)  # type: ignore[attr-defined]


class WatchedJournal(Journal):
    """The real journal; the run may die around each call, and the sums have to close after each."""

    world: World

    def watched(self, name: str, call: Callable[[], Any]) -> Any:
        self.world.may_die()
        result = call()
        self.world.note(name)
        if not self._db.in_transaction:
            self.sums()
        self.world.may_die()
        return result

    def begin(self, *arguments: Any) -> Any:
        return self.watched("begin", lambda: super(WatchedJournal, self).begin(*arguments))

    def put_completions(self, *arguments: Any) -> Any:
        return self.watched("put completions", lambda: super(WatchedJournal, self).put_completions(*arguments))

    def put_scores(self, *arguments: Any) -> Any:
        return self.watched("put scores", lambda: super(WatchedJournal, self).put_scores(*arguments))

    def use(self, *arguments: Any) -> Any:
        return self.watched("use", lambda: super(WatchedJournal, self).use(*arguments))

    def contain(self, *arguments: Any, **named: Any) -> Any:
        return self.watched("contain", lambda: super(WatchedJournal, self).contain(*arguments, **named))

    def resume(self, *arguments: Any) -> Any:
        return self.watched("resume", lambda: super(WatchedJournal, self).resume(*arguments))


# --- a run ------------------------------------------------------------------------------------------------------------


def live(world: World, path: Path) -> None:
    """Lives of one run until it has done all its steps."""
    checkpoints: dict[int, dict[str, Any]] = {}
    while True:
        if len(checkpoints) > 1 and world.deaths_left and world.rng.random() < 0.25:
            del checkpoints[max(checkpoints)]  # it was damaged
            world.note("damaged checkpoint")
        try:
            with WatchedJournal(path) as journal:
                journal.world = world
                _one_life(world, journal, checkpoints)
                return
        except (Killed, EngineDead):
            world.note("another life")


def _one_life(world: World, journal: Journal, checkpoints: dict[int, dict[str, Any]]) -> None:
    """From the newest checkpoint to the last step; `checkpoints` are states of the stream by step."""
    shape = world.shape
    start = max(checkpoints, default=0)
    pool = DrivenPool([SimEngine(f"engine-{n}", world) for n in range(shape.engines)])
    pool.world = world
    pool.catch_up = lambda engine: sync([engine], updated[0])  # of a pool whose engines live again
    prompts = PromptStream([Prompt(f"p{n}", "", "", np.array([n], np.int32)) for n in range(shape.prompts)], 0)
    config = RolloutConfig(
        group_size=shape.group_size, max_tokens=5, max_resamples=3, resample_zero_groups=shape.resample_zero_groups, engines=shape.engines,
        max_staleness=shape.max_staleness, in_flight=shape.in_flight, oversample=shape.oversample,
    )  # fmt: skip
    scorer: Any = SimScorer(world)
    tokenizer: Any = SimTokenizer()
    parts = (prompts, pool, scorer, journal, tokenizer, config)
    named: dict[str, Any] = {"run": "run", "seed": 0, "max_error_rate": 1.0}
    stream = AheadStream(*parts, **named, steps=shape.steps) if shape.max_staleness else GroupStream(*parts, **named)
    updated = [start]
    with pool:
        journal.resume(start)
        stream.restore(start, checkpoints.get(start, {}))
        ahead(world, stream)  # of a run that goes on nothing may begin before the checkpoint's weights are there
        with stream.standing_still(start):
            assert not (start and pool.open), "sampled from the weights that the engines began with"
            sync(pool.engines, start)
        ahead(world, stream)
        for step in range(start, shape.steps):
            groups = stream.next(shape.per_step)
            taught = learn(groups)
            world.note("learning")
            ahead(world, stream)
            world.may_die()
            with stream.standing_still(step + 1):
                updated[0] = step + 1
                sync(pool.engines, step + 1)
            world.note("sync")
            ahead(world, stream)
            world.may_die()
            world.lineage[step] = [*map(trace, groups), taught, sorted(stream.numbers.items() - times(stream.numbers))]
            stream.end_step(taught)
            ahead(world, stream)
            if world.rng.random() < 0.1:
                with stream.quiet():
                    assert pool.open == 0 and not scorer.pending, "an evaluation has the engines to itself"
                    world.note("evaluation")
            if (step + 1) % shape.every == 0 or step + 1 == shape.steps:
                journal.flush()
                world.may_die()
                checkpoints[step + 1] = json.loads(json.dumps(stream.state()))
                for old in sorted(checkpoints)[: -shape.keep]:
                    del checkpoints[old]
                world.note("checkpoint")
                journal.contain(step + 1, oldest=min(checkpoints))


def ahead(world: World, stream: GroupStream) -> None:
    """What is made while the learner learns, if anything."""
    if isinstance(stream, AheadStream):
        for _ in range(world.rng.randint(0, 12)):
            stream.turn()


def learn(groups: Sequence[Group]) -> dict[str, tuple[int, ...]]:
    """What a learner with `loss.mask_truncated` would take."""
    taught = {}
    for group in groups:
        taken = {
            c.index: s.value
            for c, s in zip(group.completions, group.scores, strict=True)
            if s.value is not None and c.finish_reason != "length"
        }
        if teaches(group) and taken:
            taught[group.id] = tuple(taken)
    return taught


def sync(engines: Sequence[Any], version: int) -> None:
    for engine in engines:
        engine.begin_update(version)
        engine.end_update()


def trace(group: Group) -> tuple[Any, ...]:
    tokens = tuple(c.token_ids.tobytes() for c in group.completions)
    return group.id, tokens, tuple(tuple(c.policy_version.tolist()) for c in group.completions), tuple(s.value for s in group.scores)


def times(numbers: Mapping[str, float]) -> set[tuple[str, float]]:
    """What may differ between runs: how long it took, and what became of engines."""
    return {pair for pair in numbers.items() if pair[0].startswith(("time/", "engines/", "tokens/lost"))}


# --- what has to hold -------------------------------------------------------------------------------------------------


MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None
"""Where journals are, if there is such a place: what is tested are orders of events, not a disk."""


def check(shape: Shape, rng: random.Random) -> Counter[str]:
    """A run that nothing disturbs and one that dies. Counts what happened in both."""
    calm = World(Shape(**{**vars(shape), "engine_deaths": 0.0, "run_deaths": 0.0}), random.Random(rng.random()))
    rough = World(shape, rng)
    ends = []
    for world in (calm, rough):
        with TemporaryDirectory(dir=MEMORY) as place:
            path = Path(place) / "journal.sqlite"
            live(world, path)
            ends.append(fates(path, shape))
    if shape.max_staleness:
        for world in (calm, rough):
            check_ages(world)
    else:
        assert calm.lineage == rough.lineage
        assert ends[0] == ends[1]
    return calm.transitions + rough.transitions


def check_ages(world: World) -> None:
    """Every step is full, and all its tokens are from the last versions."""
    shape = world.shape
    assert sorted(world.lineage) == list(range(shape.steps))
    seen: Counter[str] = Counter()
    for step, (*groups, _, _) in world.lineage.items():
        assert len(groups) == shape.per_step
        for name, _, versions, _ in groups:
            seen[name] += 1
            assert all(step - shape.max_staleness <= v <= step for each in versions for v in each), f"step {step}: {versions}"
            assert shape.in_flight or shape.oversample or all(len(set(each)) == 1 for each in versions), "an update within a completion"
    assert set(seen.values()) == {1}, "no group is trained twice"


def fates(path: Path, shape: Shape) -> list[tuple[Any, ...]]:
    """What became of every group of a finished run."""
    with Journal(path, read_only=True) as journal:
        sums = journal.sums()
        assert sums.groups["open"] == 0 and sums.open == 0, "a group has no end"
        rows = journal._db.execute(
            """SELECT group_id, use.step, reason, tokens, trained, masked, use.checkpoint IS NULL FROM use
               JOIN attempt ON attempt.key = use.attempt WHERE void IS NULL ORDER BY 1"""
        ).fetchall()
        begun = journal._db.execute("SELECT count(*) FROM attempt").fetchone()[0]
    assert len(rows) == len({row[0] for row in rows}) == begun, "every group has one end"
    assert not any(row[-1] for row in rows), "and a checkpoint contains it"
    assert sum(row[4] for row in rows) == sums.trained
    steps = Counter(row[1] for row in rows if row[2] == TRAINED)
    assert all(count <= shape.per_step for count in steps.values())
    return rows
