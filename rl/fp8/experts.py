"""The experts of a layer in FP8, from dispatch to combine.

The forward quantises each token once, before it is dispatched, and hands rows of codes to its experts. Saved for the backward are
codes of the tokens and codes of what SwiGLU takes; SwiGLU is computed again from them. The gradient of a routing weight is
<dy, W2 h> = <W2^T dy, h>, which needs Dgrad's own result and not the experts' outputs, so those are not saved either. The backward
quantises the incoming gradient once a token too.

    T  tokens      K  experts a token      S = T * K, sorted by expert      E  experts      D  hidden size      I  width of an expert
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from rl.fp8.backends import Backend
from rl.fp8.quantize import TILE, QTensor
from rl.fp8.sharded import gradient_of
from rl.fp8.weights import Codes, StraightThrough

NAME = "cohort_fp8"
"""In transformers' registry of expert implementations."""


@dataclass
class ExpertCodes:
    """What `rl.fp8.convert` adds to a module of experts, as `fp8`."""

    gate_up_proj: Codes
    down_proj: Codes
    backend: Backend
    quantize_activations: bool


@dataclass(frozen=True)
class Dispatch:
    """Who goes where."""

    order_S: torch.Tensor
    """Which of the T * K choices stands at this place."""
    token_S: torch.Tensor
    ends_E: torch.Tensor
    """Where each expert's rows end, int32."""

    @classmethod
    def of(cls, index_TK: torch.Tensor, experts: int) -> "Dispatch":
        order_S = index_TK.flatten().argsort(stable=True)
        ends_E = torch.bincount(index_TK.flatten(), minlength=experts).cumsum(0).to(torch.int32)
        return cls(order_S, order_S // index_TK.shape[1], ends_E)

    def combine(self, rows_SD: torch.Tensor, tokens: int) -> torch.Tensor:
        """The sum of each token's rows, always in the same order."""
        back_S = torch.empty_like(self.order_S)
        back_S[self.order_S] = torch.arange(len(self.order_S), device=self.order_S.device)
        return rows_SD[back_S].view(tokens, -1, rows_SD.shape[1]).sum(1)


def experts_forward(layer: Any, hidden_TD: torch.Tensor, index_TK: torch.Tensor, weight_TK: torch.Tensor) -> torch.Tensor:
    """What transformers calls in the place of an experts module's own forward."""
    assert not layer._is_expert_parallel, "experts spread over ranks by transformers are not there"
    fp8: ExpertCodes = layer.fp8
    adapted = not (isinstance(layer.gate_up_proj, torch.nn.Parameter) and isinstance(layer.down_proj, torch.nn.Parameter))
    if adapted:  # an adapter's matrices are added to the values of the codes
        return _high_precision(layer, hidden_TD, index_TK, weight_TK, layer.gate_up_proj, layer.down_proj)
    if not fp8.quantize_activations:
        gate_up = StraightThrough.apply(layer.gate_up_proj, fp8.gate_up_proj, hidden_TD.dtype)
        down = StraightThrough.apply(layer.down_proj, fp8.down_proj, hidden_TD.dtype)
        return _high_precision(layer, hidden_TD, index_TK, weight_TK, gate_up, down)
    return _Experts.apply(hidden_TD, weight_TK, layer.gate_up_proj, layer.down_proj, index_TK, layer)


ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)


def _high_precision(
    layer: Any, hidden_TD: torch.Tensor, index_TK: torch.Tensor, weight_TK: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    sent = Dispatch.of(index_TK, layer.num_experts)
    product = torch.nn.functional.grouped_mm
    kind = hidden_TD.dtype
    h_SI = layer._apply_gate(product(hidden_TD[sent.token_S], gate_up.to(kind).transpose(-1, -2), offs=sent.ends_E))
    y_SD = product(h_SI, down.to(kind).transpose(-1, -2), offs=sent.ends_E)
    return sent.combine(y_SD * weight_TK.flatten()[sent.order_S, None], len(hidden_TD)).to(kind)


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: torch.Tensor,
        weight_TK: torch.Tensor,
        gate_up: torch.Tensor,
        down: torch.Tensor,
        index_TK: torch.Tensor,
        layer: Any,
    ) -> torch.Tensor:
        fp8, backend, kind = layer.fp8, layer.fp8.backend, hidden_TD.dtype
        sent = Dispatch.of(index_TK, layer.num_experts)
        x_TD = backend.quantize(hidden_TD, TILE, power_of_two=True)
        a_S2I = backend.grouped(x_TD.rows(sent.token_S), fp8.gate_up_proj.of(gate_up), sent.ends_E, kind)
        h_SI = backend.quantize(layer._apply_gate(a_S2I), TILE, power_of_two=True)
        y_SD = backend.grouped(h_SI, fp8.down_proj.of(down), sent.ends_E, kind)
        saved = backend.quantize(a_S2I, TILE, power_of_two=True)
        ctx.save_for_backward(x_TD.codes, x_TD.scales, saved.codes, saved.scales, weight_TK, gate_up, down, sent.order_S, sent.ends_E)
        ctx.layer, ctx.kind = layer, kind
        return sent.combine(y_SD * weight_TK.flatten()[sent.order_S, None], len(hidden_TD)).to(kind)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_codes, x_scales, a_codes, a_scales, weight_TK, gate_up, down, order_S, ends_E = ctx.saved_tensors
        layer, fp8, backend, kind = ctx.layer, ctx.layer.fp8, ctx.layer.fp8.backend, ctx.kind
        token_S = order_S // weight_TK.shape[1]
        sent = Dispatch(order_S, token_S, ends_E)
        weight_S1 = weight_TK.flatten()[order_S, None]
        with torch.enable_grad():
            a_S2I = QTensor(a_codes, a_scales, TILE).dequantize(kind).requires_grad_()
            h_SI = layer._apply_gate(a_S2I)
        dy_q = backend.quantize(dy_TD, TILE).rows(token_S)
        dh_SI = backend.grouped(dy_q, fp8.down_proj.of(down).T, ends_E, kind)
        d_weight_S = (dh_SI.float() * h_SI.detach().float()).sum(-1)
        (da_S2I,) = torch.autograd.grad(h_SI, a_S2I, (dh_SI * weight_S1).to(kind))
        dx_SD = backend.grouped(backend.quantize(da_S2I, TILE), fp8.gate_up_proj.of(gate_up).T, ends_E, kind)
        d_gate_up = d_down = None
        if ctx.needs_input_grad[2]:
            x_TD = QTensor(x_codes, x_scales, TILE).dequantize()
            d_gate_up = gradient_of(gate_up, backend.grouped_wgrad(da_S2I, x_TD[token_S], ends_E))
        if ctx.needs_input_grad[3]:
            d_down = gradient_of(down, backend.grouped_wgrad(dy_TD[token_S] * weight_S1, h_SI.detach(), ends_E))
        d_weight_TK = torch.empty_like(weight_TK).flatten()
        d_weight_TK[order_S] = d_weight_S.to(weight_TK.dtype)
        return sent.combine(dx_SD, len(dy_TD)), d_weight_TK.view_as(weight_TK), d_gate_up, d_down, None, None
