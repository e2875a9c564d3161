"""Attention over a flat batch: a completion sees its prompt and itself, and nothing else.

One function in transformers' attention registry, under the name in `NAME`; the layout of the batch reaches it as the keyword
`cohort`, which transformers hands through every layer. It serves grouped-query attention and MLA (whose keys are wider than its
values) alike. No mask of the whole row exists on CPU, and no prompt is copied.

A softmax over the keys of the prompt and a completion's own is two softmaxes put together by the logarithms of their sums:

    l = log(exp(l_prompt) + exp(l_own))        out = exp(l_prompt - l) out_prompt + exp(l_own - l) out_own

So all completions of a group meet their prompt in one product without a mask, and each meets itself in a small causal one. The
backward needs no more: given `out` and `l` of the whole softmax, the gradient of attention is a sum over keys, and each of these
products yields its share (Dao 2023, arXiv:2307.08691, algorithm 2). The kernel of both is torch's flash attention.

On a CPU the core runs in FP32 whatever the type of the model, and so does that of `CACHED`, an engine's attention over its cache: in BF16
these two kernels round differently, and FP8 projections behind them make another code of each such difference.

On a GPU it is FlexAttention with the mask that `sees` states; which blocks of it are empty or full is counted from the bounds of the
segments. That path has not run on a GPU; tests compare it on CPU tensors.

    T  tokens      H  query heads      J  key heads      R  query heads of a key head (H = J R)      d  head size
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import pad
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rl.batch import TrainBatch

NAME = "cohort"
CACHED = "cohort_cached"
"""transformers' sdpa, on a CPU in FP32."""

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True)
class Family:
    """A prompt and the completions that share it, one behind the other in a flat batch."""

    prompt: slice
    completions: tuple[slice, ...]
    """Those that forward a token; they follow the prompt without gaps."""

    @property
    def all_completions(self) -> slice:
        return slice(self.prompt.stop, self.completions[-1].stop if self.completions else self.prompt.stop)


@dataclass(frozen=True)
class Layout:
    """Which rows of a flat batch attend to which."""

    families: tuple[Family, ...]
    longest: int
    """Longest prompt and completion together, in tokens."""
    mask: BlockMask | None
    """The same for FlexAttention, made once for all layers; None on CPU."""


def layout_of(batch: TrainBatch) -> Layout:
    members: dict[int, list[slice]] = {s: [] for s in range(len(batch.bounds_S)) if s not in set(batch.segment_of_B)}
    for segment, prompt in zip(batch.segment_of_B, batch.prompt_of_B, strict=True):
        begin, end = batch.bounds_S[segment]
        if begin < end:  # a completion of one token forwards nothing
            members[prompt].append(slice(begin, end))
    families = tuple(Family(slice(*batch.bounds_S[prompt]), tuple(own)) for prompt, own in members.items())
    for family in families:
        ends = [family.prompt.stop, *(c.stop for c in family.completions)]
        assert ends[:-1] == [c.start for c in family.completions], "completions follow their prompt without gaps"
    return Layout(
        families=families,
        longest=max(f.prompt.stop - f.prompt.start + max((c.stop - c.start for c in f.completions), default=0) for f in families),
        mask=mask_of(batch) if batch.tokens_T.is_cuda else None,
    )


def mask_of(batch: TrainBatch, block: int = 128) -> BlockMask:
    """FlexAttention's mask by blocks of rows and keys; no [T, T] tensor is made, as torch's own `create_block_mask` would."""
    length = len(batch.tokens_T)
    some, full = _blocks(batch, length, block)
    (looked_at, where), (seen, seen_where) = (_table(x, batch.tokens_T.device) for x in (some & ~full, full))
    return BlockMask.from_kv_blocks(
        looked_at, where, seen, seen_where, BLOCK_SIZE=block, mask_mod=sees(batch), seq_lengths=(length, length)
    )  # fmt: skip


def _table(blocks: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """bool [row blocks, key blocks] as FlexAttention reads it: how many of a row are true, and which, these first."""
    indices = blocks.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1).to(device, torch.int32)[None, None], indices.to(device, torch.int32)[None, None]


