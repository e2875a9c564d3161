"""Products through torch's `scaled_mm` on Hopper (cuBLASLt 12.9 or later). Written after torch 2.13's checks; has never run on a GPU.

cuBLASLt takes a row-major, b column-major; scales of 1x128 tiles in columns of length M, M a multiple of 4; scales of 128x128 blocks in
columns padded to a multiple of 4; sizes in multiples of 16. torch has no grouped product with these scales, so experts are a loop.
"""

import torch
from torch.nn.functional import ScalingType, pad, scaled_mm

from rl.fp8.quantize import COLUMN, E4M3, SQUARE, QTensor, quantize
from rl.fp8.reference import spans


def missing(device: torch.device) -> str | None:
    """What this machine lacks, or None."""
    major, minor = torch.cuda.get_device_capability(device)
    if major != 9:
        return f"a Hopper GPU (capability 9.0), this one has {major}.{minor}"
    cuda = torch.version.cuda or "none"
    if tuple(map(int, cuda.split(".")[:2])) < (12, 9):
        return f"torch built for CUDA 12.9 or later, this one is for {cuda}"
    return None


class ScaledMM:
    """Implements `rl.fp8.backends.Backend`."""

    name = "torch"

    def quantize(self, x: torch.Tensor, block: tuple[int, int], *, power_of_two: bool = False) -> QTensor:
        return quantize(x, block, power_of_two=power_of_two)

    def product(self, a_MK: QTensor, b_NK: QTensor, dtype: torch.dtype) -> torch.Tensor:
        rows, columns = a_MK.codes.shape[0], b_NK.codes.shape[0]
        a, scale_a, kind_a = _operand(a_MK)
        b, scale_b, kind_b = _operand(b_NK)
        out = scaled_mm(a, b.T, scale_a, kind_a, scale_b, kind_b, output_dtype=dtype)
        return out[:rows, :columns]

    def wgrad(self, dy_MN: torch.Tensor, x_MK: torch.Tensor) -> torch.Tensor:
        return self.product(quantize(dy_MN, COLUMN).T, quantize(x_MK, COLUMN, power_of_two=True).T, torch.float32)

    def grouped(self, a_SK: QTensor, b_ENK: QTensor, ends_E: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        out_SN = torch.zeros(len(a_SK.codes), b_ENK.codes.shape[1], dtype=dtype, device=a_SK.codes.device)
        for expert, rows in enumerate(spans(ends_E)):
            if rows.start < rows.stop:
                out_SN[rows] = self.product(QTensor(a_SK.codes[rows], a_SK.scales[rows], a_SK.block), b_ENK[expert], dtype)
        return out_SN

    def grouped_wgrad(self, dy_SN: torch.Tensor, x_SK: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
        out_ENK = torch.zeros(len(ends_E), dy_SN.shape[1], x_SK.shape[1], device=x_SK.device)
        for expert, rows in enumerate(spans(ends_E)):
            if rows.start < rows.stop:
                out_ENK[expert] = self.wgrad(dy_SN[rows], x_SK[rows])
        return out_ENK


def _operand(q: QTensor) -> tuple[torch.Tensor, torch.Tensor, ScalingType]:
    """Codes, row-major and padded to multiples of 16, and scales as cuBLASLt reads them."""
    rows, width = q.codes.shape
    codes = pad(q.codes.contiguous().view(torch.uint8), (0, -width % 16, 0, -rows % 16)).view(E4M3)
    if q.block == SQUARE:
        # [ceil(K / 128) rounded up to 4, ceil(N / 128)] with stride 1 along K
        return codes, pad(q.scales, (0, -q.scales.shape[1] % 4)).contiguous().T, ScalingType.BlockWise128x128
    # [M, ceil(K / 128)] with stride 1 along M
    return codes, pad(q.scales, (0, 0, 0, -rows % 16)).T.contiguous().T, ScalingType.BlockWise1x128
