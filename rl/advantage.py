"""Each completion against its own group; no critic.

The group's other completions say what was to be expected of the prompt, so a value model is not needed (arXiv:2402.03300, section
4.1.2). Only scores that are `ok` enter a mean; a completion whose score failed gets no advantage and is not trained on.

    P  prompts a step      G  group size
"""

from collections.abc import Sequence

import torch

from data.values import Group
from rl.config import AdvantageConfig


def rewards_of(groups: Sequence[Group]) -> torch.Tensor:
    """rewards_PG in float64; NaN where a completion has no value. Groups have equal size."""
    nan = float("nan")
    return torch.tensor([[nan if s.value is None else s.value for s in group.scores] for group in groups], dtype=torch.float64)


def advantage(rewards_PG: torch.Tensor, config: AdvantageConfig) -> torch.Tensor:
    """Advantages_PG in float64 from rewards_PG, NaN where a reward is NaN.

    baseline mean and scale group: A_i = (r_i - mean(r)) / std(r), arXiv:2402.03300, section 4.1.2. scale none: Dr. GRPO,
    arXiv:2503.20783, eq. 2. leave_one_out: r_i - mean of the others = G/(G-1) (r_i - mean(r)), RLOO, arXiv:2402.14740, eq. 8.
    Groups of equal rewards get exactly 0.
    """
    count_P1 = (~rewards_PG.isnan()).sum(-1, keepdim=True)
    mean_P1 = rewards_PG.nanmean(-1, keepdim=True)
    advantages_PG = rewards_PG - mean_P1
    if config.baseline == "leave_one_out":
        advantages_PG = advantages_PG * count_P1 / (count_P1 - 1)
    if config.scale == "group":
        variance_P1 = (rewards_PG - mean_P1).square().nansum(-1, keepdim=True) / (count_P1 - config.ddof)
        advantages_PG = advantages_PG / (variance_P1.sqrt() + config.eps)
    if config.scale == "batch":
        variance = (rewards_PG - rewards_PG.nanmean()).square().nansum() / (count_P1.sum() - config.ddof)
        advantages_PG = advantages_PG / (variance.sqrt() + config.eps)
    # The mean of equal floats can round to another float, and eps may be 0; what is equal shall teach nothing at all.
    lowest_P1 = rewards_PG.nan_to_num(nan=torch.inf).amin(-1, keepdim=True)
    highest_P1 = rewards_PG.nan_to_num(nan=-torch.inf).amax(-1, keepdim=True)
    return torch.where((lowest_P1 == highest_P1) & ~rewards_PG.isnan(), 0.0, advantages_PG)


def group_advantage(groups: Sequence[Group], config: AdvantageConfig) -> torch.Tensor:
    """Advantages_PG of scored groups (float64, CPU); 0 for a completion without a value, which the learner masks out."""
    assert all(sum(s.value is not None for s in g.scores) >= 2 for g in groups), "a group with fewer than two values"
    return advantage(rewards_of(groups), config).nan_to_num(nan=0.0)
