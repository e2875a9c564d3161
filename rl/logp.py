"""Log-probabilities and entropies of the predicted tokens, without ever holding a [T, V] tensor.

The output head is applied only where a token is predicted, in chunks; the backward pass computes each chunk's logits again. Both
numbers come from one pass over the logits, at the sampling temperature, in float32 or better.

For a plain head the gradient is written out: with p = softmax(logits / t), d logp / d logits = (onehot - p) / t, so a chunk needs one
[rows, V] tensor in the backward, and what depends on the token alone is multiplied into [rows, D]. A head that is more than a matrix
(an adapter's, a sharded one) is left to autograd.

    N  predicted tokens      D  hidden size      V  vocabulary
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

CHUNK_LOGITS = 1 << 24
"""Most logits held at once: 64 MiB in float32."""
CACHED_LOGITS = 1 << 21
"""As many as still lie in a CPU's cache; a chunk has no more where that leaves it CHUNK_ROWS."""
CHUNK_ROWS = 128
"""Rows that a product needs to be fast."""


def logp_and_entropy(
    head: Callable[[torch.Tensor], torch.Tensor], hidden_ND: torch.Tensor, target_N: torch.Tensor, temperature: float, vocabulary: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """logp_N of `target_N` and entropy_N (no gradient) of softmax(head(hidden) / temperature)."""
    rows = max(1, min(max(CHUNK_ROWS, CACHED_LOGITS // vocabulary), CHUNK_LOGITS // vocabulary))
    if type(head) is torch.nn.Linear and not isinstance(head.weight, DTensor):
        return _PlainHead.apply(hidden_ND, head.weight, head.bias, target_N, temperature, rows)
    logps, entropies = [], []
    for hidden, target in zip(hidden_ND.split(rows), target_N.split(rows), strict=True):
        if torch.is_grad_enabled():
            logp, entropy = checkpoint(_any_head, head, hidden, target, temperature, use_reentrant=False)
        else:
            logp, entropy = _any_head(head, hidden, target, temperature)
        logps.append(logp)
        entropies.append(entropy)
    return torch.cat(logps), torch.cat(entropies)


def _any_head(
    head: Callable[[torch.Tensor], torch.Tensor], hidden_ND: torch.Tensor, target_N: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    logits_NV = head(hidden_ND)
    logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32)) / temperature
    norm_N = logits_NV.logsumexp(-1)
    logp_N = logits_NV.gather(-1, target_N[:, None]).squeeze(-1) - norm_N
    with torch.no_grad():  # entropy is watched, never trained
        entropy_N = norm_N - (logits_NV.sub(norm_N[:, None]).exp() * logits_NV).sum(-1)
    return logp_N, entropy_N


class _PlainHead(torch.autograd.Function):
    """logits = hidden W^T + bias, all in the type of the weights, from there on in float32 or better."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: torch.Tensor,
        weight_VD: torch.Tensor,
        bias_V: torch.Tensor | None,
        target_N: torch.Tensor,
        temperature: float,
        rows: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        kind = torch.promote_types(hidden_ND.dtype, torch.float32)
        logp_N, entropy_N, norm_N = (torch.empty(len(target_N), dtype=kind, device=target_N.device) for _ in range(3))
        for n, logits_nV in _logits(hidden_ND, weight_VD, bias_V, temperature, rows):
            largest_n1 = logits_nV.amax(-1, keepdim=True)
            logits_nV.sub_(largest_n1)
            p_nV = logits_nV.exp()
            sum_n = p_nV.sum(-1)
            logp_N[n] = logits_nV.gather(-1, target_N[n, None]).squeeze(-1) - sum_n.log()
            # H = log(sum) - sum p logit; a product of rows, because p * logits would be one more [n, V]
            entropy_N[n] = sum_n.log() - torch.bmm(p_nV[:, None], logits_nV[:, :, None]).flatten() / sum_n
            norm_N[n] = sum_n.log() + largest_n1.squeeze(-1)
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, target_N, norm_N)
        ctx.temperature, ctx.rows = temperature, rows
        ctx.mark_non_differentiable(entropy_N)
        return logp_N, entropy_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden_ND, weight_VD, bias_V, target_N, norm_N = ctx.saved_tensors
        factor_N1 = (-grad_N / ctx.temperature)[:, None]
        of_hidden, of_weight, of_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden_ND) if of_hidden else None
        # Chunks add up in float32 also where the weights are in bf16.
        grad_weight = torch.zeros_like(weight_VD, dtype=norm_N.dtype) if of_weight else None
        grad_bias = torch.zeros_like(bias_V, dtype=norm_N.dtype) if of_bias else None
        for n, p_nV in _logits(hidden_ND, weight_VD, bias_V, ctx.temperature, ctx.rows):
            p_nV.sub_(norm_N[n, None]).exp_()
            # p - onehot while p is still in float32: in bf16 the difference would be lost where p is near 1.
            p_nV.scatter_add_(1, target_N[n, None], p_nV.new_full((1, 1), -1.0).expand(len(p_nV), 1))
            d_nV = p_nV.to(weight_VD.dtype)
            if grad_hidden is not None:
                grad_hidden[n] = (d_nV @ weight_VD) * factor_N1[n]
            if grad_weight is not None:
                scaled_nD = (hidden_ND[n] * factor_N1[n]).to(weight_VD.dtype)
                if grad_weight.dtype == weight_VD.dtype:
                    grad_weight.addmm_(d_nV.T, scaled_nD)
                else:
                    grad_weight += d_nV.T @ scaled_nD
            if grad_bias is not None:
                grad_bias += (p_nV * factor_N1[n]).sum(0)
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight_VD.dtype),
            None if grad_bias is None else grad_bias.to(weight_VD.dtype),
            None, None, None,
        )  # fmt: skip


def _logits(
    hidden_ND: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor | None, temperature: float, rows: int
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Rows and logits / temperature, chunk by chunk; the caller may overwrite them."""
    for begin in range(0, len(hidden_ND), rows):
        n = slice(begin, begin + rows)
        logits_nV = torch.nn.functional.linear(hidden_ND[n].to(weight_VD.dtype), weight_VD, bias_V)
        logits_nV = logits_nV.to(torch.promote_types(logits_nV.dtype, torch.float32))
        yield n, logits_nV if temperature == 1.0 else logits_nV.div_(temperature)
