"""Evaluation: pass@1, pass@k and maj@k on held-out prompts, with intervals.

A completion is right if the judged part gives 1 or more. One that could not be scored is neither right nor wrong: it is left out and
counted. Completions of one prompt are not independent, so intervals are over prompts.

    n  scored completions of a prompt      c  right ones among them      k  completions one may choose from
"""

import math
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from transformers import PreTrainedTokenizerBase

from data.values import Completion, Prompt, Score, completion_seed
from rewards.answers import find_answer
from rewards.scorer import Scorer
from rl.conversation_pool import ConversationPool
from rl.engines.base import Request, Sampling
from rl.metrics import entropy_of, turns
from rl.pool import RolloutPool
from rl.stream import POLL_S, RunStopped, in_place, job_of

Z95 = 1.959964
"""Quantile of the normal distribution for 95 % intervals."""


@dataclass(frozen=True)
class Estimate:
    """A mean over prompts and half the width of its 95 % interval."""

    value: float
    half: float

    def __str__(self) -> str:
        return f"{100 * self.value:.1f} % ± {100 * self.half:.1f}"


@dataclass(frozen=True)
class Evaluation:
    """What one evaluation found."""

    prompts: int
    samples: int
    temperature: float
    pass_at: dict[int, Estimate]
    """By k = 1, 2, 4, … up to `samples`."""
    maj: Estimate
    """maj@samples: whether the most frequent answer is right; ties share."""
    mean_length: float
    """Tokens that the policy wrote."""
    turns: float | None
    """Stretches that the policy wrote; None where a completion is one turn."""
    entropy: float
    """Nats a token at the engine's temperature (of greedy: -log p of the chosen token)."""
    unscored: int
    """Completions without a verdict."""
    seconds: float
    right: dict[str, float]
    """Prompt id -> share of its completions that are right; where two policies answered the same prompts, for a paired comparison."""

    def metrics(self, prefix: str = "eval") -> dict[str, float]:
        numbers = {f"{prefix}/pass@{k}": e.value for k, e in self.pass_at.items()}
        if self.samples > 1:
            numbers |= {f"{prefix}/maj@{self.samples}": self.maj.value}
        if self.turns is not None:
            numbers |= {f"{prefix}/turns": self.turns}
        return numbers | {
            f"{prefix}/pass@1_ci95": self.pass_at[1].half,
            f"{prefix}/mean_length": self.mean_length,
            f"{prefix}/entropy": self.entropy,
            f"{prefix}/unscored": self.unscored,
            f"time/{prefix}_s": self.seconds,
        }


def pass_at_k(n: int, c: int, k: int) -> float:
    """Probability that one of k out of n completions is right, unbiased: 1 - C(n-c, k) / C(n, k); arXiv:2107.03374, eq. 1."""
    assert 0 <= c <= n and 1 <= k <= n
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def majority(answers: Sequence[str | None], right: Sequence[bool]) -> float:
    """Share of the most frequent answers that are right; no answer is an answer of its own, and never the majority if others are."""
    votes: dict[str, list[bool]] = defaultdict(list)
    for answer, is_right in zip(answers, right, strict=True):
        if answer is not None:
            votes["".join(answer.split())].append(is_right)
    if not votes:
        return 0.0
    most = max(map(len, votes.values()))
    return fmean(fmean(v) for v in votes.values() if len(v) == most)


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and 95 % interval from the spread over prompts."""
    half = Z95 * stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.inf
    return Estimate(fmean(values), half)


def evaluate(
    pool: RolloutPool,
    scorer: Scorer,
    prompts: Sequence[Prompt],
    tokenizer: PreTrainedTokenizerBase,
    sampling: Sampling,
    *,
    samples: int,
    part: str,
    label: str,
    seed: int,
) -> Evaluation:
    """Samples and scores every prompt; `label` sets its groups apart from others of the run. The pool has to be idle.

    Seeds depend on `seed`, prompt and index alone, so that evaluations of two policies share their random numbers.
    """
    began = time.perf_counter()
    several_turns = isinstance(pool, ConversationPool)
    done: dict[str, dict[int, Completion]] = {f"{label}/{prompt.id}": {} for prompt in prompts}
    by_group = {f"{label}/{prompt.id}": prompt for prompt in prompts}
    scores: dict[str, list[Score]] = {}

    def text(completion: Completion) -> str:
        return tokenizer.decode(completion.token_ids, skip_special_tokens=True)

    for position, prompt in enumerate(prompts):
        group_id = f"{label}/{prompt.id}"
        seen = prompt if several_turns else None
        pool.submit([
            Request(prompt.id, group_id, 0, i, completion_seed(seed, prompt.id, 0, i), prompt.token_ids, sampling, position, seen)
            for i in range(samples)
        ])  # fmt: skip
    with scorer.apart():
        while len(scores) < len(done):
            for completion in pool.poll(POLL_S) if pool.open else []:
                group = done[completion.group_id]
                group[completion.index] = completion
                if len(group) == samples:
                    rows = [group[i] for i in range(samples)]
                    scorer.submit(completion.group_id, job_of(by_group[completion.group_id], completion.group_id, rows, text, -1))
            for key, group_scores in scorer.poll(0.0 if pool.open else POLL_S):
                rows = [done[str(key)][i] for i in range(samples)]
                scores[str(key)] = in_place(rows, group_scores, lambda c: c.failed)
    seconds = time.perf_counter() - began
    return _summary(done, scores, by_group, text, sampling, samples, part, seconds, scorer.explain, several_turns)


def _summary(
    done: Mapping[str, Mapping[int, Completion]],
    scores: Mapping[str, Sequence[Score]],
    by_group: Mapping[str, Prompt],
    text: Callable[[Completion], str],
    sampling: Sampling,
    samples: int,
    part: str,
    seconds: float,
    explain: Callable[[Sequence[Score]], str],
    several_turns: bool,
) -> Evaluation:
    per_prompt: dict[int, list[float]] = defaultdict(list)
    votes = []
    shares: dict[str, float] = {}
    unscored = 0
    for group_id, group in done.items():
        verdicts = [(i, value) for i, s in enumerate(scores[group_id]) if (value := s.parts.get(part)) is not None]
        unscored += samples - len(verdicts)
        if not verdicts:
            continue
        right = [value >= 1.0 for _, value in verdicts]
        shares[by_group[group_id].id] = fmean(right)
        for k in _powers(samples):
            if k <= len(right):
                per_prompt[k].append(pass_at_k(len(right), sum(right), k))
        answers = [find_answer(text(group[i]), by_group[group_id].text) for i, _ in verdicts]
        votes.append(majority(answers, right))
    if not votes:
        all_scores = [score for group in scores.values() for score in group]
        raise RunStopped(f"evaluation: none of {len(all_scores)} completions got a verdict from '{part}'; {explain(all_scores)}")
    completions = [c for group in done.values() for c in group.values()]
    return Evaluation(
        prompts=len(done),
        samples=samples,
        temperature=sampling.temperature,
        pass_at={k: estimate(values) for k, values in per_prompt.items()},
        maj=estimate(votes),
        mean_length=fmean(int(c.mask.sum()) for c in completions),
        turns=fmean(map(turns, completions)) if several_turns else None,
        entropy=entropy_of(completions),
        unscored=unscored,
        seconds=seconds,
        right=shares,
    )


def _powers(samples: int) -> list[int]:
    """1, 2, 4, … and `samples` itself."""
    return sorted({*(1 << i for i in range(samples.bit_length()) if 1 << i <= samples), samples})
