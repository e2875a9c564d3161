"""Log-probabilities and entropies of the predicted tokens, without ever holding a [T, V] tensor.

The output head is applied only where a token is predicted, in chunks; the backward pass computes each chunk's logits again. Both
numbers come from one pass over the logits, at the sampling temperature, in float32 or better.

    N  predicted tokens      D  hidden size      V  vocabulary
"""

import torch
from torch.utils.checkpoint import checkpoint

CHUNK_LOGITS = 1 << 24
"""Logits held at once: 64 MiB in float32."""


def _chunk(
    head: torch.nn.Module, hidden_ND: torch.Tensor, target_N: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    logits_NV = head(hidden_ND)
    logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32)) / temperature
    norm_N = logits_NV.logsumexp(-1)
    logp_N = logits_NV.gather(-1, target_N[:, None]).squeeze(-1) - norm_N
    with torch.no_grad():  # entropy is watched, never trained
        entropy_N = norm_N - (logits_NV.sub(norm_N[:, None]).exp() * logits_NV).sum(-1)
    return logp_N, entropy_N


def logp_and_entropy(
    head: torch.nn.Module, hidden_ND: torch.Tensor, target_N: torch.Tensor, temperature: float, vocabulary: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """logp_N of `target_N` and entropy_N (no gradient) of softmax(head(hidden) / temperature)."""
    size = max(1, CHUNK_LOGITS // vocabulary)
    logps, entropies = [], []
    for hidden, target in zip(hidden_ND.split(size), target_N.split(size), strict=True):
        if torch.is_grad_enabled():
            logp, entropy = checkpoint(_chunk, head, hidden, target, temperature, use_reentrant=False)
        else:
            logp, entropy = _chunk(head, hidden, target, temperature)
        logps.append(logp)
        entropies.append(entropy)
    return torch.cat(logps), torch.cat(entropies)
