"""The GroupStream: where prompts, pool, rewards and journal meet.

It asks the pool for completions, scores a group as soon as it is complete, asks again for what failed, and hands groups over in the
order of the prompts, whatever the order in which they got ready. Each stage of a group is written to the journal before the next
begins, so what the journal holds is never sampled or scored again: a resumed run walks the same way and finds its work done.

This one is synchronous: it samples for a step when the step asks. The one that samples ahead is in `rl/ahead.py`.
"""

import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from data.journal import Attempt, Journal, Slot
from data.journal_sums import FAILED, STALE, TRAINED, TRUNCATED, ZERO_ADVANTAGE
from data.prompt_stream import PromptStream
from data.values import Completion, Group, Prompt, Score, completion_seed
from rewards.job import ScoreJob
from rewards.scorer import Scorer, means_of_logged
from rl.config import RolloutConfig
from rl.engines.base import Request, Sampling
from rl.metrics import group_metrics, length_bias, teaches, turn_metrics
from rl.pool import RolloutPool
from rl.ranks import Ranks

POLL_S = 0.05
REASONS = (TRAINED, ZERO_ADVANTAGE, TRUNCATED, FAILED, STALE)
"""What a step counts its groups by."""


class RunStopped(RuntimeError):
    """The run cannot go on in a way that means anything; the message says why and what to do. What there was is kept."""


@dataclass(frozen=True)
class Ended:
    """A group and what became of it."""

    group: Group
    reason: str
    """`trained`, or why it was dropped."""
    taught: Collection[int] = ()
    """Indices of the completions that were trained on."""

    def outcomes(self) -> list[str]:
        """What became of each completion; its tokens stand under that name in the account."""
        if self.reason != TRAINED:
            return [self.reason] * len(self.group.completions)
        pairs = zip(self.group.completions, self.group.scores, strict=True)
        return [TRAINED if c.index in self.taught else FAILED if s.value is None else TRUNCATED for c, s in pairs]


@dataclass
class _Begun:
    """A group in the making."""

    attempt: Attempt
    prompt: Prompt
    done: dict[int, Completion] = field(default_factory=dict)


@dataclass
class _Step:
    """What happened in a step so far."""

    groups: dict[int, Group] = field(default_factory=dict)
    """Finished groups by position."""
    dropped: dict[tuple[int, int], Ended] = field(default_factory=dict)
    """By slot: groups with fewer than two values, and those that taught nothing and made room for others."""
    scores: list[Score] = field(default_factory=list)
    logged: list[tuple[str, float]] = field(default_factory=list)
    """What reward functions logged by `log_metric`."""
    expected: int = 0
    """Scores that there will be when the groups asked for so far are scored."""
    tokens: int = 0
    """Tokens sampled in all groups of the step, failed ones included."""
    rollout_s: float = 0.0
    reward_s: float = 0.0


