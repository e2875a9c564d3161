"""What test_kernels.py runs in Triton's interpreter: products of ready codes against the reference. Prints name and largest error.

Run with TRITON_INTERPRET=1, which Triton reads when a kernel is defined.
"""

import torch

from rl.fp8.kernels import ROWS, Tiles, TritonKernels, columns_product
from rl.fp8.quantize import COLUMN, E4M3, SQUARE, TILE, QTensor, quantize
from rl.fp8.reference import Reference, spans


def error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((got - wanted).norm() / wanted.norm()).item()


def columns_of(x_SC: torch.Tensor, ends_E: torch.Tensor, tiles: Tiles, power_of_two: bool) -> QTensor:
    """As the quantise kernel lays them out, which the interpreter cannot run."""
    codes = torch.full((len(tiles.expert) * ROWS, x_SC.shape[1]), float("nan")).to(E4M3)  # what is read beyond the last tile shows
    scales = torch.full((len(tiles.expert), x_SC.shape[1]), float("nan"))
    for expert, rows in enumerate(spans(ends_E)):
        first = int(tiles.begins[expert])
        q = quantize(x_SC[rows], COLUMN, power_of_two=power_of_two)
        count = len(q.scales)
        codes.view(torch.uint8)[first * ROWS : (first + count) * ROWS] = 0
        codes.view(torch.uint8)[first * ROWS : first * ROWS + rows.stop - rows.start] = q.codes.view(torch.uint8)
        scales[first : first + count] = q.scales
    return QTensor(codes, scales, COLUMN)


def scales_differ(block: tuple[int, int], power_of_two: bool) -> float:
    """The share of scales that are not torch's to the bit, a NaN and an infinity among the values. Scales are no FP8."""
    x = torch.randn(300, 400) * torch.logspace(-30, 30, 400)
    x[3, 7], x[200, 300], x[299, 399] = float("nan"), float("inf"), 0.0
    x[128:256, 128:256] = 0.0
    got, wanted = TritonKernels().quantize(x, block, power_of_two=power_of_two).scales, quantize(x, block, power_of_two=power_of_two).scales
    return ((got != wanted) & ~(got.isnan() & wanted.isnan())).float().mean().item()


def main() -> None:
    torch.manual_seed(0)
    reference, triton = Reference(), TritonKernels()
    for block in (TILE, COLUMN, SQUARE):
        for power_of_two in (False, True):
            print(f"scales {block} {power_of_two}:", scales_differ(block, power_of_two))
    for name, counts, n, k in (
        ("even", [128, 128], 128, 256),
        ("ragged", [3, 0, 129, 70], 192, 320),
        ("one row", [0, 1, 0], 128, 128),
        ("576 columns", [40], 576, 128),
    ):
        ends_E = torch.tensor(counts).cumsum(0)
        rows = int(ends_E[-1])
        x, dy, w = torch.randn(rows, k), torch.randn(rows, n), torch.randn(len(counts), n, k)
        a, b, d = quantize(x, TILE, power_of_two=True), quantize(w, SQUARE), quantize(dy, TILE)
        tiles = Tiles.of(ends_E, rows)
        wgrad = columns_product(columns_of(dy, ends_E, tiles, False), columns_of(x, ends_E, tiles, True), tiles)
        print(f"fprop {name}:", error(triton.grouped(a, b, ends_E, torch.float32), reference.grouped(a, b, ends_E, torch.float32)))
        print(f"dgrad {name}:", error(triton.grouped(d, b.T, ends_E, torch.float32), reference.grouped(d, b.T, ends_E, torch.float32)))
        print(f"wgrad {name}:", error(wgrad, reference.grouped_wgrad(dy, x, ends_E)))
        print(f"dense {name}:", error(triton.product(a, b[0], torch.float32), reference.product(a, b[0], torch.float32)))


main()
