"""The GroupStream: where prompts, pool, rewards and journal meet.

It asks the pool for completions, scores a group as soon as it is complete, asks again for what failed, and hands groups over in the
order of the prompts, whatever the order in which they got ready. Each stage of a group is written to the journal before the next
begins, so what the journal holds is never sampled or scored again: a resumed run walks the same way and finds its work done.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from data.journal import Attempt, Journal, Slot
from data.journal_sums import FAILED, TRAINED, ZERO_ADVANTAGE
from data.prompt_stream import PromptStream
from data.values import Completion, Group, Prompt, Score, completion_seed
from rewards.job import ScoreJob
from rewards.scorer import Scorer
from rl.config import RolloutConfig
from rl.engines.base import Request, Sampling
from rl.metrics import group_metrics, length_bias, teaches
from rl.pool import RolloutPool
from rl.ranks import Ranks

POLL_S = 0.05


class RunStopped(RuntimeError):
    """The run cannot go on in a way that means anything; the message says why and what to do. What there was is kept."""


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
    failed: int = 0
    """Groups with fewer than two values."""
    zero: int = 0
    """Groups that taught nothing and were dropped for others."""
    scores: list[Score] = field(default_factory=list)
    expected: int = 0
    """Scores that there will be when the groups asked for so far are scored."""
    tokens: int = 0
    """Completion tokens of all groups of the step, failed ones included."""
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
        self.handed: list[Group] = []
        """Groups of the last `next`."""
        self.numbers: dict[str, float] = {}

    def next(self, count: int) -> list[Group]:
        """Groups of the next `count` prompts, sampled and scored, in the order of the prompts.

        With `rollout.resample_zero_groups` further prompts are taken for groups that teach nothing, in at most `max_resamples` rounds;
        if fewer than `count` teach then, those are the step. A prompt whose groups could not be scored within `rollout.max_resamples`
        is left out. Raises RunStopped if none is left or too many scores failed, EngineDead if an engine died.
        """
        now = _Step()
        self.scorer.metrics()  # those of an evaluation since the last step
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
        self.numbers = self._count(now)
        return self.handed

    def _fresh(self, count: int) -> list[tuple[Slot, Prompt]]:
        """Slots of the next prompts."""
        return [(Slot(self.run, position, prompt.id), prompt) for position, prompt in self.prompts.take(count)]

    def _put_aside(self, now: _Step) -> int:
        """Dynamic sampling (arXiv:2503.14476, section 3.2): drops groups that teach nothing; other prompts take their places."""
        zero = {position: group for position, group in now.groups.items() if not teaches(group)}
        with self.journal.transaction():
            for group in zero.values():
                self.journal.use(group.id, self.step, ZERO_ADVANTAGE)
        now.zero += len(zero)
        now.groups = {position: group for position, group in now.groups.items() if position not in zero}
        return len(zero)

    def end_step(self) -> None:
        """Notes what the step did with the groups it was given; provisional until a checkpoint contains it."""
        with self.journal.transaction():
            for group in self.handed:
                self.journal.use(group.id, self.step, TRAINED if teaches(group) else ZERO_ADVANTAGE)
        self.handed = []
        self.step += 1

    def text(self, completion: Completion) -> str:
        """What the completion says, as reward functions and people read it."""
        return self.tokenizer.decode(completion.token_ids, skip_special_tokens=True)

    # --- one round: a group for each slot -----------------------------------------------------------------------------

    def _round(self, slots: Sequence[tuple[Slot, Prompt]], now: _Step) -> None:
        began = time.perf_counter()
        now.expected += len(slots) * self.config.group_size
        attempts = self.journal.begin([slot for slot, _ in slots], self.config.group_size, self.step, self.step)
        begun = {a.group_id: _Begun(a, prompt) for a, (_, prompt) in zip(attempts, slots, strict=True)}
        scoring: dict[str, _Begun] = {}
        for group in list(begun.values()):
            self._ask(group, begun, scoring, now)
        sampled = time.perf_counter()
        while begun or scoring:
            if begun:
                for completion in self.pool.poll(POLL_S):
                    self._arrived(completion, begun, scoring, now)
                sampled = time.perf_counter()
            for key, scores in self.scorer.poll(0.0 if begun else POLL_S):
                group_id = str(key)
                group = scoring.pop(group_id)
                self.journal.put_scores(group_id, dict(enumerate(scores)))
                self._scored(group, scores, now)
        now.rollout_s += sampled - began
        now.reward_s += time.perf_counter() - sampled  # what scoring takes beyond sampling, beside which it runs

    def _ask(self, group: _Begun, begun: dict[str, _Begun], scoring: dict[str, _Begun], now: _Step) -> None:
        """Finds what the journal holds of a group and asks the pool for the rest."""
        group_id, size = group.attempt.group_id, group.attempt.size
        group.done = self.journal.completions(group_id)
        missing = [index for index in range(size) if index not in group.done]
        if missing:
            # An engine of whole groups is asked for all of it: its results may depend on the shape of the call.
            whole = self.pool.engines[0].whole_groups
            group.done = {} if whole else group.done
            self.pool.submit([self._request(group, index) for index in (range(size) if whole else missing)])
            return
        del begun[group_id]
        held = self.journal.scores(group_id)
        if len(held) == size:
            self._scored(group, [held[index] for index in range(size)], now)
        else:
            self._score(group, scoring)

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
        )

    def _arrived(self, completion: Completion, begun: dict[str, _Begun], scoring: dict[str, _Begun], now: _Step) -> None:
        group = begun[completion.group_id]
        group.done[completion.index] = completion
        if len(group.done) == group.attempt.size:
            del begun[completion.group_id]
            self.journal.put_completions([group.done[index] for index in sorted(group.done)])
            self._score(group, scoring)

    def _score(self, group: _Begun, scoring: dict[str, _Begun]) -> None:
        scoring[group.attempt.group_id] = group
        completions = [group.done[index] for index in range(group.attempt.size)]
        self.scorer.submit(group.attempt.group_id, job_of(group.prompt, group.attempt.group_id, completions, self.text, self.step))

    def _scored(self, group: _Begun, scores: Sequence[Score], now: _Step) -> None:
        now.scores.extend(scores)
        self._check_errors(now)
        completions = tuple(group.done[index] for index in range(group.attempt.size))
        now.tokens += sum(len(c.token_ids) for c in completions)
        if sum(score.value is not None for score in scores) < 2:
            now.failed += 1
            self.journal.use(group.attempt.group_id, self.step, FAILED)
            return
        position = group.attempt.slot.position
        now.groups[position] = Group(group.attempt.group_id, group.prompt, group.attempt.attempt, completions, tuple(scores))

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
        handed = self.handed
        numbers = self.scorer.metrics()  # first, so that no name given to `log_metric` hides one of ours
        sampled = len(handed) + now.failed + now.zero
        numbers |= group_metrics(handed) | self.pool.metrics() | length_bias(handed, now.tokens, sampled * self.config.group_size)
        return numbers | {
            "groups/sampled": sampled,
            "groups/zero_advantage": sum(not teaches(group) for group in handed) + now.zero,
            "groups/failed": now.failed,
            "groups/stale": 0,
            "tokens/sampled": now.tokens,
            "time/rollout_s": now.rollout_s,
            "time/reward_s": now.reward_s,
        }


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
    """What reward functions are told of a group."""
    ids = [c.token_ids for c in completions]
    return ScoreJob.of(prompt, group_id, [text(c) for c in completions], ids, step)