class GroupStream:
    """Synchronous: `next` samples from the weights that the engines have now. Lives on rank 0."""

    def __init__(
        self,
        prompts: PromptStream,
        pool: RolloutPool,
        scorer: Scorer,
        journal: Journal,
        tokenizer: PreTrainedTokenizerBase,
        config: RolloutConfig,
        *,
        run: str,
        seed: int,
        max_error_rate: float,
    ):
        self.prompts = prompts
        self.pool = pool
        self.scorer = scorer
        self.journal = journal
        self.tokenizer = tokenizer
        self.config = config
        self.run = run
        self.seed = seed
        self.max_error_rate = max_error_rate
        self.sampling = Sampling(config.max_tokens, config.temperature, tuple(config.stop))
        self.step = 0
        """The step that `next` samples for; the weights have this version."""
        self.begun: dict[str, _Begun] = {}
        """Groups by id that wait for completions."""
        self.scoring: dict[str, _Begun] = {}
        """Groups by id that wait for scores."""
        self.handed: list[Group] = []
        """Groups of the last `next`."""
        self.dropped: list[Ended] = []
        """Other groups that were sampled for it."""
        self.numbers: dict[str, float] = {}
        """What the step says of itself."""
        self.lock = threading.RLock()
        """Held by whoever uses this stream, its pool, scorer or journal, where another thread may too."""

    def next(self, count: int) -> list[Group]:
        """Groups of the next `count` prompts, sampled and scored, in the order of the prompts.

        With `rollout.resample_zero_groups` further prompts are taken for groups that teach nothing, in at most `max_resamples` rounds;
        if fewer than `count` teach then, those are the step. A prompt whose groups could not be scored within `rollout.max_resamples`
        is left out. Raises RunStopped if none is left or too many scores failed, EngineDead if engines keep dying.
        """
        now = _Step()
        slots = self._fresh(count)
        for attempts_left in range(self.config.max_resamples, -1, -1):
            if not slots:
                break
            self._round(slots, now)
            failed = [(slot, prompt) for slot, prompt in slots if slot.position not in now.groups]
            slots = [(Slot(slot.run, slot.position, slot.prompt_id, slot.nth + 1), prompt) for slot, prompt in failed]
            if self.config.resample_zero_groups and attempts_left:
                slots += self._fresh(self._put_aside(now))
        if not now.groups:
            raise RunStopped(
                f"step {self.step}: none of {count} groups got two scores, in {self.config.max_resamples + 1} attempts each; "
                f"{self.scorer.explain(now.scores)}"
            )
        if self.config.resample_zero_groups and any(map(teaches, now.groups.values())):
            self._put_aside(now)
        self.handed = [now.groups[position] for position in sorted(now.groups)]
        self.dropped = [now.dropped[slot] for slot in sorted(now.dropped)]
        self.numbers = self._count(now)
        return self.handed

    def _fresh(self, count: int) -> list[tuple[Slot, Prompt]]:
        """Slots of the next prompts."""
        return [(Slot(self.run, position, prompt.id), prompt) for position, prompt in self.prompts.take(count)]

    def _put_aside(self, now: _Step) -> int:
        """Dynamic sampling (arXiv:2503.14476, section 3.2): drops groups that teach nothing; other prompts take their places."""
        zero = {position: group for position, group in now.groups.items() if not teaches(group)}
        with self.journal.transaction():
            for position, group in zero.items():
                self._drop(position, group, ZERO_ADVANTAGE, now)
        now.groups = {position: group for position, group in now.groups.items() if position not in zero}
        return len(zero)

    def _drop(self, position: int, group: Group, reason: str, now: _Step) -> None:
        self.journal.use(group.id, self.step, reason)
        now.dropped[position, group.attempt] = Ended(group, reason)

    def end_step(self, taught: Mapping[str, Collection[int]]) -> list[Ended]:
        """Notes what the step did with the groups it was given; provisional until a checkpoint contains it.

        `taught`: groups that the learner trained on, by id, and the indices of the completions. Returns what became of all groups of
        the step, those that were handed over first.
        """
        handed = [_end(group, taught) for group in self.handed]
        with self.journal.transaction():
            for end in handed:
                self.journal.use(end.group.id, self.step, end.reason, end.taught)
        ended = handed + self.dropped
        counts = Counter(end.reason for end in ended)
        self.numbers |= {"groups/sampled": len(ended)} | {f"groups/{reason}": counts[reason] for reason in REASONS}
        self.handed, self.dropped = [], []
        self.step += 1
        return ended

    def state(self) -> dict[str, Any]:
        """Where the stream stands between two steps, as JSON for a checkpoint."""
        return {"position": self.prompts.position}

    def restore(self, step: int, state: Mapping[str, Any]) -> None:
        """Goes on before `step` from what a checkpoint holds; of an empty state, from the start."""
        self.step = step
        self.prompts.position = state.get("position", 0)

    @contextmanager
    def standing_still(self, version: int) -> Iterator[None]:
        """Engines can be updated to `version` within: they are idle between two steps."""
        yield

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """The pool and the scorer have nothing to do within, and can be used for something else."""
        yield

    def extras(self, group: Group) -> dict[str, list[Any]]:
        """What reward functions logged of a group's completions by `log_extra`, by column; once."""
        columns = self.scorer.extras(group.id)
        return {name: in_place(group.completions, values, lambda c: None) for name, values in columns.items()}

    def text(self, completion: Completion) -> str:
        """What the completion says, as reward functions and people read it."""
        return self.tokenizer.decode(completion.token_ids, skip_special_tokens=True)

    # --- one round: a group for each slot -----------------------------------------------------------------------------

    def _round(self, slots: Sequence[tuple[Slot, Prompt]], now: _Step) -> None:
        began = time.perf_counter()
        now.expected += len(slots) * self.config.group_size
        attempts = self.journal.begin([slot for slot, _ in slots], self.config.group_size, self.step, self.step)
        for attempt, (_, prompt) in zip(attempts, slots, strict=True):
            self._ask(_Begun(attempt, prompt), now)
        sampled = time.perf_counter()
        while self.begun or self.scoring:
            if self.begun:
                for completion in self.pool.poll(POLL_S):
                    self._arrived(completion)
                sampled = time.perf_counter()
            for key, scores in self.scorer.poll(0.0 if self.begun else POLL_S):
                self._judged(str(key), scores, now)
        now.rollout_s += sampled - began
        now.reward_s += time.perf_counter() - sampled  # what scoring takes beyond sampling, beside which it runs

    def _ask(self, group: _Begun, now: _Step) -> None:
        """Finds what the journal holds of a group and asks the pool for the rest."""
        group_id, size = group.attempt.group_id, group.attempt.size
        group.done = self.journal.completions(group_id)
        missing = [index for index in range(size) if index not in group.done]
        if missing:
            # An engine of whole groups is asked for all of it: its results may depend on the shape of the call.
            whole = self.pool.engines[0].whole_groups
            group.done = {} if whole else group.done
            self.begun[group_id] = group
            self.pool.submit([self._request(group, index) for index in (range(size) if whole else missing)])
            return
        held = self.journal.scores(group_id)
        if len(held) == size:
            self._scored(group, [held[index] for index in range(size)], self.journal.logged(group_id), now)
        else:
            self._score(group)

    def _request(self, group: _Begun, index: int) -> Request:
        attempt = group.attempt
        return Request(
            prompt_id=group.prompt.id,
            group_id=attempt.group_id,
            attempt=attempt.attempt,
            index=index,
            seed=completion_seed(self.seed, group.prompt.id, attempt.attempt, index),
            prompt_ids=group.prompt.token_ids,
            sampling=self.sampling,
            position=attempt.slot.position,
            prompt=group.prompt if self.config.conversation else None,
        )

    def _arrived(self, completion: Completion) -> None:
        group = self.begun[completion.group_id]
        group.done[completion.index] = completion
        if len(group.done) == group.attempt.size:
            del self.begun[completion.group_id]
            self.journal.put_completions([group.done[index] for index in sorted(group.done)])
            self._score(group)

    def _score(self, group: _Begun) -> None:
        self.scoring[group.attempt.group_id] = group
        completions = [group.done[index] for index in range(group.attempt.size)]
        self.scorer.submit(group.attempt.group_id, job_of(group.prompt, group.attempt.group_id, completions, self.text, self.step))

    def _judged(self, group_id: str, scores: Sequence[Score], now: _Step) -> None:
        group, logged = self.scoring.pop(group_id), self.scorer.logged(group_id)
        scores = in_place([group.done[index] for index in range(group.attempt.size)], scores, lambda c: c.failed)
        self.journal.put_scores(group_id, dict(enumerate(scores)), logged)
        self._scored(group, scores, logged, now)

    def _scored(self, begun: _Begun, scores: Sequence[Score], logged: Sequence[tuple[str, float]], now: _Step) -> None:
        now.scores.extend(scores)
        now.logged.extend(logged)
        self._check_errors(now)
        attempt = begun.attempt
        completions = tuple(begun.done[index] for index in range(attempt.size))
        now.tokens += sum(sampled_tokens(c) for c in completions)
        group = Group(attempt.group_id, begun.prompt, attempt.attempt, completions, tuple(scores))
        self._finished(attempt.slot, group, now)

    def _finished(self, slot: Slot, group: Group, now: _Step) -> None:
        """Takes a group that is sampled and scored."""
        if has_failed(group):
            self._drop(slot.position, group, FAILED, now)
        else:
            now.groups[slot.position] = group

    # --- what a step says of itself -----------------------------------------------------------------------------------

    def _check_errors(self, now: _Step) -> None:
        """Stops as soon as too many scores of the round have failed for certain: a function that hangs would take hours."""
        failed = sum(score.status in ("timeout", "error") for score in now.scores)
        if failed > self.max_error_rate * now.expected:
            raise RunStopped(
                f"step {self.step}: {failed} of {now.expected} scores failed already, more than rewards.max_error_rate "
                f"{self.max_error_rate:g} allows; {self.scorer.explain(now.scores)}"
            )

    def _count(self, now: _Step) -> dict[str, float]:
        numbers = means_of_logged(now.logged)  # first, so that no name given to `log_metric` hides one of ours
        numbers |= self.scorer.metrics() | group_metrics(self.handed) | self.pool.metrics()
        numbers |= length_bias(self.handed, now.tokens, len(now.scores))
        if self.config.conversation is not None:
            numbers |= turn_metrics([*self.handed, *(end.group for end in self.dropped)])
        return numbers | {
            "tokens/sampled": now.tokens,
            "time/rollout_s": now.rollout_s,
            "time/reward_s": now.reward_s,
        }


