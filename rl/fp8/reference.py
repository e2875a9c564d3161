"""The specification of the products: dequantise, multiply 128 wide along the summed dimension, add up in FP32.

A kernel may add in another order inside of a 128-wide block, so it agrees up to FP32 rounding. This runs anywhere; on a CPU it is also
the fastest there is (torch's own FP8 product takes 2000 times as long).

    S  rows, sorted by expert      E  experts      ends_E  where each expert's rows end
"""

import torch

from rl.fp8.quantize import BLOCK, COLUMN, QTensor, quantize


class Reference:
    """Implements `rl.fp8.backends.Backend`."""

    name = "reference"

    def quantize(self, x: torch.Tensor, block: tuple[int, int], *, power_of_two: bool = False) -> QTensor:
        return quantize(x, block, power_of_two=power_of_two)

    def product(self, a_MK: QTensor, b_NK: QTensor, dtype: torch.dtype) -> torch.Tensor:
        return product(a_MK, b_NK).to(dtype)

    def wgrad(self, dy_MN: torch.Tensor, x_MK: torch.Tensor) -> torch.Tensor:
        return product(quantize(dy_MN, COLUMN).T, quantize(x_MK, COLUMN, power_of_two=True).T)

    def grouped(self, a_SK: QTensor, b_ENK: QTensor, ends_E: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        out_SN = a_SK.scales.new_zeros(len(a_SK.codes), b_ENK.codes.shape[1])
        for expert, rows in enumerate(spans(ends_E)):
            if rows.start < rows.stop:
                out_SN[rows] = product(QTensor(a_SK.codes[rows], a_SK.scales[rows], a_SK.block), b_ENK[expert])
        return out_SN.to(dtype)

    def grouped_wgrad(self, dy_SN: torch.Tensor, x_SK: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
        out_ENK = torch.zeros(len(ends_E), dy_SN.shape[1], x_SK.shape[1], device=x_SK.device)
        for expert, rows in enumerate(spans(ends_E)):
            if rows.start < rows.stop:  # tiles along the tokens begin anew with each expert
                out_ENK[expert] = self.wgrad(dy_SN[rows], x_SK[rows])
        return out_ENK


def product(a_MK: QTensor, b_NK: QTensor) -> torch.Tensor:
    """a b^T in FP32."""
    a, b = a_MK.dequantize(), b_NK.dequantize()
    out_MN = a.new_zeros(a.shape[0], b.shape[0])
    for k in range(0, a.shape[1], BLOCK):
        out_MN.addmm_(a[:, k : k + BLOCK], b[:, k : k + BLOCK].T)
    return out_MN


def spans(ends_E: torch.Tensor) -> list[slice]:
    """Each expert's rows."""
    ends = ends_E.tolist()
    return [slice(begin, end) for begin, end in zip([0, *ends], ends, strict=False)]
