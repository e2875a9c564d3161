"""What is watched of the learner, step by step, under trl's names where the meaning is the same.

Sums are collected over passes and ranks and become means over trained tokens once a step, so that the numbers do not depend on how a
step was cut. What compares the engine with the learner is in `rl/mismatch.py`.

    N  predicted tokens      P  prompts a step      G  group size
"""

from collections.abc import Sequence

import torch

from data.values import Group
from rl.batch import Item, TrainBatch, trained
from rl.loss import LossParts
from rl.mismatch import Mismatch, mismatch_numbers
from rl.ranks import Ranks

SUMS = ("loss", "tokens", "entropy", "ratio", "low", "high", "kl", "correction")


class Watch:
    """Collects a step's numbers; `collect` gives them and starts anew."""

    def __init__(self, ranks: Ranks):
        self.ranks = ranks
        self.taught: dict[str, tuple[int, ...]] = {}
        """What the last step trained on: groups by id, and the indices of the completions that entered the loss."""
        self._reset()

    def _reset(self) -> None:
        self.sums = dict.fromkeys(SUMS, 0.0)
        self.mismatch = Mismatch()
        self.version = 0
        self.largest_difference = 0.0
        self.updates = 0
        self.grad_norm = 0.0
        self.rate = 0.0
        self.counts: dict[str, float] = {}

    def begin(self, groups: Sequence[Group], work: Sequence[Sequence[Item]], mask_truncated: bool, version: int) -> None:
        """Counts what a step has and what of it teaches, the same on all ranks; `version`: of the weights before its first update."""
        self.version = version
        candidates = [
            (c, s) for g in groups for c, s in zip(g.completions, g.scores, strict=True)
            if trained(c, s.value is not None, mask_truncated)
        ]  # fmt: skip
        # With a KL term groups of zero advantage are forwarded as well; they keep to the reference and teach nothing.
        teaching = [items for items in work if any(item.advantage != 0.0 for item in items)]
        self.taught = {groups[items[0].group].id: tuple(item.completion.index for item in items) for items in teaching}
        trained_tokens = sum(int(item.completion.mask.sum()) for items in teaching for item in items)
        self.counts = {
            "groups/trained": len(teaching),
            "tokens/trained": trained_tokens,
            "completions/masked_ratio": 1.0 - len(candidates) / max(1, sum(len(g.completions) for g in groups)),
        }

    def batch(self, batch: TrainBatch, parts: LossParts, logp_N: torch.Tensor, entropy_N: torch.Tensor) -> None:
        """Adds one pass."""
        self._compare(batch, logp_N)
        for name, value in (
            ("loss", parts.loss.detach()),
            ("entropy", entropy_N.sum()),
            ("ratio", parts.ratio_N.sum()),
            ("low", parts.clipped_low_N.sum()),
            ("high", parts.clipped_high_N.sum()),
            ("correction", parts.correction_N.sum()),
        ):
            self.sums[name] += float(value)
        if parts.kl_N is not None:
            self.sums["kl"] += float(parts.kl_N.sum())
        self.sums["tokens"] += float(len(logp_N))

    def _compare(self, batch: TrainBatch, logp_N: torch.Tensor) -> None:
        """Engine against learner, as far as a pass knows the learner before its first update."""
        if batch.old_logp_N is None and self.updates > 0:
            return
        old_logp_N = logp_N if batch.old_logp_N is None else batch.old_logp_N
        self.mismatch.add(old_logp_N, batch.engine_logp_N, batch.version_N < self.version)
        if len(logp_N):
            self.largest_difference = max(self.largest_difference, float((old_logp_N - batch.engine_logp_N).abs().max()))

    def update(self, grad_norm: float, rate: float) -> None:
        """Adds one optimizer step."""
        self.updates += 1
        self.grad_norm += grad_norm
        self.rate = rate

    def collect(self, with_kl: bool) -> dict[str, float]:
        """The step's numbers, equal on all ranks; collective."""
        sums = torch.tensor([self.sums[name] for name in SUMS], dtype=torch.float64)
        packed = self.ranks.sum(torch.cat([sums, self.mismatch.packed]).to(self.ranks.device)).cpu()
        total = dict(zip(SUMS, packed[: len(SUMS)].tolist(), strict=True))
        largest = self.ranks.largest(self.largest_difference)
        updates = max(1, self.updates)
        numbers = {
            "loss": total["loss"] / updates,
            "grad_norm": self.grad_norm / updates,
            "learning_rate": self.rate,
            **self.counts,
        }
        if tokens := total["tokens"]:  # a step that trains on nothing has no means over what it trained on
            low, high = total["low"] / tokens, total["high"] / tokens
            numbers |= {
                "entropy": total["entropy"] / tokens,
                "clip_ratio/low_mean": low,
                "clip_ratio/high_mean": high,
                "clip_ratio/region_mean": low + high,
                "ratio/mean": total["ratio"] / tokens,
                "sampling/importance_sampling_ratio/mean": total["correction"] / tokens,
                "sampling/sampling_logp_difference/max": largest,
            }
            numbers |= mismatch_numbers(packed[len(SUMS) :])
            if with_kl:
                numbers["kl"] = total["kl"] / tokens
        self._reset()
        return numbers
