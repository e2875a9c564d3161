"""The attention over a flat batch against a dense masked softmax, on CPU and by the mask of the GPU path."""

import functools

import numpy as np
import policies
import pytest
import torch
from made import make_groups
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

import rl.logp
from rl.advantage import group_advantage
from rl.attention import layout_of, mask_of, on_gpu, sees, segment_attention
from rl.batch import TrainBatch, items_of, pack
from rl.config import AdvantageConfig
from rl.logp import logp_and_entropy
from rl.policy import load_model

SHAPES = {"multi-head": (4, 4, 16, 16), "grouped-query": (4, 2, 16, 16), "MLA": (3, 3, 24, 16)}
"""H query heads, J key heads, size of a query and key, size of a value."""


def make_batch(share_prompt: bool = True) -> TrainBatch:
    """Three groups of four; completions of one token forward nothing."""
    groups = make_groups([[1, 0, 0, 1], [0, 1, 0, 0], [1, 1, 0.5, 0]], seed=0)
    work, normaliser = items_of(groups, group_advantage(groups, AdvantageConfig()), False, True)
    batch = pack(work, normaliser, temperature=1.0, max_tokens=12, share_prompt=share_prompt)
    assert any(begin == end for begin, end in batch.bounds_S) and len(batch.tokens_T) > 60
    return batch


def visible(batch: TrainBatch) -> torch.Tensor:
    """bool [T, T], written out segment by segment: a token sees its segment up to itself, and its whole prompt."""
    seen = torch.zeros(len(batch.tokens_T), len(batch.tokens_T), dtype=torch.bool)
    for begin, end in batch.bounds_S:
        seen[begin:end, begin:end] = torch.ones(end - begin, end - begin, dtype=torch.bool).tril()
    for segment, prompt in zip(batch.segment_of_B, batch.prompt_of_B, strict=True):
        seen[slice(*batch.bounds_S[segment]), slice(*batch.bounds_S[prompt])] = True
    return seen


def inputs(shape: tuple[int, int, int, int], length: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """Laid out as projections leave them: [1, T, heads, size], seen as [1, heads, T, size]."""
    torch.manual_seed(0)
    heads, key_heads, d, dv = shape
    sizes = [(heads, d), (key_heads, d), (key_heads, dv)]
    return [torch.randn(1, length, h, s, dtype=dtype).transpose(1, 2).requires_grad_() for h, s in sizes]


def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, seen: torch.Tensor) -> torch.Tensor:
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = (q @ k.transpose(-1, -2) * scale).masked_fill(~seen, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2)


def with_gradients(out: torch.Tensor, wrt: list[torch.Tensor]) -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [out.detach(), *torch.autograd.grad(out, wrt, torch.randn(out.shape, dtype=out.dtype))]


