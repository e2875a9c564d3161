"""Attention over a flat batch: a completion sees its prompt and itself, and nothing else.

One function in transformers' attention registry, under the name in `NAME`; the layout of the batch reaches it as the keyword
`cohort`, which transformers hands through every layer. No mask of the whole row exists: for each prompt one causal product, and
for each completion one over the keys of its prompt and its own. Autograd adds up what the completions say of their prompt's keys
and values. It serves grouped-query attention and MLA (whose keys are wider than its values) alike.

SDPA's own `is_causal` is aligned to the top left, which is wrong where keys are longer than queries; the mask here is explicit.
"""

from dataclasses import dataclass

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from rl.batch import TrainBatch

NAME = "cohort"


@dataclass(frozen=True)
class Layout:
    """Which rows of a flat batch attend to which."""

    prompts: tuple[tuple[int, int], ...]
    """[begin, end) of each prompt."""
    completions: tuple[tuple[int, int, int, int], ...]
    """[begin, end) of each completion, and of its prompt."""


def layout_of(batch: TrainBatch) -> Layout:
    completions = set(batch.segment_of_B)
    return Layout(
        prompts=tuple(bounds for s, bounds in enumerate(batch.bounds_S) if s not in completions),
        completions=tuple(
            (*batch.bounds_S[s], *batch.bounds_S[p]) for s, p in zip(batch.segment_of_B, batch.prompt_of_B, strict=True)
        ),
    )


def segment_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    cohort: Layout,
    sliding_window: int | None = None,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """query [1, H, T, d], key [1, Hkv, T, d], value [1, Hkv, T, dv] -> [1, T, H, dv].

    Raises ValueError for a sliding window shorter than the batch needs: a window over a shared prompt is not there yet.
    """
    assert attention_mask is None and dropout == 0.0, "a flat batch has no padding mask, and RL trains without dropout"
    longest = max((end - begin + p_end - p_begin for begin, end, p_begin, p_end in cohort.completions), default=0)
    if sliding_window is not None and longest > sliding_window:
        raise ValueError(f"prompt and completion have {longest} tokens, the model's sliding window is {sliding_window}")
    gqa = query.shape[1] != key.shape[1]
    parts: list[tuple[int, torch.Tensor]] = []
    for begin, end in cohort.prompts:
        q, k, v = (x[:, :, begin:end] for x in (query, key, value))
        parts.append((begin, scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=gqa)))
    for begin, end, p_begin, p_end in cohort.completions:
        if begin == end:
            continue  # a completion of one token forwards nothing
        q = query[:, :, begin:end]
        k = torch.cat([key[:, :, p_begin:p_end], key[:, :, begin:end]], dim=2)
        v = torch.cat([value[:, :, p_begin:p_end], value[:, :, begin:end]], dim=2)
        seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril_(k.shape[2] - q.shape[2])
        parts.append((begin, scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scaling, enable_gqa=gqa)))
    parts.sort(key=lambda part: part[0])
    return torch.cat([out for _, out in parts], dim=2).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, segment_attention)
