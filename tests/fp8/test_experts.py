"""The experts in FP8 against transformers' own, on the same routes, and what they save for the backward."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from rl.config import Fp8Config
from rl.fp8 import experts
from rl.fp8.experts import ExpertCodes
from rl.fp8.quantize import SQUARE, quantize
from rl.fp8.reference import Reference
from rl.fp8.weights import Codes

T, K, E, D, I = 512, 2, 8, 512, 256  # noqa: E741 - the letters of rl/fp8/experts.py


def made(dtype: torch.dtype = torch.float32) -> tuple[Any, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A module of experts with random weights, inputs, routes and routing weights; one expert gets no token."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(hidden_size=D, moe_intermediate_size=I, num_experts=E, num_experts_per_tok=K)
    config._experts_implementation = "grouped_mm"
    layer = Qwen3MoeExperts(config).to(dtype)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    hidden_TD = torch.randn(T, D, dtype=dtype)
    scores_TE = torch.randn(T, E)
    scores_TE[:, 5] = -100.0
    weight_TK, index_TK = scores_TE.softmax(-1).topk(K)
    return layer, hidden_TD, index_TK, weight_TK.to(dtype)


def in_fp8(layer: Any, **options: bool) -> Any:
    ours = copy.deepcopy(layer)
    ours.config._experts_implementation = experts.NAME
    ours.fp8 = ExpertCodes(Codes(), Codes(), Reference(), options.get("quantize_activations", True))
    return ours


def run(layer: Any, hidden_TD: torch.Tensor, index_TK: torch.Tensor, weight_TK: torch.Tensor) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    hidden, weight = hidden_TD.clone().requires_grad_(), weight_TK.clone().requires_grad_()
    out = layer(hidden, index_TK, weight)
    out.backward(torch.randn_like(out))
    grads = {f"d {name}": p.grad for name, p in layer.named_parameters()}
    return {"out": out.detach(), "d hidden": hidden.grad, "d weight": weight.grad, **grads}


def distances(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> dict[str, float]:
    return {name: ((got[name].float() - x.float()).norm() / x.float().norm()).item() for name, x in wanted.items()}


def test_results_and_gradients_are_those_of_transformers_within_the_error_of_fp8() -> None:
    """Two products in a row and SwiGLU between them: between 1 and 2.5 times the .037 of a product."""
    layer, *inputs = made()
    found = distances(run(in_fp8(layer), *inputs), run(layer, *inputs))
    assert found.keys() == {"out", "d hidden", "d weight", "d gate_up_proj", "d down_proj"}
    assert all(0.03 < value < 0.0925 for value in found.values()), found


def test_an_expert_without_tokens_gets_no_gradient_and_the_others_do() -> None:
    layer, *inputs = made()
    by_expert = run(in_fp8(layer), *inputs)["d down_proj"].abs().amax((1, 2))
    assert by_expert[5] == 0 and (by_expert > 0).sum() == E - 1


def test_without_quantised_activations_they_are_transformers_experts_with_the_values_of_the_codes() -> None:
    layer, *inputs = made()
    rounded = copy.deepcopy(layer)
    for parameter in rounded.parameters():
        parameter.data = quantize(parameter, SQUARE).dequantize()
    found = distances(run(in_fp8(layer, quantize_activations=False), *inputs), run(rounded, *inputs))
    assert max(found.values()) < 1e-5, found


def saved_bytes(layer: Any, *inputs: torch.Tensor) -> int:
    """What autograd keeps from dispatch to combine, parameters apart, each storage once."""
    kept: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in layer.parameters()}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        place = tensor.untyped_storage()
        if place.data_ptr() not in own:
            kept[place.data_ptr()] = place.nbytes()
        return tensor

    hidden, index_TK, weight_TK = inputs
    with saved_tensors_hooks(note, lambda tensor: tensor):
        out = layer(hidden.requires_grad_(), index_TK, weight_TK.requires_grad_())
    assert out.requires_grad
    return sum(kept.values())


def test_saved_activations_are_at_most_055_of_bf16s() -> None:
    """Of transformers' own experts in BF16, and of a BF16 that saved the same tensors: the tokens, and what SwiGLU takes."""
    layer, *inputs = made(torch.bfloat16)
    stock = saved_bytes(layer, *inputs)
    ours = saved_bytes(in_fp8(layer), *inputs)
    same_in_bf16 = 2 * (T * D + T * K * 2 * I) + inputs[2].nbytes + 8 * T * K
    print(f"saved: FP8 {ours:,} bytes, BF16 as transformers {stock:,}, BF16 with SwiGLU recomputed {same_in_bf16:,}")
    assert ours / stock < 0.55
    assert ours / same_in_bf16 < 0.55


@pytest.mark.parametrize("width", [96, 192])
def test_experts_of_a_width_that_blocks_do_not_fit_are_refused(tmp_path: Path, width: int) -> None:
    from transformers import Qwen3MoeForCausalLM

    from data.recipe import InputError
    from rl.fp8.convert import convert

    config = Qwen3MoeConfig(
        vocab_size=64, hidden_size=128, moe_intermediate_size=width, num_hidden_layers=1, num_experts=2, num_attention_heads=2, head_dim=32
    )
    with pytest.raises(InputError, match=rf"experts' width {width} have to be multiples of 128.*policy.fp8.keep"):
        convert(Qwen3MoeForCausalLM(config), Fp8Config(), torch.device("cpu"))
    convert(Qwen3MoeForCausalLM(config), Fp8Config(keep=["lm_head", "experts"]), torch.device("cpu"))


def test_every_dispatched_row_comes_back_to_its_token() -> None:
    index_TK = torch.tensor([[2, 0], [0, 1], [2, 1]])
    sent = experts.Dispatch.of(index_TK, 4)
    assert sent.ends_E.tolist() == [2, 4, 6, 6]
    assert sent.token_S.tolist() == [0, 1, 1, 2, 0, 2]
    rows_SD = torch.tensor([[10.0 ** int(t)] for t in sent.token_S])
    assert sent.combine(rows_SD, 3).flatten().tolist() == [2.0, 20.0, 200.0]
