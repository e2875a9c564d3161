"""The numbers of a step that come from its groups, under trl's names where the meaning is the same."""

from collections.abc import Mapping, Sequence
from statistics import fmean, pstdev

import numpy as np

from data.values import Completion, Group


def teaches(group: Group) -> bool:
    """Whether a group has two values that differ; with equal ones every advantage is 0."""
    values = [s.value for s in group.scores if s.value is not None]
    return len(values) >= 2 and min(values) < max(values)


def group_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Reward, length and agreement of the groups that a step hands to the learner."""
    values = [s.value for g in groups for s in g.scores if s.value is not None]
    stds = [pstdev(v) for g in groups if len(v := [s.value for s in g.scores if s.value is not None]) >= 2]
    completions = [c for g in groups for c in g.completions]
    lengths = [int(c.mask.sum()) for c in completions]  # what the policy wrote, as trl counts it
    numbers = {
        "reward": fmean(values),
        "reward_std": fmean(stds),
        "frac_reward_zero_std": 1.0 - sum(map(teaches, groups)) / len(groups),
        "completions/mean_length": fmean(lengths),
        "completions/max_length": float(max(lengths)),
        "completions/clipped_ratio": fmean(float(c.finish_reason == "length") for c in completions),
        "sampling/entropy": entropy_of(completions),
    }
    if drafted := sum(c.drafted for c in completions):
        numbers["sampling/draft_acceptance"] = sum(c.drafts_kept for c in completions) / drafted
    return numbers | part_means(groups)


def length_bias(groups: Sequence[Group], tokens: int, completions: int) -> dict[str, float]:
    """Whether what is trained is longer or shorter than what was sampled: the ratio of mean lengths, 1 where they are alike.

    groups: those handed to the learner; those that teach count. tokens, completions: of all that the step sampled, failed groups and
    those put aside included. Long completions are what timeouts and dead engines lose first, and a policy learns from what is left.
    """
    lengths = [int(c.mask.sum()) for group in groups if teaches(group) for c in group.completions]
    return {"completions/length_bias": fmean(lengths) * completions / tokens} if lengths and tokens else {}


def turns(completion: Completion) -> int:
    """Stretches that the policy wrote, with a tool's output between two of them."""
    edges = np.diff(completion.mask.astype(np.int8), prepend=0)
    return int((edges == 1).sum())


def turn_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """What conversations were like, and how many failed; of all groups that a step sampled."""
    completions = [c for g in groups for c in g.completions]
    return {
        "conversation/turns": fmean(map(turns, completions)),
        "conversation/tool_tokens": fmean(len(c.token_ids) - int(c.mask.sum()) for c in completions),
        "conversation/failed": sum(c.failed is not None for c in completions),
    }


def part_means(groups: Sequence[Group]) -> dict[str, float]:
    """`rewards/<name>/mean` of each part, over the completions it could judge."""
    names = dict.fromkeys(name for g in groups for s in g.scores for name in s.parts)
    means = {}
    for name in names:
        values = [v for g in groups for s in g.scores if (v := s.parts.get(name)) is not None]
        if values:
            means[f"rewards/{name}/mean"] = fmean(values)
    return means


def entropy_of(completions: Sequence[Completion]) -> float:
    """Nats a token: the mean of -log p over sampled tokens, an unbiased estimate of the engine's entropy at its temperature."""
    tokens = sum(int(c.mask.sum()) for c in completions)
    return float(-sum(float(c.engine_logp[c.mask.astype(bool)].sum()) for c in completions) / max(1, tokens))


def without_times(row: Mapping[str, object]) -> dict[str, object]:
    """A row of metrics.jsonl as runs are compared: without `time/*`."""
    return {name: value for name, value in row.items() if not name.startswith("time/")}
