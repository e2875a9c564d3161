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

    bounds: tuple[tuple[int, int], ...]
    """Begin and end of each segment; they follow each other without gaps."""
    prompt_of_S: tuple[int | None, ...]
    """The segment of a completion's prompt; None for a prompt."""
    longest: int
    """Longest prompt and completion together, in tokens."""


def layout_of(batch: TrainBatch) -> Layout:
    prompt_of = dict(zip(batch.segment_of_B, batch.prompt_of_B, strict=True))
    sizes = [end - begin for begin, end in batch.bounds_S]
    return Layout(
        bounds=batch.bounds_S,
        prompt_of_S=tuple(prompt_of.get(s) for s in range(len(sizes))),
        longest=max(size + (sizes[prompt_of[s]] if s in prompt_of else 0) for s, size in enumerate(sizes)),
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
    if sliding_window is not None and cohort.longest > sliding_window:
        raise ValueError(f"prompt and completion have {cohort.longest} tokens, the model's sliding window is {sliding_window}")
    gqa = query.shape[1] != key.shape[1]
    # One split, not a slice for each segment: the backward of a slice fills a row of zeros as long as the whole batch.
    sizes = [end - begin for begin, end in cohort.bounds]
    queries, keys, values = (x.split(sizes, dim=2) for x in (query, key, value))
    out: list[torch.Tensor] = []
    for q, k, v, prompt in zip(queries, keys, values, cohort.prompt_of_S, strict=True):
        if prompt is None:
            out.append(scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=gqa))
        elif q.shape[2]:  # a completion of one token forwards nothing
            k, v = torch.cat([keys[prompt], k], dim=2), torch.cat([values[prompt], v], dim=2)
            seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril_(k.shape[2] - q.shape[2])
            out.append(scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scaling, enable_gqa=gqa))
    return torch.cat(out, dim=2).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, segment_attention)