def has_failed(group: Group) -> bool:
    """Whether too few completions have a value for one to be better than another."""
    return sum(score.value is not None for score in group.scores) < 2


def sampled_tokens(completion: Completion) -> int:
    """Tokens that the policy wrote."""
    return int(completion.mask.sum())


def _end(group: Group, taught: Mapping[str, Collection[int]]) -> Ended:
    """What a step did with a group that it was given."""
    if group.id in taught:
        return Ended(group, TRAINED, taught[group.id])
    return Ended(group, TRUNCATED if teaches(group) else ZERO_ADVANTAGE)


class SharedStream:
    """The stream as every rank sees it: rank 0 has it, and hands its groups to the others."""

    def __init__(self, ranks: Ranks, stream: GroupStream | None):
        assert ranks.main == (stream is not None)
        self.ranks = ranks
        self._stream = stream

    @property
    def stream(self) -> GroupStream:
        """Rank 0's own."""
        assert self._stream is not None
        return self._stream

    def next(self, count: int) -> list[Group]:
        """`GroupStream.next` on rank 0, its groups on all; collective."""
        return self.ranks.groups(lambda: self.stream.next(count))


def job_of(prompt: Prompt, group_id: str, completions: Sequence[Completion], text: Callable[[Completion], str], step: int) -> ScoreJob:
    """What reward functions are told of a group: nothing of a completion whose conversation failed."""
    judged = [c for c in completions if c.failed is None]
    tools = any(c.mask.any() and not c.mask.all() for c in judged)
    masks = [c.mask for c in judged] if tools else None
    return ScoreJob.of(prompt, group_id, [text(c) for c in judged], [c.token_ids for c in judged], step, masks)


def in_place(completions: Sequence[Completion], judged: Sequence[Any], of_failed: Callable[[Completion], Any]) -> list[Any]:
    """What was said of those completions of a group that were judged, at their places among all."""
    said = iter(judged)
    return [next(said) if c.failed is None else of_failed(c) for c in completions]
