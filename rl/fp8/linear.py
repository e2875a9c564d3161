"""A linear layer whose three products run in FP8, and which saves codes of its input instead of the input.

M  tokens      K  inputs      N  outputs
"""

from typing import Any
from weakref import ReferenceType, ref

import torch
from torch.autograd.function import once_differentiable

from rl.fp8.backends import Backend
from rl.fp8.quantize import TILE, QTensor
from rl.fp8.sharded import gradient_of
from rl.fp8.weights import Codes, StraightThrough


class Fp8Linear(torch.nn.Linear):
    """In the place of an nn.Linear, over the same parameters: `weight` is the master."""

    codes: Codes
    backend: Backend
    quantize_activations: bool

    @classmethod
    def over(cls, linear: torch.nn.Linear, codes: Codes, backend: Backend, quantize_activations: bool) -> "Fp8Linear":
        """`quantize_activations` off: products in the type of the input, with the values of the codes (W8A16)."""
        layer = cls.__new__(cls)
        torch.nn.Module.__init__(layer)
        layer.in_features, layer.out_features = linear.in_features, linear.out_features
        layer.weight, layer.bias = linear.weight, linear.bias
        layer.codes, layer.backend, layer.quantize_activations = codes, backend, quantize_activations
        return layer

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not self.quantize_activations:
            return torch.nn.functional.linear(input, StraightThrough.apply(self.weight, self.codes, input.dtype), self.bias)
        q_MK = quantized_once(input, self.backend)
        out_MN = _Linear.apply(input.reshape(-1, input.shape[-1]), self.weight, q_MK.codes, q_MK.scales, self.codes, self.backend)
        out = out_MN.unflatten(0, input.shape[:-1])
        return out if self.bias is None else out + self.bias


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_MK: torch.Tensor, master: torch.Tensor, codes_MK: torch.Tensor, scales: torch.Tensor, weight: Codes, backend: Backend
    ) -> torch.Tensor:
        ctx.save_for_backward(codes_MK, scales, master)
        ctx.weight, ctx.backend = weight, backend
        return backend.product(QTensor(codes_MK, scales, TILE), weight.of(master), x_MK.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_MN: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        codes_MK, scales, master = ctx.saved_tensors
        dx_MK = d_master = None
        if ctx.needs_input_grad[0]:
            dx_MK = ctx.backend.product(ctx.backend.quantize(dy_MN, TILE), ctx.weight.of(master).T, dy_MN.dtype)
        if ctx.needs_input_grad[1]:
            x_MK = QTensor(codes_MK, scales, TILE).dequantize()
            d_master = gradient_of(master, ctx.backend.wgrad(dy_MN, x_MK))
        return dx_MK, d_master, None, None, None, None


_last: tuple["ReferenceType[torch.Tensor]", int, QTensor] | None = None


def quantized_once(x: torch.Tensor, backend: Backend) -> QTensor:
    """Codes of the rows of `x` [..., K]. The last ones are kept: projections of one input (q, k and v) share them, in time and memory."""
    global _last
    version = 0 if x.is_inference() else x._version
    last = _last
    if last is not None and last[0]() is x and last[1] == version:
        return last[2]
    q_MK = backend.quantize(x.detach().reshape(-1, x.shape[-1]), TILE, power_of_two=True)
    _last = (ref(x), version, q_MK)
    return q_MK
