"""How far the engine that sampled is from the learner at the start of the step, token by token.

    log_ratio = old_logp - engine_logp        of every trained token, in float64

Two causes are told apart by the version of the weights that wrote a token. Where it is the one being trained (`current`), both sides
had the same weights and what is left is precision: kernels, types, flipped experts. Where it is older (`older`), staleness comes on
top. Quantiles come from a histogram that is fine where ratios are near 1, so that ranks add up and no token is kept.
"""

import math

import torch

HALF = 2048
"""Bins on each side of 0."""
FINE = 1e-6
"""Log-ratios far below this share a bin; above it a bin is WIDTH of its value wide."""
LARGEST = 50.0
"""Log-ratios beyond it are counted in the last bin."""
WIDTH = math.asinh(LARGEST / FINE) / HALF
"""0.9 %."""
QUANTILES = (0.01, 0.1, 0.5, 0.9, 0.99)


class Mismatch:
    """Sums of a step; `packed` is what ranks add up, `mismatch_numbers` what becomes of it."""

    def __init__(self) -> None:
        self.packed = torch.zeros(6 + 2 * HALF + 1, dtype=torch.float64)
        """Tokens, sum of |log_ratio| and sum of k3, of current and then of older tokens; the histogram."""

    def add(self, old_logp_N: torch.Tensor, engine_logp_N: torch.Tensor, is_older_N: torch.Tensor) -> None:
        """Adds a pass: log-probs of both sides, and which tokens older weights wrote (bool)."""
        ratio_N = old_logp_N.double() - engine_logp_N.double()
        # k3 of KL(engine || learner) over tokens that the engine sampled; float64, because it is a difference of near equals.
        what_N3 = torch.stack([torch.ones_like(ratio_N), ratio_N.abs(), ratio_N.exp() - ratio_N - 1], dim=1)
        self.packed[:3] += what_N3[~is_older_N].sum(0).cpu()
        self.packed[3:6] += what_N3[is_older_N].sum(0).cpu()
        place_N = (torch.asinh(ratio_N.clamp(-LARGEST, LARGEST) / FINE) / WIDTH).round().long() + HALF
        self.packed[6:] += torch.bincount(place_N, minlength=2 * HALF + 1).cpu()


def mismatch_numbers(packed: torch.Tensor) -> dict[str, float]:
    """Means over tokens and quantiles of the ratio exp(log_ratio); none without a token."""
    (current, *sums), (older, *older_sums) = packed[:3].tolist(), packed[3:6].tolist()
    tokens = current + older
    if not tokens:
        return {}
    numbers = {
        "sampling/sampling_logp_difference/mean": (sums[0] + older_sums[0]) / tokens,
        "mismatch/kl": (sums[1] + older_sums[1]) / tokens,
        "mismatch/older_tokens": older / tokens,
    }
    for name, count, (difference, kl) in (("current", current, sums), ("older", older, older_sums)):
        if count:
            numbers |= {f"mismatch/{name}/logp_difference": difference / count, f"mismatch/{name}/kl": kl / count}
    below = packed[6:].cumsum(0)
    for q in QUANTILES:
        place = int(torch.searchsorted(below, q * tokens))
        numbers[f"mismatch/ratio_p{100 * q:02.0f}"] = math.exp(FINE * math.sinh((place - HALF) * WIDTH))
    return numbers