@pytest.mark.parametrize("share_prompt", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_output_and_gradients_equal_a_dense_masked_softmax(shape: str, share_prompt: bool) -> None:
    batch = make_batch(share_prompt)
    q, k, v = inputs(SHAPES[shape], len(batch.tokens_T))
    ours, _ = segment_attention(torch.nn.Module(), q, k, v, None, 0.3, cohort=layout_of(batch))
    want = with_gradients(dense(q, k, v, 0.3, visible(batch)), [q, k, v])
    for got, expected in zip(with_gradients(ours, [q, k, v]), want, strict=True):
        assert (got - expected).abs().max() < 1e-12


def test_in_bf16_the_two_parts_are_no_further_from_float64_than_one_softmax() -> None:
    batch = make_batch()
    exact = [x.detach().requires_grad_() for x in inputs(SHAPES["grouped-query"], len(batch.tokens_T), torch.bfloat16)]
    wide = [x.detach().double().requires_grad_() for x in exact]
    want = with_gradients(dense(*wide, 0.3, visible(batch)), wide)
    ours = with_gradients(segment_attention(torch.nn.Module(), *exact, None, 0.3, cohort=layout_of(batch))[0], exact)
    sdpa = functools.partial(torch.nn.functional.scaled_dot_product_attention, attn_mask=visible(batch), scale=0.3, enable_gqa=True)
    stock = with_gradients(sdpa(*exact).transpose(1, 2), exact)
    for got, other, expected in zip(ours, stock, want, strict=True):
        assert (got.double() - expected).norm() < 1.5 * (other.double() - expected).norm()


@pytest.mark.parametrize("share_prompt", [True, False])
def test_the_mask_of_the_gpu_path_is_the_visible_pairs(share_prompt: bool) -> None:
    batch = make_batch(share_prompt)
    rows = torch.arange(len(batch.tokens_T))
    zero = torch.zeros((), dtype=torch.int64)
    assert torch.equal(sees(batch)(zero, zero, rows[:, None], rows[None, :]), visible(batch))


@pytest.mark.parametrize("share_prompt", [True, False])
@pytest.mark.parametrize("block", [2, 4, 7, 16, 128])
def test_the_blocks_of_the_gpu_path_are_those_of_the_whole_mask(block: int, share_prompt: bool) -> None:
    """Against torch's own count in the whole mask; a full block that holds two segments may stand as one to be looked at."""
    batch = make_batch(share_prompt)
    length = len(batch.tokens_T)
    want = create_block_mask(sees(batch), None, None, length, length, device="cpu", BLOCK_SIZE=block)
    got = mask_of(batch, block)
    assert got.seq_lengths == want.seq_lengths and got.BLOCK_SIZE == want.BLOCK_SIZE
    assert torch.equal(got.to_dense(), want.to_dense())
    full, most = (full_blocks(m, block) for m in (got, want))
    assert not (full & ~most).any()
    assert int(full.sum()) >= 0.6 * int(most.sum()) and (block > 4 or full.any())


def full_blocks(mask: BlockMask, block: int) -> torch.Tensor:
    """Its full blocks as a bool table."""
    assert mask.full_kv_num_blocks is not None and mask.full_kv_indices is not None
    return BlockMask.from_kv_blocks(mask.full_kv_num_blocks, mask.full_kv_indices, BLOCK_SIZE=block).to_dense().bool()


@pytest.mark.parametrize("shape", SHAPES)
def test_the_gpu_path_equals_the_cpu_path(shape: str) -> None:
    batch = make_batch()
    q, k, v = inputs(SHAPES[shape], len(batch.tokens_T), torch.float32)
    cpu, _ = segment_attention(torch.nn.Module(), q, k, v, None, 0.3, cohort=layout_of(batch))
    # Uncompiled, FlexAttention computes by plain tensor operations, forward alone.
    gpu = on_gpu(q.detach(), k.detach(), v.detach(), 0.3, mask_of(batch), flex_attention)
    assert (gpu - cpu).abs().max() < 1e-6


def test_positions_go_on_from_the_prompt_in_every_completion() -> None:
    batch = make_batch()
    for segment, prompt in zip(batch.segment_of_B, batch.prompt_of_B, strict=True):
        begin, end = batch.bounds_S[segment]
        first = batch.bounds_S[prompt][1] - batch.bounds_S[prompt][0]
        assert batch.position_T[begin:end].tolist() == list(range(first, first + end - begin))


def test_a_window_shorter_than_prompt_and_completion_is_refused() -> None:
    batch = make_batch()
    layout = layout_of(batch)
    q, k, v = inputs(SHAPES["multi-head"], len(batch.tokens_T))
    with pytest.raises(ValueError, match=f"have {layout.longest} tokens, the model's sliding window is {layout.longest - 1}"):
        segment_attention(torch.nn.Module(), q, k, v, None, cohort=layout, sliding_window=layout.longest - 1)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 7, 128])
def test_log_probs_and_their_gradient_equal_log_softmax_in_chunks_of_any_size(
    monkeypatch: pytest.MonkeyPatch, rows: int, bias: bool
) -> None:
    monkeypatch.setattr(rl.logp, "CHUNK_ROWS", rows)
    monkeypatch.setattr(rl.logp, "CACHED_LOGITS", 0)
    torch.manual_seed(0)
    head = torch.nn.Linear(16, 50, bias=bias, dtype=torch.float64)
    hidden = torch.randn(23, 16, dtype=torch.float64, requires_grad=True)
    target = torch.from_numpy(np.random.default_rng(0).integers(0, 50, 23))
    logp, entropy = logp_and_entropy(head, hidden, target, 0.7, 50)
    all_logp = (head(hidden) / 0.7).log_softmax(-1)
    want = all_logp.gather(1, target[:, None])[:, 0]
    assert (entropy + (all_logp.exp() * all_logp).sum(-1)).abs().max() < 1e-12
    assert not entropy.requires_grad
    leaves = [hidden, *head.parameters()]
    for got, expected in zip(with_gradients(logp, leaves), with_gradients(want, leaves), strict=True):
        assert (got - expected).abs().max() < 1e-12


def test_a_head_that_is_more_than_a_matrix_gives_the_same_numbers() -> None:
    torch.manual_seed(0)
    plain = torch.nn.Linear(16, 50, bias=False, dtype=torch.float64)
    hidden = torch.randn(23, 16, dtype=torch.float64, requires_grad=True)
    target = torch.randint(0, 50, (23,))
    leaves = [hidden, plain.weight]
    outs = [logp_and_entropy(head, hidden, target, 0.7, 50) for head in (plain, torch.nn.Sequential(plain))]
    assert (outs[0][1] - outs[1][1]).abs().max() < 1e-12
    for a, b in zip(*(with_gradients(logp, leaves) for logp, _ in outs), strict=True):
        assert (a - b).abs().max() < 1e-12


def test_a_frozen_head_passes_its_gradient_on(tmp_path) -> None:  # type: ignore[no-untyped-def]
    model = load_model(policies.tiny_qwen3(tmp_path / "policy", seed=0), torch.float32)
    head = model.get_output_embeddings().requires_grad_(False)
    hidden = torch.randn(5, head.weight.shape[1], requires_grad=True)
    logp, _ = logp_and_entropy(head, hidden, torch.arange(5), 1.0, head.weight.shape[0])
    (got,) = torch.autograd.grad(logp.sum(), [hidden])
    expected = head.weight[:5] - head(hidden.detach()).softmax(-1) @ head.weight
    assert (got - expected).abs().max() < 1e-5
