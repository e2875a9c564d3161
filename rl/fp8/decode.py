"""Codes that arrive tensor by tensor become values: for an engine that has no product of block-FP8 weights and computes in high precision.

A weight and its scales come under two names, in any order, and other tensors may come between them.
"""

from collections.abc import Iterable, Iterator

import torch

from rl.fp8.layout import SCALE
from rl.fp8.quantize import BLOCK, E4M3, SQUARE, QTensor


class Decoder:
    """One model's worth of tensors: `values` for each part of it that arrives, then `end`."""

    def __init__(self, dtype: torch.dtype):
        """dtype: of the values; tensors that are no codes pass as they are."""
        self.dtype = dtype
        self.waiting: dict[str, torch.Tensor] = {}
        """Codes without scales and scales without codes."""

    def values(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """Each tensor under its name, codes as codes x scales as soon as both are there."""
        for name, tensor in tensors:
            if tensor.dtype is not E4M3 and not name.endswith(SCALE):
                yield name, tensor
                continue
            weight = name.removesuffix(SCALE)
            partner = self.waiting.pop(weight if name.endswith(SCALE) else name + SCALE, None)
            if partner is None:
                self.waiting[name] = tensor
                continue
            codes, scales = (partner, tensor) if name.endswith(SCALE) else (tensor, partner)
            wanted = tuple(-(-size // BLOCK) for size in codes.shape)
            if tuple(scales.shape) != wanted:
                raise ValueError(f"{weight}{SCALE} has shape {tuple(scales.shape)}, but {weight} in 128x128 blocks needs {wanted}")
            yield weight, QTensor(codes, scales, SQUARE).dequantize(self.dtype)

    def end(self) -> None:
        """ValueError if something still waits for its partner, which its receiver would otherwise go without."""
        alone, self.waiting = list(self.waiting), {}
        if alone:
            lacks = "codes" if alone[0].endswith(SCALE) else "scales"
            raise ValueError(f"{alone[0]} came without its {lacks}; send `weight` and `weight{SCALE}` in one update")
