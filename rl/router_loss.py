"""Losses that balance the load of experts, on the logits that a pass's routers gave.

Both are sums over what was forwarded: a shared prompt's tokens count once for each of its completions, so the shared and the
unshared computation are one number. How often an expert was chosen has no gradient; the scores have.

`aux_loss` is transformers' `load_balancing_loss_func` (arXiv:2101.03961, equations 4 to 6), which pools all layers:

    E * sum_e f_e P_e        f_e = choices of expert e / rows        P_e = sum of its probabilities / rows        rows = L * tokens

f is that of the whole optimizer step, so passes and ranks change nothing (the global batch of arXiv:2501.11873): what a pass adds is
linear in its own probabilities once f is known. `sequence_loss` is DeepSeek-V3's complementary one (arXiv:2412.19437, equations 17
to 20), of one layer, over each prompt with its completion.

    T  tokens      E  experts      K  experts a token      L  MoE layers      S  segments      B  completions
"""

from collections.abc import Sequence

import torch

from rl.batch import TrainBatch


def load_of_logits(logits: Sequence[torch.Tensor], count_T: torch.Tensor, top_k: int) -> tuple[torch.Tensor, float]:
    """float64 [E], choices of each expert over all layers' logits [T, E], and rows: the layers times the tokens."""
    times_TK = count_T.double().repeat_interleave(top_k)
    loads = [torch.bincount(_top(x, top_k).flatten(), times_TK, minlength=x.shape[1]) for x in logits]
    return torch.stack(loads).sum(0), float(count_T.sum()) * len(logits)


def aux_loss(logits: Sequence[torch.Tensor], count_T: torch.Tensor, load_E: torch.Tensor, rows: float) -> torch.Tensor:
    """A pass's share of the loss of an optimizer step whose whole load is `load_E` over `rows`; 0 where nothing counts in all of it."""
    if not rows:
        return sum((0.0 * x.sum() for x in logits), start=torch.zeros((), device=load_E.device))
    weighted_E = sum((count_T.to(p.dtype) @ p for p in map(_probabilities, logits)), start=torch.zeros((), device=load_E.device))
    return len(load_E) * (load_E / rows).to(weighted_E.dtype) @ weighted_E / rows


def sequence_loss(logits_TE: torch.Tensor, top_k: int, batch: TrainBatch) -> torch.Tensor:
    """One layer's share of a pass: the sum over its completions, over the completions of the whole optimizer step."""
    experts = logits_TE.shape[1]
    score_TE = logits_TE.to(torch.promote_types(logits_TE.dtype, torch.float32)).sigmoid()
    chosen_TE = torch.zeros_like(score_TE).scatter_(1, _top(score_TE, top_k), 1.0)  # eq. 18: by score, without bias or groups
    sums = []
    own, prompt = (torch.tensor(list(s), dtype=torch.int64, device=logits_TE.device) for s in (batch.segment_of_B, batch.prompt_of_B))
    for x_TE in (chosen_TE, score_TE / score_TE.sum(-1, keepdim=True)):  # eq. 19: s' = s / sum of s
        x_SE = x_TE.new_zeros(len(batch.bounds_S), experts).index_add(0, batch.segment_T, x_TE)
        sums.append(x_SE[own] + x_SE[prompt])
    sizes_S = torch.tensor([end - begin for begin, end in batch.bounds_S], dtype=score_TE.dtype, device=logits_TE.device)
    length_B1 = (sizes_S[own] + sizes_S[prompt])[:, None]
    f_BE = sums[0] * experts / (top_k * length_B1)
    p_BE = sums[1] / length_B1  # eq. 20
    return (f_BE * p_BE).sum() / batch.normaliser.completions  # eq. 17


def _probabilities(logits_TE: torch.Tensor) -> torch.Tensor:
    return logits_TE.softmax(-1, dtype=torch.promote_types(logits_TE.dtype, torch.float32))


def _top(x_TE: torch.Tensor, top_k: int) -> torch.Tensor:
    return x_TE.detach().topk(top_k, dim=-1).indices
