"""AdamW against torch's own, FP32 accumulation, BF16 moments, schedules."""

import pytest
import torch

from rl.config import OptimizerConfig
from rl.optim import AdamW, learning_rate, round_to_bf16


def parameters(dtype: torch.dtype = torch.float32) -> list[tuple[str, torch.nn.Parameter]]:
    torch.manual_seed(0)
    return [("matrix", torch.nn.Parameter(torch.randn(8, 16).to(dtype))), ("gain", torch.nn.Parameter(torch.ones(16).to(dtype)))]


def test_updates_equal_torch_adamw() -> None:
    ours, theirs = parameters(), parameters()
    optim = AdamW(ours, OptimizerConfig(betas=(0.9, 0.99), weight_decay=0.1))
    decay = [{"params": [theirs[0][1]], "weight_decay": 0.1}, {"params": [theirs[1][1]], "weight_decay": 0.0}]
    reference = torch.optim.AdamW(decay, lr=1e-2, betas=(0.9, 0.99))
    for step in range(20):
        torch.manual_seed(step)
        for (_, a), (_, b) in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        optim.step(1e-2)
        reference.step()
    for (_, a), (_, b) in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_the_gradient_is_scaled_to_the_norm() -> None:
    named = parameters()
    optim = AdamW(named, OptimizerConfig())
    for _, p in named:
        p.grad = torch.full_like(p, 2.0)
    norm = optim.clip(1.0)
    assert norm == pytest.approx((4.0 * (8 * 16 + 16)) ** 0.5)
    assert sum(g.square().sum() for _, g in optim.grads()).item() == pytest.approx(1.0, rel=1e-5)


def test_small_updates_of_bf16_parameters_are_not_lost() -> None:
    """1,000 updates of 1e-5 on a weight of 1: BF16 alone would round each of them away."""
    p = torch.nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16))
    optim = AdamW([("p", p)], OptimizerConfig(betas=(0.0, 0.0), eps=1e-12))
    for _ in range(1000):
        (p * 1.0).sum().backward()
        optim.step(1e-5)
    assert p.float().mean().item() == pytest.approx(0.99, abs=2e-3)
    assert optim.state["p"]["master"].mean().item() == pytest.approx(0.99, abs=5e-5)


def test_passes_of_bf16_parameters_add_up_in_fp32() -> None:
    p = torch.nn.Parameter(torch.zeros(2, 2, dtype=torch.bfloat16))
    optim = AdamW([("p", p)], OptimizerConfig())
    for scale in [1.0] + [2.0**-9] * 256:
        (p * scale).sum().backward()
    grad = dict(optim.grads())["p"]
    assert grad.dtype is torch.float32
    assert grad[0, 0].item() == 1.5


def test_bf16_moments_take_half_the_room() -> None:
    optim = AdamW(parameters(), OptimizerConfig(moments="bf16", betas=(0.9, 0.95)))
    assert {t.dtype for name, t in optim.state_dict().items()} == {torch.bfloat16}


def test_bf16_moments_with_a_slow_beta2_are_refused() -> None:
    """The second moment shrinks by 0.1 % a step, and BF16 holds steps of 0.4 %: it would never fall again."""
    with pytest.raises(ValueError, match="betas"):
        OptimizerConfig(moments="bf16", betas=(0.9, 0.999))


def test_schedules_by_hand() -> None:
    rates = [learning_rate(s, 1.0, "linear", 2, 10) for s in range(11)]
    assert rates[:3] == pytest.approx([0.5, 0.9, 0.8]) and rates[10] == 0.0
    assert learning_rate(5, 1.0, "cosine", 0, 10) == pytest.approx(0.5)
    assert learning_rate(100, 1.0, "constant", 4, 10) == 1.0


def test_bf16_masters_keep_the_mean_of_small_updates() -> None:
    """1,000 updates of 1e-5 on weights of 1, of which rounding to the nearest would lose every one."""
    p = torch.nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
    optim = AdamW([("p", p)], OptimizerConfig(betas=(0.0, 0.0), eps=1e-12, masters="bf16"))
    for _ in range(1000):
        (p * 1.0).sum().backward()
        optim.step(1e-5)
    assert "master" not in optim.state["p"] and p.dtype is torch.bfloat16
    assert p.float().mean().item() == pytest.approx(0.99, abs=3e-4)


def test_stochastic_rounding_takes_a_neighbour_with_the_probability_that_keeps_the_mean() -> None:
    x = torch.full((100_000,), 1.0 + 2**-9)  # a quarter of the way from 1 to 1 + 2^-7
    rounded = round_to_bf16(x, torch.Generator().manual_seed(0)).float()
    assert set(rounded.tolist()) == {1.0, 1.0 + 2**-7}
    assert (rounded > 1.0).float().mean().item() == pytest.approx(0.25, abs=0.01)
    exact = torch.tensor([0.0, -1.5, 2.0**-130, float("inf"), float("-inf")])
    assert torch.equal(round_to_bf16(exact, torch.Generator().manual_seed(0)).float(), exact)
    assert round_to_bf16(torch.tensor([float("nan")]), torch.Generator()).isnan().all()
