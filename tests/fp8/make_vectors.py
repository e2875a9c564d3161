"""Writes tests/fp8/vectors/*.safetensors: `python tests/fp8/make_vectors.py`. What is in them stands in the README there."""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from rl.fp8.quantize import COLUMN, E4M3, SQUARE, TILE, QTensor, quantize
from rl.fp8.reference import Reference

VECTORS = Path(__file__).parent / "vectors"
BLOCKS = {"1x128": TILE, "128x1": COLUMN, "128x128": SQUARE}


def boundary() -> torch.Tensor:
    """Every code of E4M3, the middles between neighbours, and their FP32 neighbours, under the scale 1 and under 2^-3."""
    codes = torch.tensor([c for c in range(256) if c & 0x7F != 0x7F], dtype=torch.uint8).view(E4M3).float()
    finite = codes.unique()
    middle = (finite[1:] + finite[:-1]) / 2
    far = torch.tensor(1e9)
    values = torch.cat([finite, middle, torch.nextafter(middle, far), torch.nextafter(middle, -far)])
    rows = torch.nn.functional.pad(values, (0, -len(values) % 127)).view(-1, 127)
    rows = torch.cat([rows, torch.full((len(rows), 1), 448.0)], 1)  # every tile has amax 448: the scale is 1
    return torch.cat([rows, rows / 8])


def outliers() -> torch.Tensor:
    x = torch.randn(256, 256, generator=seeded(4))
    x[17, 40], x[200, 255], x[::3] = 3000.0, -1e6, x[::3] * 1e-5
    return x[128:]


def nans() -> torch.Tensor:
    x = torch.randn(130, 260, generator=seeded(5))
    x[0, 0], x[5, 140], x[129, 259] = float("nan"), float("inf"), float("-inf")
    return x


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


CASES: dict[str, Callable[[], torch.Tensor]] = {
    "random": lambda: torch.randn(256, 384, generator=seeded(0))[:128, :256],
    "random_bf16": lambda: torch.randn(128, 256, generator=seeded(1)).bfloat16(),
    "boundary": boundary,
    "zeros": lambda: torch.zeros(128, 256).index_fill_(0, torch.tensor([3]), -0.0),
    "subnormals": lambda: torch.randn(128, 128, generator=seeded(2)) * torch.logspace(-45, -30, 128),
    "maximum": lambda: torch.cat([torch.full((1, 128), torch.finfo(torch.float32).max), torch.full((1, 128), -448.0)]),
    "nan": nans,
    "outliers": outliers,
    "ragged": lambda: torch.randn(131, 129, generator=seeded(3)),
}
PRODUCTS = {"ragged": (37, 192, 320), "one_token": (1, 128, 128), "kv_a_proj": (5, 576, 256)}
"""Tokens M, outputs N, inputs K."""


def quantised(x: torch.Tensor) -> dict[str, torch.Tensor]:
    found = {"input": x}
    for name, block in BLOCKS.items():
        for power_of_two in (False, True):
            q = quantize(x, block, power_of_two=power_of_two)
            kind = f"{name}{'_power_of_two' if power_of_two else ''}"
            found |= {f"{kind}/codes": q.codes, f"{kind}/scales": q.scales}
    return found


def products(m: int, n: int, k: int) -> dict[str, torch.Tensor]:
    made = seeded(m + n + k)
    x, w, dy = (torch.randn(*size, generator=made).bfloat16() for size in ((m, k), (n, k), (m, n)))
    backend = Reference()
    cached = quantize(x, TILE, power_of_two=True)
    q: dict[str, QTensor] = {
        "x": cached, "w": quantize(w, SQUARE), "dy": quantize(dy, TILE),
        "dy_columns": quantize(dy, COLUMN), "x_columns": quantize(cached.dequantize(), COLUMN, power_of_two=True),
    }  # fmt: skip
    found = {"input/x": x, "input/w": w, "input/dy": dy}
    for name, held in q.items():
        found |= {f"{name}/codes": held.codes, f"{name}/scales": held.scales}
    found["fprop"] = backend.product(q["x"], q["w"], torch.float32)
    found["dgrad"] = backend.product(q["dy"], q["w"].T, torch.float32)
    found["wgrad"] = backend.wgrad(dy, q["x"].dequantize())
    return found


def vectors() -> dict[str, dict[str, torch.Tensor]]:
    """Files by name."""
    return {f"quantize_{name}": quantised(make()) for name, make in CASES.items()} | {
        f"product_{name}": products(*sizes) for name, sizes in PRODUCTS.items()
    }


if __name__ == "__main__":
    VECTORS.mkdir(exist_ok=True)
    for name, tensors in vectors().items():
        save_file({key: t.contiguous() for key, t in tensors.items()}, VECTORS / f"{name}.safetensors")
