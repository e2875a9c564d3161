"""Blocks of a tensor as E4M3 codes with one FP32 scale each: x ≈ codes * scale.

The scale is `max(amax, 448 * 2^-126) / 448` in FP32, so that the largest value of a block becomes the largest code and the scale is
never subnormal (a GPU may flush those). With `power_of_two` it is rounded up to the next power of two: then a tensor can be cut into
other tiles later and keeps almost every value. Codes are `x / scale`, clamped to ±448 and rounded to nearest, ties to even. A block
with a NaN or an infinity becomes NaN: a wrong value is never hidden.
"""

from dataclasses import dataclass

import torch

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0
SMALLEST_SCALE = 2.0**-126
BLOCK = 128
TILE = (1, BLOCK)
"""Of activations: 128 values of one token."""
COLUMN = (BLOCK, 1)
"""Of activations in the weight gradient: one value of 128 tokens."""
SQUARE = (BLOCK, BLOCK)
"""Of weights."""


@dataclass(frozen=True)
class QTensor:
    """Codes [..., R, C] in float8_e4m3fn and scales [..., ceil(R / rows), ceil(C / cols)] in float32; blocks at the edges may be cut."""

    codes: torch.Tensor
    scales: torch.Tensor
    block: tuple[int, int]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """codes * scales, computed in FP32."""
        rows, cols = self.block
        scales = self.scales
        if rows > 1:
            scales = scales.repeat_interleave(rows, -2)[..., : self.codes.shape[-2], :]
        if cols > 1:
            scales = scales.repeat_interleave(cols, -1)[..., : self.codes.shape[-1]]
        return (self.codes.float() * scales).to(dtype)

    @property
    def T(self) -> "QTensor":
        """Rows and columns exchanged, without a copy."""
        return QTensor(self.codes.transpose(-1, -2), self.scales.transpose(-1, -2), self.block[::-1])

    def __getitem__(self, index: int) -> "QTensor":
        """One of several matrices, as a view."""
        return QTensor(self.codes[index], self.scales[index], self.block)

    def rows(self, index: torch.Tensor) -> "QTensor":
        """Rows by number, a row perhaps several times; blocks must be one row high."""
        assert self.block[0] == 1, f"rows of blocks {self.block} cannot be taken apart"
        return QTensor(self.codes.view(torch.uint8)[index].view(E4M3), self.scales[index], self.block)

    def to(self, device: torch.device) -> "QTensor":
        return QTensor(self.codes.to(device), self.scales.to(device), self.block)

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes


def quantize(x: torch.Tensor, block: tuple[int, int], *, power_of_two: bool = False) -> QTensor:
    """Codes and scales of `x` [..., R, C], any floating type, in blocks of (rows, cols) of its last two dimensions.

    Sizes need not be multiples of the block: the last block of a row or column is then smaller. Gradients do not pass.
    """
    with torch.no_grad():
        blocks = blocks_of(x, block)
        scales = scale_of(blocks.abs().amax((-3, -1)), power_of_two)
        codes = encode(blocks, scales)[..., : x.shape[-2], : x.shape[-1]]
        return QTensor(codes.contiguous().view(E4M3), scales, block)


def blocks_of(x: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """[..., R/rows, rows, C/cols, cols] in FP32, the last block of a row or column filled up with zeros."""
    rows, cols = block
    padded = torch.nn.functional.pad(x.float(), (0, -x.shape[-1] % cols, 0, -x.shape[-2] % rows))
    return padded.unflatten(-1, (-1, cols)).unflatten(-3, (-1, rows))


def encode(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Codes as bytes [..., R, C], the filling included."""
    codes = (blocks / scales[..., :, None, :, None]).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3)
    return codes.view(torch.uint8).flatten(-2).flatten(-3, -2)


def scale_of(amax: torch.Tensor, power_of_two: bool) -> torch.Tensor:
    """The scale of a block from its largest absolute value, in FP32."""
    scale = amax.clamp(min=E4M3_MAX * SMALLEST_SCALE) / E4M3_MAX
    if not power_of_two:
        return scale
    mantissa, exponent = torch.frexp(scale)  # scale = mantissa * 2^exponent, mantissa in [1/2, 1); exact, unlike a logarithm
    up = torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).to(exponent.dtype))
    return torch.where(scale.isfinite(), up, scale)
