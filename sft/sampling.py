"""Rejection sampling's first half: every group that is wanted gets its completions and its scores, in the journal.

One loop feeds engines and scorer at once. Engines have more to do than they can take as long as there is more, scoring runs beside
them, and each result is in the journal before anything is made of it. What the journal holds is not asked for again: a process that
was killed finds its work done up to there, and an expert of which nothing is missing is not even loaded.
"""

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from data.journal import Attempt, Journal
from data.values import Completion, Prompt, Score
from rewards.scorer import Scorer
from rl.engines.base import Request, Sampling
from rl.engines.make import make_engines
from rl.pool import RolloutPool
from rl.stream import POLL_S, RunStopped, job_of
from sft.experts import Expert, Job

CHUNK = 32
"""Groups that are begun in one transaction."""
SCORED_BEHIND = 1024
"""Groups that may wait for their scores before no more are asked for."""
SAY_S = 10.0
"""Seconds between two lines of progress."""


@dataclass
class Spent:
    """What an expert's engines did, for the log: times are no part of a result."""

    loading_s: float = 0.0
    busy_s: float = 0.0
    """Seconds in which an engine was sampling, summed over engines."""
    tokens: int = 0


@dataclass
class _Begun:
    """A group in the making."""

    job: Job
    attempt: Attempt
    done: dict[int, Completion] = field(default_factory=dict)


class _Work:
    """An expert whose groups are being made."""

    def __init__(self, expert: Expert, logs: Path, say: Callable[[str], None]):
        self.expert = expert
        self.say = say
        self.logs = logs / expert.name
        self.jobs: Iterator[Job] = expert.jobs()
        self.exhausted = False
        self.open: dict[str, _Begun] = {}
        """Groups of which completions are missing."""
        self.pool: RolloutPool | None = None
        self.spent = Spent()
        rollout = expert.config.rollout
        self.sampling = Sampling(rollout.max_tokens, rollout.temperature, tuple(rollout.stop))

    def engines(self) -> RolloutPool:
        """The expert's engines, loaded once, when the first completion is missing."""
        if self.pool is None:
            began = time.perf_counter()
            recipe = self.expert.recipe
            made = make_engines(recipe.rollout, recipe.policy, self.expert.folder, self.expert.max_model_len, self.logs, say=self.say)
            self.pool = RolloutPool(made).__enter__()
            self.spent.loading_s = time.perf_counter() - began
        return self.pool

    @property
    def hungry(self) -> bool:
        """Whether its engines could soon have nothing to do."""
        slots = sum(engine.slots for engine in self.pool.engines) if self.pool else 1
        return not self.exhausted and (self.pool is None or self.pool.open < 2 * slots)

    def close(self) -> None:
        if self.pool is not None:
            for engine in self.pool.engines:
                health = engine.health()
                self.spent.busy_s += health.busy_s
                self.spent.tokens += health.tokens
            self.pool.close()
            self.pool = None


