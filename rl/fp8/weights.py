"""The codes of a master weight: one function of it, computed once per change.

Whoever needs the codes, a forward or backward pass, a weight update, a checkpoint, asks here, so all of them get the same. Codes that
came with a checkpoint are taken over as they are and stay until the master is changed; fixed ones (an adapter's base, an engine's copy)
stay for ever. Of a master that ranks share, each rank holds the codes of its part, and `of` gathers them (`sharded.py`).
"""

import torch
from torch.distributed.tensor import DTensor

from rl.fp8.quantize import SQUARE, QTensor, quantize
from rl.fp8.sharded import gathered, gradient_of, part_of, quantize_part


class Codes:
    """Of one weight, [N, K] or [E, N, K], in 128x128 blocks."""

    def __init__(self, given: QTensor | None = None):
        self.held = given
        """What was computed last, or came with a checkpoint; this rank's part of it where ranks share the master."""
        self.fixed = False
        """Whether `held` are the weights, and the master is not asked again."""
        self._version: int | None = None

    def of(self, master: torch.Tensor) -> QTensor:
        """The codes of the master as it is now; collective where ranks share it."""
        if self.held is None or not (self.fixed or self._version in (None, master._version)):
            self.held = quantize_part(master) if isinstance(master, DTensor) else quantize(master.detach(), SQUARE)
        elif self.held.codes.device != master.device:
            self.held = self.held.to(master.device)
        self._version = master._version
        return gathered(self.held, master) if isinstance(master, DTensor) else self.held

    def shape_of(self, master: torch.Tensor) -> torch.Size:
        """Of the codes, without computing them."""
        return self.held.codes.shape if self.fixed and self.held is not None else master.shape

    def fix(self, master: torch.Tensor) -> QTensor:
        """From now on these are the codes, whatever becomes of the master."""
        held = self.of(master)
        self.held, self.fixed = held, True
        return held

    def share(self, master: torch.Tensor) -> None:
        """From now on ranks share the master."""
        assert isinstance(master, DTensor) and not self.fixed, "fixed codes have no master to share"
        if self.held is not None:
            self.held = part_of(self.held, master)
        self._version = None


class StraightThrough(torch.autograd.Function):
    """The value of the codes, with the gradient of the master: products in high precision over quantised weights."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, master: torch.Tensor, codes: Codes, dtype: torch.dtype) -> torch.Tensor:
        ctx.save_for_backward(master)
        return codes.of(master).dequantize(dtype)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (master,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return gradient_of(master, grad), None, None
