"""The codes of a master weight: one function of it, computed once per change.

Whoever needs the codes, a forward or backward pass, a weight update, a checkpoint, asks here, so all of them get the same. Codes that
came with a checkpoint are taken over as they are and stay until the master is changed; fixed ones (an adapter's base, an engine's copy)
stay for ever.
"""

import torch

from rl.fp8.quantize import SQUARE, QTensor, quantize


class Codes:
    """Of one weight, [N, K] or [E, N, K], in 128x128 blocks."""

    def __init__(self, given: QTensor | None = None):
        self.held = given
        """What was computed last, or came with a checkpoint."""
        self.fixed = False
        """Whether `held` are the weights, and the master is not asked again."""
        self.keep = True
        """Whether to hold codes between passes; not where FSDP gathers the master anew in each, over the same memory."""
        self._version: int | None = None

    def of(self, master: torch.Tensor) -> QTensor:
        """The codes of the master as it is now."""
        if self.fixed:
            assert self.held is not None
            if self.held.codes.device != master.device:
                self.held = self.held.to(master.device)
            return self.held
        if not self.keep:
            return quantize(master.detach(), SQUARE)
        if self.held is None or self._version not in (None, master._version):
            self.held = quantize(master.detach(), SQUARE)
        elif self.held.codes.device != master.device:
            self.held = self.held.to(master.device)
        self._version = master._version
        return self.held

    def shape_of(self, master: torch.Tensor) -> torch.Size:
        """Of the codes, without computing them."""
        return master.shape if self.held is None else self.held.codes.shape

    def fix(self, master: torch.Tensor) -> QTensor:
        """From now on these are the codes, whatever becomes of the master."""
        held = self.of(master)
        self.held, self.fixed = held, True
        return held


class StraightThrough(torch.autograd.Function):
    """The value of the codes, with the gradient of the master: products in high precision over quantised weights."""

    @staticmethod
    def forward(ctx: object, master: torch.Tensor, codes: Codes, dtype: torch.dtype) -> torch.Tensor:
        return codes.of(master).dequantize(dtype)

    @staticmethod
    def backward(ctx: object, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return grad, None, None