class Sampler:
    """Makes all groups of some experts; `counts` say how far it is."""

    def __init__(self, journal: Journal, scorer: Scorer, logs: Path, max_error_rate: float, say: Callable[[str], None]):
        self.journal = journal
        self.scorer = scorer
        self.logs = logs
        self.max_error_rate = max_error_rate
        self.say = say
        self.scoring: dict[str, _Begun] = {}
        self.counts: Counter[str] = Counter()
        """Completions: `held` by the journal when this process began, `sampled` and `scored` by it; `groups` that are complete."""
        self.failed: list[Score] = []
        self.expected = 0
        self.spent: dict[str, Spent] = {}
        self.scored_at = 0.0
        """When the last score came, by time.perf_counter."""
        self._said = time.monotonic()

    def run(self, experts: Sequence[Expert], at_once: int, asked_to_end: Callable[[], bool] = lambda: False) -> bool:
        """To the end; False if asked to end before. Raises RunStopped when too many scores failed, EngineDead when an engine died."""
        self.expected = sum(len(e.kept) * e.config.rollout.group_size for e in experts)
        waiting, active = deque(experts), deque[_Work]()
        try:
            while waiting or active or self.scoring:
                if asked_to_end():
                    return False
                while waiting and len(active) < at_once:
                    active.append(_Work(waiting.popleft(), self.logs, self.say))
                for work in list(active):
                    self._turn(work)
                    if work.exhausted and not work.open:
                        work.close()
                        self.spent[work.expert.name] = work.spent
                        active.remove(work)
                self._take_scores(0.0 if any(work.open for work in active) else POLL_S)
                self._progress(active)
        finally:
            for work in active:
                if work.pool is not None:
                    work.pool.close()
        return True

    def _turn(self, work: _Work) -> None:
        while work.hungry and len(self.scoring) < SCORED_BEHIND:
            self._begin(work)
        if work.pool is not None and work.open:
            self._arrived(work, work.pool.poll(POLL_S))

    # --- completions ----------------------------------------------------------------------------------------------------

    def _begin(self, work: _Work) -> None:
        """Begins the next groups: what the journal or the job has of them is taken, the rest is asked of the engines."""
        jobs = list(islice(work.jobs, CHUNK))
        work.exhausted = len(jobs) < CHUNK
        with self.journal.transaction():
            begun = [_Begun(job, self.journal.begin([job.slot], job.size)[0]) for job in jobs]
            for group in begun:
                self._take_given(group)
        for group in begun:
            self._ask(work, group)

    def _take_given(self, group: _Begun) -> None:
        job, name = group.job, group.attempt.group_id
        if job.given is not None:
            assert all(completion.group_id == name for completion in job.given)
            self.journal.put_completions(job.given)
            if job.origin is not None:
                self.journal.set_meta(**{f"origin/{name}": job.origin})
            if job.scores is not None:
                self.journal.put_scores(name, dict(enumerate(job.scores)))

    def _ask(self, work: _Work, group: _Begun) -> None:
        name, size = group.attempt.group_id, group.attempt.size
        scores = self.journal.scores(name)
        if len(scores) == size:
            self.counts["held"] += size
            self.counts["groups"] += 1
            self._count_failed(scores.values())
            return
        group.done = self.journal.completions(name)
        self.counts["held"] += len(group.done)
        missing = [index for index in range(size) if index not in group.done]
        if not missing:
            self._score(work.expert, group)
            return
        work.open[name] = group
        pool = work.engines()
        if pool.engines[0].whole_groups:
            assert len(missing) == size, "an engine of whole groups gives all completions of a group or none"
        pool.submit([self._request(work, group, index) for index in missing])

    def _request(self, work: _Work, group: _Begun, index: int) -> Request:
        return request(work.expert, group.job.prompt, group.attempt, index, work.sampling)

    def _arrived(self, work: _Work, completions: Sequence[Completion]) -> None:
        """Keeps completions: each as it comes, or a whole group at once where the engine made it in one call."""
        assert work.pool is not None
        whole = work.pool.engines[0].whole_groups
        finished = []
        with self.journal.transaction():
            for completion in completions:
                group = work.open[completion.group_id]
                group.done[completion.index] = completion
                if not whole:
                    self.journal.put_completions([completion])
                if len(group.done) == group.attempt.size:
                    if whole:
                        self.journal.put_completions([group.done[index] for index in sorted(group.done)])
                    del work.open[completion.group_id]
                    finished.append(group)
        self.counts["sampled"] += len(completions)
        for group in finished:
            self._score(work.expert, group)

    # --- scores ---------------------------------------------------------------------------------------------------------

    def _score(self, expert: Expert, group: _Begun) -> None:
        name = group.attempt.group_id
        self.scoring[name] = group
        completions = [group.done[index] for index in range(group.attempt.size)]
        self.scorer.submit(name, job_of(group.job.prompt, name, completions, expert.text, 0))

    def _take_scores(self, timeout_s: float) -> None:
        done = self.scorer.poll(timeout_s) if self.scoring else []
        with self.journal.transaction():
            for key, scores in done:
                self.journal.put_scores(str(key), dict(enumerate(scores)))
        for key, scores in done:
            del self.scoring[str(key)]
            self.counts["groups"] += 1
            self.counts["scored"] += len(scores)
            self._count_failed(scores)
            self.scored_at = time.perf_counter()
        if len(self.failed) > self.max_error_rate * self.expected:
            self._stop()

    def _count_failed(self, scores: Iterable[Score]) -> None:
        self.failed += [score for score in scores if score.status in ("timeout", "error")]

    def _stop(self) -> None:
        self.journal.resume(0)  # forgets the failed scores: what made them fail is to be mended, and then they are judged again
        raise RunStopped(
            f"{len(self.failed)} of {self.expected} scores failed already, more than rewards.max_error_rate {self.max_error_rate:g} "
            f"allows; {self.scorer.explain(self.failed)}"
        )

    def _progress(self, active: Sequence[_Work]) -> None:
        if time.monotonic() - self._said > SAY_S:
            self._said = time.monotonic()
            names = ", ".join(work.expert.name for work in active) or "the last scores"
            self.say(f"{names}: {self.counts['groups']:,} groups complete, {self.counts['sampled']:,} completions sampled")


def request(expert: Expert, prompt: Prompt, attempt: Attempt, index: int, sampling: Sampling) -> Request:
    """What an engine is asked for one completion of a group: the same whenever it is asked."""
    return Request(
        prompt_id=prompt.id, group_id=attempt.group_id, attempt=attempt.attempt, index=index,
        seed=expert.completion_seed(prompt, attempt.attempt, index), prompt_ids=prompt.token_ids, sampling=sampling,
        position=attempt.slot.position,
    )  # fmt: skip
