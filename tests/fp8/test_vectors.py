"""Our quantiser and reference give the vectors that are in the repository, and another implementation agrees with them."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rl.fp8.quantize import COLUMN, SQUARE, TILE, QTensor, quantize
from rl.fp8.reference import Reference

HERE = Path(__file__).parent
FILES = sorted((HERE / "vectors").glob("*.safetensors"))
BLOCKS = {"1x128": TILE, "128x1": COLUMN, "128x128": SQUARE}


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """NaN equals NaN."""
    a, b = (t.contiguous() for t in (a, b))
    kind = torch.uint8 if a.dtype.itemsize == 1 else torch.int32
    return bool(((a.view(kind) == b.view(kind)) | (a.float().isnan() & b.float().isnan())).all())


def test_the_vectors_are_there_and_small() -> None:
    assert len(FILES) == 12 and sum(path.stat().st_size for path in FILES) < 4_000_000


@pytest.mark.parametrize("path", [p for p in FILES if p.stem.startswith("quantize_")], ids=lambda p: p.stem)
def test_codes_and_scales_are_those_of_the_vectors(path: Path) -> None:
    held = load_file(path)
    for form, block in BLOCKS.items():
        for power_of_two in (False, True):
            kind = f"{form}{'_power_of_two' if power_of_two else ''}"
            q = quantize(held["input"], block, power_of_two=power_of_two)
            assert same_bits(q.codes, held[f"{kind}/codes"]) and same_bits(q.scales, held[f"{kind}/scales"]), kind


@pytest.mark.parametrize("path", [p for p in FILES if p.stem.startswith("product_")], ids=lambda p: p.stem)
def test_products_are_those_of_the_vectors(path: Path) -> None:
    held = load_file(path)
    backend = Reference()
    x, w, dy = (QTensor(held[f"{name}/codes"], held[f"{name}/scales"], block) for name, block in (("x", TILE), ("w", SQUARE), ("dy", TILE)))
    found = {
        "fprop": backend.product(x, w, torch.float32),
        "dgrad": backend.product(dy, w.T, torch.float32),
        "wgrad": backend.wgrad(held["input/dy"], x.dequantize()),
    }
    for name, got in found.items():
        assert (got - held[name]).norm() <= 1e-6 * held[name].norm(), name
    exact = held["x/codes"].double() * held["x/scales"].double().repeat_interleave(128, 1)[:, : held["x/codes"].shape[1]]
    weight = held["w/scales"].double().repeat_interleave(128, 0)[: len(held["w/codes"])].repeat_interleave(128, 1)
    wanted = exact @ (held["w/codes"].double() * weight[:, : held["w/codes"].shape[1]]).T
    assert (held["fprop"].double() - wanted).norm() < 1e-6 * wanted.norm(), "in float64, written out"


@pytest.mark.slow
@pytest.mark.parametrize("other", ["vllm", "torchao"])
def test_another_implementation_agrees(other: str) -> None:
    if find_spec(other) is None:
        pytest.skip(f"{other} is not installed")
    done = subprocess.run(
        [sys.executable, str(HERE / "independent.py"), other],
        env={**os.environ, "PYTHONPATH": str(HERE.parent.parent)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1500:]
    assert done.stdout.count(" 0 wrong") >= 6