def _blocks(batch: TrainBatch, length: int, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two bool [row blocks, key blocks]: some pair of the block is visible; all are (not counted where its keys are two segments')."""
    count = -(-length // block)
    some = torch.zeros(count, count, dtype=torch.bool)
    one_segment, one_prompt = torch.full((count,), -1), torch.full((count,), -2)  # of blocks that lie in one; else equal to none
    prompt_of = dict(zip(batch.segment_of_B, batch.prompt_of_B, strict=True))
    families: dict[int, list[int]] = {}
    for segment, (begin, end) in enumerate(batch.bounds_S):
        prompt = prompt_of.get(segment, segment)
        families.setdefault(prompt, []).append(segment)
        if begin < end:
            rows = slice(begin // block, (end - 1) // block + 1)
            first, last = batch.bounds_S[prompt]
            some[rows, rows] = True
            some[rows, first // block : (last - 1) // block + 1] = True
            one_segment[-(-begin // block) : end // block] = segment
    for prompt, members in families.items():
        begin, end = batch.bounds_S[prompt][0], batch.bounds_S[members[-1]][1]
        one_prompt[-(-begin // block) : end // block] = prompt
    earlier = torch.ones(count, count, dtype=torch.bool).tril(-1)
    same = (one_segment[:, None] == one_segment[None, :]) & (one_segment[None, :] >= 0)
    return some.tril_(), earlier & (same | (one_prompt[:, None] == one_segment[None, :]))


def sees(batch: TrainBatch) -> Callable[..., torch.Tensor]:
    """FlexAttention's mask function: whether the token at row q attends to the one at row k."""
    prompt_of_S = torch.arange(len(batch.bounds_S))
    prompt_of_S[list(batch.segment_of_B)] = torch.tensor(batch.prompt_of_B, dtype=torch.int64)
    segment_T = batch.segment_T
    prompt_T = prompt_of_S.to(segment_T.device)[segment_T]

    def mask(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        # A prompt stands before its completions, so its keys are all in the past.
        return (k <= q) & ((segment_T[k] == segment_T[q]) | (segment_T[k] == prompt_T[q]))

    return mask


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
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """query [1, H, T, d], key [1, J, T, d], value [1, J, T, dv] with dv <= d -> [1, T, H, dv].

    Raises ValueError for a sliding window shorter than the batch needs, as a window over a shared prompt is not there yet, and for
    scores that are capped (`softcap`) or have a sink (`s_aux`).
    """
    if softcap is not None or s_aux is not None:
        raise ValueError(f"its attention {'has sinks' if softcap is None else 'caps scores'}, which is not there yet over a shared prompt")
    assert attention_mask is None and dropout == 0.0, "a flat batch has no padding mask, and RL trains without dropout"
    if sliding_window is not None and cohort.longest > sliding_window:
        raise ValueError(f"prompt and completion have {cohort.longest} tokens, the model's sliding window is {sliding_window}")
    query, key = query.to(value.dtype), key.to(value.dtype)  # beside BF16 matrices the rotation is FP32
    if cohort.mask is not None:
        return on_gpu(query, key, value, scaling, cohort.mask, _compiled()), None
    # The CPU kernel wants values as wide as keys; MLA's are narrower, and columns of zeros stay zeros.
    width, kind = value.shape[-1], query.dtype
    q, k, v = (x.to(torch.promote_types(kind, torch.float32)) for x in (query, key, value))
    out = _CpuAttention.apply(q, k, pad(v, (0, q.shape[-1] - width)), cohort.families, scaling)
    return out[..., :width].to(kind), None


def cached_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **settings: Any,
) -> tuple[torch.Tensor, None]:
    """As transformers calls any attention; the mask is bool or none."""
    query, key = query.to(value.dtype), key.to(value.dtype)  # beside BF16 matrices the rotation is FP32
    kind = query.dtype
    if query.device.type == "cpu" and kind is torch.bfloat16:
        query, key, value = query.float(), key.float(), value.float()
    return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)[0].to(kind), None


def on_gpu(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None, mask: BlockMask, kernel: Callable[..., Any]
) -> torch.Tensor:
    """FlexAttention with a batch's mask; `kernel` is flex_attention, compiled on a GPU (plain, it holds all [T, T] scores)."""
    gqa = query.shape[1] != key.shape[1]
    return kernel(query, key, value, block_mask=mask, scale=scaling, enable_gqa=gqa).transpose(1, 2).contiguous()


@cache
def _compiled() -> Callable[..., Any]:
    return torch.compile(flex_attention, dynamic=True)


class _CpuAttention(torch.autograd.Function):
    """[1, H, T, d] and twice [1, J, T, d] -> [1, T, H, d]. Heads stand as [J, R, T, d]; key heads are expanded, not copied."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, families: tuple[Family, ...], scale: float | None
    ) -> torch.Tensor:
        heads, length = key.shape[1], query.shape[2]
        q = query[0].unflatten(0, (heads, -1))
        k, v = (x[0][:, None].expand_as(q) for x in (key, value))
        flat = query.new_empty(1, length, query.shape[1], query.shape[3])
        out = _by_head(flat, heads)
        lse = query.new_empty(q.shape[:3], dtype=torch.promote_types(query.dtype, torch.float32))
        for family in families:
            for own in (family.prompt, *family.completions):
                out[:, :, own], lse[:, :, own] = _flash(q[:, :, own], k[:, :, own], v[:, :, own], 0.0, True, scale=scale)
            if family.completions:
                ours, prompt = family.all_completions, family.prompt
                part, part_lse = _flash(_rows(q[:, :, ours]), k[:, :1, prompt], v[:, :1, prompt], 0.0, False, scale=scale)
                part, part_lse = part.view_as(out[:, :, ours]), part_lse.view_as(lse[:, :, ours])
                total = torch.logaddexp(lse[:, :, ours], part_lse)
                out[:, :, ours] = torch.lerp(out[:, :, ours].to(total.dtype), part.to(total.dtype), (part_lse - total).exp_()[..., None])
                lse[:, :, ours] = total
        ctx.save_for_backward(query, key, value, flat, lse)
        ctx.families, ctx.scale = families, scale
        return flat

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, flat, lse = ctx.saved_tensors
        heads = key.shape[1]
        q = query[0].unflatten(0, (heads, -1))
        k, v = (x[0][:, None].expand_as(q) for x in (key, value))
        out, grad_out = _by_head(flat, heads), _by_head(grad, heads)
        # Laid out by token, as the projections before them want to read them.
        grads = [x.new_empty(x.transpose(1, 2).shape).transpose(1, 2) for x in (query, key, value)]
        dq, (dk, dv) = grads[0][0].unflatten(0, (heads, -1)), (x[0] for x in grads[1:])
        for family in ctx.families:
            for own in (family.prompt, *family.completions):
                dq[:, :, own], dk_own, dv_own = _flash_backward(
                    *(x[:, :, own] for x in (grad_out, q, k, v, out, lse)), 0.0, True, scale=ctx.scale
                )
                dk[:, own], dv[:, own] = dk_own.sum(1), dv_own.sum(1)
            if family.completions:
                ours, prompt = family.all_completions, family.prompt
                dq_part, dk_part, dv_part = _flash_backward(
                    _rows(grad_out[:, :, ours]), _rows(q[:, :, ours]), k[:, :1, prompt], v[:, :1, prompt],
                    _rows(out[:, :, ours]), _rows(lse[:, :, ours]), 0.0, False, scale=ctx.scale,
                )  # fmt: skip
                dq[:, :, ours] += dq_part.view_as(dq[:, :, ours])
                dk[:, prompt] += dk_part[:, 0]
                dv[:, prompt] += dv_part[:, 0]
        return *grads, None, None


def _by_head(x: torch.Tensor, heads: int) -> torch.Tensor:
    """[1, T, H, d] -> a view [J, R, T, d]."""
    return x[0].unflatten(1, (heads, -1)).permute(1, 2, 0, 3)


def _rows(x: torch.Tensor) -> torch.Tensor:
    """[J, R, T, …] -> [J, 1, R T, …]: the query heads of a key head as more rows of one product."""
    return x.flatten(1, 2)[:, None]


AttentionInterface.register(NAME, segment_attention)
AttentionInterface.register(CACHED, cached_attention)
AttentionMaskInterface.register(CACHED, sdpa_mask)
