"""The losses, each as its paper writes it, on the predicted tokens of a flat batch.

All have the form  loss = sum over tokens of  weight * (policy term + kl_coef * KL).  `token_weight` says how a token counts,
`policy_term` what it says; micro-batches and ranks simply add up, because the weights come from counts over the whole step.

    grpo      arXiv:2402.03300, eq. 3: each completion's mean, then the mean over completions
    dr_grpo   arXiv:2503.20783, eq. 2: a constant in place of the completion's length
    dapo      arXiv:2503.14476, eq. 8: the mean over all tokens, clip-higher
    gspo      arXiv:2507.18071, eq. 5: one ratio a completion, the geometric mean of its tokens'
    cispo     arXiv:2506.13585, eq. 4: the clipped ratio is a constant weight on log p, so no token loses its gradient

    N  predicted tokens      B  completions
"""

from dataclasses import dataclass

import torch

from rl.batch import TrainBatch
from rl.config import LossConfig


@dataclass(frozen=True)
class LossParts:
    """A loss and what is watched of it, by token; all but `loss` without gradient."""

    loss: torch.Tensor
    ratio_N: torch.Tensor
    clipped_low_N: torch.Tensor
    clipped_high_N: torch.Tensor
    kl_N: torch.Tensor | None
    correction_N: torch.Tensor


def sum_by_completion(x_N: torch.Tensor, batch: TrainBatch) -> torch.Tensor:
    """[N] -> [B]."""
    return x_N.new_zeros(batch.completions).index_add(0, batch.completion_N, x_N)


def token_weight(batch: TrainBatch, kind: str) -> torch.Tensor:
    """weight_N: the share of each token in the loss; float64, the sum over a whole step is at most 1."""
    if kind in ("grpo", "gspo"):
        return (1.0 / (batch.length_B * batch.normaliser.completions))[batch.completion_N]
    if kind == "dr_grpo":
        weight = 1.0 / (batch.normaliser.completions * batch.max_tokens)
    else:
        weight = 1.0 / batch.normaliser.tokens
    return torch.full_like(batch.completion_N, weight, dtype=torch.float64)


def kl_estimate(logp_N: torch.Tensor, ref_logp_N: torch.Tensor, kind: str) -> torch.Tensor:
    """KL(policy || reference) by token from samples of the policy (Schulman 2020, "Approximating KL Divergence")."""
    log_ratio_N = ref_logp_N - logp_N
    if kind == "k1":
        return -log_ratio_N
    if kind == "k2":
        return log_ratio_N.square() / 2
    return log_ratio_N.exp() - log_ratio_N - 1  # k3: unbiased and non-negative; arXiv:2402.03300, eq. 4


def correction(batch: TrainBatch, old_logp_N: torch.Tensor, config: LossConfig) -> torch.Tensor:
    """Weight of each token for having been sampled by the engine and not by the learner; no gradient.

    token: min(pi_old / pi_engine, max), truncated importance sampling (Ionides 2008; the default of verl and of trl's token mode).
    sequence: the completion's ratio, 0 where it lies outside [1/max, max]. geometric: the same mask on the geometric mean of its
    ratios, with truncated token weights inside.
    """
    if config.correction == "none" or config.ratio_base == "engine":
        return torch.ones_like(old_logp_N)
    log_ratio_N = (old_logp_N - batch.engine_logp_N).detach()
    token_N = log_ratio_N.exp().clamp(max=config.correction_max)
    if config.correction == "token":
        return token_N
    total_B = sum_by_completion(log_ratio_N, batch)
    bound = torch.tensor(config.correction_max, dtype=total_B.dtype).log()
    if config.correction == "sequence":
        return torch.where(total_B.abs() <= bound, total_B.exp(), 0.0)[batch.completion_N]
    mean_B = total_B / batch.length_B.to(total_B.dtype)
    return torch.where((mean_B.abs() <= bound)[batch.completion_N], token_N, 0.0)


def policy_loss(
    batch: TrainBatch,
    logp_N: torch.Tensor,
    old_logp_N: torch.Tensor | None,
    config: LossConfig,
    ref_logp_N: torch.Tensor | None = None,
) -> LossParts:
    """The loss of one batch; `old_logp_N` None means the current pass's own (on-policy: the ratio is 1, its gradient is not)."""
    if config.ratio_base == "engine":
        old_logp_N = batch.engine_logp_N.to(logp_N.dtype)
    old_logp_N = logp_N.detach() if old_logp_N is None else old_logp_N
    adv_N = batch.adv_B.to(logp_N.dtype)[batch.completion_N]

    log_ratio_N = logp_N - old_logp_N
    if config.kind == "gspo":  # arXiv:2507.18071, eq. 7: s_i = exp(mean over t of log ratio)
        length_B = batch.length_B.to(logp_N.dtype)
        log_ratio_N = (sum_by_completion(log_ratio_N, batch) / length_B)[batch.completion_N]
    ratio_N = log_ratio_N.exp()

    low, high = 1.0 - config.clip_low, 1.0 + config.clip_high
    if config.kind == "cispo":
        term_N = -ratio_N.detach().clamp(max=high) * adv_N * logp_N
    else:
        term_N = -torch.minimum(ratio_N * adv_N, ratio_N.clamp(low, high) * adv_N)

    correction_N = correction(batch, old_logp_N, config)
    term_N = term_N * correction_N
    kl_N = None
    if config.kl_coef > 0.0:
        assert ref_logp_N is not None, "a KL term needs the reference's log-probs"
        kl_N = kl_estimate(logp_N, ref_logp_N, config.kl)
        term_N = term_N + config.kl_coef * kl_N

    weight_N = token_weight(batch, config.kind).to(logp_N.dtype)
    return LossParts(
        loss=(weight_N * term_N).sum(),
        ratio_N=ratio_N.detach(),
        clipped_low_N=(ratio_N.detach() < low) & (adv_N < 0),
        clipped_high_N=(ratio_N.detach() > high) & (adv_N > 0),
        kl_N=None if kl_N is None else kl_N.detach(),
        correction_N=correction_N,
    )
