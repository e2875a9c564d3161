"""The three products: exact where FP8 is exact, as far off as FP8 is on Gaussian data, and blocks told from one scale per tensor."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from data.recipe import InputError
from rl.config import Fp8Config
from rl.fp8.backends import backend_named
from rl.fp8.linear import Fp8Linear
from rl.fp8.quantize import COLUMN, E4M3_MAX, SQUARE, TILE, QTensor, quantize
from rl.fp8.reference import Reference, product
from rl.fp8.weights import Codes

HERE = Path(__file__).parent


def relative(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((got - wanted).norm() / wanted.norm()).item()


def linear(weight_NK: torch.Tensor, **options: bool) -> Fp8Linear:
    plain = torch.nn.Linear(weight_NK.shape[1], weight_NK.shape[0], bias=False)
    plain.weight = torch.nn.Parameter(weight_NK)
    return Fp8Linear.over(plain, Codes(), Reference(), options.get("quantize_activations", True))


def run(layer: torch.nn.Module, x_MK: torch.Tensor, dy_MN: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = x_MK.clone().requires_grad_()
    y = layer(x)
    y.backward(dy_MN)
    return y.detach(), x.grad, layer.weight.grad


def plain(weight_NK: torch.Tensor, x_MK: torch.Tensor, dy_MN: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    layer = torch.nn.Linear(weight_NK.shape[1], weight_NK.shape[0], bias=False, dtype=torch.float64)
    layer.weight = torch.nn.Parameter(weight_NK.double())
    return tuple(t.float() for t in run(layer, x_MK.double(), dy_MN.double()))  # type: ignore[return-value]


def test_products_of_small_integers_are_exact() -> None:
    """Blocks with amax 14 have the scale 1/32, and integers up to 14 that E4M3 has are codes: nothing is rounded."""
    torch.manual_seed(0)
    known = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14], dtype=torch.float32)

    def integers(rows: int, cols: int) -> torch.Tensor:
        x = known[torch.randint(0, 11, (rows, cols))] * torch.randint(0, 2, (rows, cols)).mul(2).sub(1)
        x[::128, ::1] = 14  # in every block, whatever its form
        x[:, ::128] = 14
        return x

    w, x, dy = integers(256, 384), integers(256, 384), integers(256, 256)
    for got, wanted in zip(run(linear(w), x, dy), plain(w, x, dy), strict=True):
        assert torch.equal(got, wanted)


def test_errors_on_gaussian_data_are_those_of_fp8() -> None:
    """.037 for each product, within 5 %: .026 a side."""
    torch.manual_seed(0)
    w, x, dy = torch.randn(512, 1024) * 0.02, torch.randn(1024, 1024), torch.randn(1024, 512)
    errors = [relative(got, wanted) for got, wanted in zip(run(linear(w), x, dy), plain(w, x, dy), strict=True)]
    assert errors == pytest.approx([0.037, 0.037, 0.037], rel=0.05)
    in_bf16 = relative((x.bfloat16() @ w.bfloat16().T).float(), x @ w.T)
    assert in_bf16 < 0.003


def test_one_operand_in_fp8_has_the_error_of_one_side() -> None:
    torch.manual_seed(0)
    x, dy = torch.randn(1024, 512), torch.randn(1024, 256)
    got = dy.T @ quantize(x, TILE).dequantize()
    assert relative(got, dy.T @ x) == pytest.approx(0.0266, rel=0.05)


def test_rows_that_one_scale_would_lose_keep_their_precision() -> None:
    """Every second row is 1e-6 of the others. By row: 1x128 tiles .037; one scale for the tensor loses all of it, 1.0."""
    torch.manual_seed(0)
    x, w = torch.randn(256, 512), torch.randn(128, 512) * 0.02
    x[1::2] *= 1e-6
    wanted = x @ w.T
    one = E4M3_MAX / x.abs().max()
    per_tensor = QTensor((x * one).to(torch.float8_e4m3fn), (1 / one).expand(256, 4).contiguous(), TILE)

    def worst_row(q: QTensor) -> float:
        got = product(q, quantize(w, SQUARE))
        return ((got - wanted).norm(dim=1) / wanted.norm(dim=1)).max().item()

    assert worst_row(quantize(x, TILE)) < 0.06
    assert worst_row(per_tensor) > 0.99


def test_a_weight_block_that_one_scale_would_lose_keeps_its_precision() -> None:
    torch.manual_seed(0)
    x, w = torch.randn(64, 256), torch.randn(256, 256)
    w[128:] *= 1e-6
    got = linear(w)(x)
    assert relative(got[:, 128:], x @ w[128:].T) < 0.04


def test_the_reference_adds_up_without_loss() -> None:
    torch.manual_seed(0)
    a, b = quantize(torch.randn(64, 2048), TILE), quantize(torch.randn(96, 2048), SQUARE)
    exact = a.dequantize().double() @ b.dequantize().double().T
    assert relative(product(a, b).double(), exact) < 1e-6


def test_grouped_products_are_those_of_each_expert() -> None:
    torch.manual_seed(0)
    ends = torch.tensor([5, 5, 140])
    x, dy, w = torch.randn(140, 256), torch.randn(140, 384), torch.randn(3, 384, 256)
    backend = Reference()
    got = backend.grouped(quantize(x, TILE), quantize(w, SQUARE), ends, torch.float32)
    grads = backend.grouped_wgrad(dy, x, ends)
    for expert, rows in enumerate((slice(0, 5), slice(5, 5), slice(5, 140))):
        assert torch.equal(got[rows], product(quantize(x[rows], TILE), quantize(w[expert], SQUARE)))
        assert torch.equal(grads[expert], backend.wgrad(dy[rows], x[rows]) if rows.stop > rows.start else torch.zeros(384, 256))


def test_the_backward_sees_codes_of_the_input_and_saves_nothing_in_high_precision() -> None:
    torch.manual_seed(0)
    layer, x = linear(torch.randn(256, 256)), torch.randn(64, 256, requires_grad=True)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = layer(x)
    kinds = sorted((str(t.dtype), tuple(t.shape)) for t in saved if t is not layer.weight)
    assert kinds == [("torch.float32", (64, 2)), ("torch.float8_e4m3fn", (64, 256))]
    y.backward(torch.ones_like(y))
    dy, cached = torch.ones(64, 256), quantize(x, TILE, power_of_two=True).dequantize()
    wanted = quantize(dy, COLUMN).dequantize().T @ quantize(cached, COLUMN, power_of_two=True).dequantize()
    assert relative(layer.weight.grad, wanted) < 1e-6


def test_projections_of_one_input_share_its_codes() -> None:
    q, k = linear(torch.randn(128, 128)), linear(torch.randn(128, 128))
    x = torch.randn(2, 16, 128, requires_grad=True)
    places = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: places.append(t.data_ptr()) or t, lambda t: t):
        q(x), k(x)
    assert len(places) == 6 and len(set(places)) == 4  # two masters; codes and scales once
    first = q(x.detach())
    with torch.no_grad():
        x *= 3  # the same tensor, with other values
    assert relative(q(x), 3 * first) < 0.05


def test_codes_follow_their_master_and_only_then_are_made_again() -> None:
    layer = linear(torch.randn(128, 256))
    first = layer.codes.of(layer.weight)
    assert layer.codes.of(layer.weight) is first
    with torch.no_grad():
        layer.weight.mul_(1.1)
    second = layer.codes.of(layer.weight)
    assert second is not first and torch.equal(second.scales, quantize(layer.weight, SQUARE).scales)


def test_without_quantised_activations_the_product_is_that_of_the_codes_values() -> None:
    torch.manual_seed(0)
    layer, x = linear(torch.randn(128, 256), quantize_activations=False), torch.randn(8, 256)
    y = layer(x)
    assert torch.equal(y, x @ quantize(layer.weight, SQUARE).dequantize().T)
    y.sum().backward()
    assert torch.allclose(layer.weight.grad, x.sum(0).expand(128, 256))


def test_a_backend_that_cannot_run_here_is_an_error_that_names_what_is_missing() -> None:
    for name in ("torch", "triton"):
        with pytest.raises(ValueError, match=f"policy.fp8.backend: '{name}' needs a CUDA GPU"):
            backend_named(name, torch.device("cpu"))
    assert Fp8Config().backend == "reference" and issubclass(InputError, ValueError)


def test_triton_products_equal_the_reference_in_the_interpreter() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    done = subprocess.run(
        [sys.executable, str(HERE / "interpreted.py")],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(HERE.parent.parent)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    errors = {line.rsplit(": ", 1)[0]: float(line.rsplit(": ", 1)[1]) for line in done.stdout.splitlines()}
    assert len(errors) >= 16 and max(errors.values()) < 1e-6, errors
