"""A transformers model becomes an FP8 one, in place: nn.Linear by replacement, experts through transformers' registry.

What `policy.fp8.keep` names stays in high precision, as do embedding, norms and routers, which are no nn.Linear. Masters keep their names
and their type; all other parameters take the type of `policy.fp8.rest`.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from data.recipe import InputError
from rl import attention
from rl.config import Fp8Config
from rl.fp8 import experts
from rl.fp8.backends import Backend, backend_named
from rl.fp8.experts import ExpertCodes
from rl.fp8.files import Fp8Files, is_block_fp8
from rl.fp8.layout import EXPERT_MATRICES, coded
from rl.fp8.linear import Fp8Linear
from rl.fp8.quantize import BLOCK, SQUARE, QTensor
from rl.fp8.weights import Codes
from rl.policy import load_model

REST = {"fp32": torch.float32, "bf16": torch.bfloat16}
Masters = Literal["trained", "values", "none"]
"""trained: codes follow them. values: codes are fixed, and the weights are their values (an adapter's base). none: codes are fixed, and the
weights are empty (an engine's copy, a reference)."""


def convert(
    model: PreTrainedModel,
    config: Fp8Config,
    device: torch.device,
    *,
    masters: Masters = "trained",
    master_type: torch.dtype = torch.float32,
    rest: torch.dtype | None = None,
    given: Mapping[str, QTensor] = {},
) -> None:
    """Converts a model that is on its way to `device`; `given` are codes by the name of their master.

    rest: of what is not converted, if not `config.rest`: where FSDP shards, everything is an FP32 master.

    InputError if the backend cannot run there, if nothing would be converted, or if the sizes of experts are no multiples of 128.
    """
    backend = _backend(config, device)
    for end in config.keep:
        if end not in Fp8Config().keep and not any(name == end or name.endswith(f".{end}") for name, _ in model.named_modules()):
            raise InputError(f"policy.fp8.keep: no module of this model is named '{end}', or ends so; correct it, or take it out")
    modules = list(convertible(model, config.keep))
    if not modules:
        raise InputError(f"policy.fp8.keep: {config.keep} leaves nothing of this model to convert")
    for name, module in modules:
        if isinstance(module, torch.nn.Linear):
            codes = Codes(given.get(f"{name}.weight"))
            model.set_submodule(name, Fp8Linear.over(module, codes, backend, config.quantize_activations))
        else:
            _check_experts(name, module)
            matrices = [Codes(given.get(f"{name}.{matrix}")) for matrix in EXPERT_MATRICES]
            module.fp8 = ExpertCodes(matrices[0], matrices[1], backend, config.quantize_activations)
            model.config._experts_implementation = experts.NAME
    _set_types(model, masters, master_type, rest or REST[config.rest])


def _backend(config: Fp8Config, device: torch.device) -> Backend:
    try:
        return backend_named(config.backend, device)
    except ValueError as error:
        raise InputError(str(error)) from None


def convertible(model: torch.nn.Module, keep: list[str]) -> Iterator[tuple[str, Any]]:
    """Linear layers and modules of fused experts that no entry of `keep` names by the end of their name."""
    for name, module in model.named_modules():
        if any(name == end or name.endswith(f".{end}") for end in keep):
            continue
        if type(module) is torch.nn.Linear or is_experts(name, module):
            yield name, module


def is_experts(name: str, module: torch.nn.Module) -> bool:
    """As transformers fuses them; `rl.experts.expert_views` knows the same layout."""
    own = {n for n, _ in module.named_parameters(recurse=False)}
    return name.endswith(".experts") and own == set(EXPERT_MATRICES)


def _check_experts(name: str, module: Any) -> None:
    _, width2, hidden = module.gate_up_proj.shape
    if width2 % (2 * BLOCK) or hidden % BLOCK:
        raise InputError(
            f"policy: {name}: hidden size {hidden} and experts' width {width2 // 2} have to be multiples of {BLOCK}, the size of a "
            "block; put 'experts' into policy.fp8.keep to leave them in high precision"
        )


@torch.no_grad()
def _set_types(model: PreTrainedModel, masters: Masters, master_type: torch.dtype, rest: torch.dtype) -> None:
    codes = coded(model)
    for name, parameter in model.named_parameters():
        if name not in codes:
            parameter.data = parameter.data.to(rest)
        elif masters == "trained":
            parameter.data = parameter.data.to(master_type)
        else:
            held = codes[name].fix(parameter)
            parameter.data = held.dequantize(rest) if masters == "values" else parameter.data.new_empty(0)
            parameter.requires_grad_(False)


# --- policies on disk -------------------------------------------------------------------------------------------------


def codes_in(folder: Path, model: PreTrainedModel, keep: list[str]) -> dict[str, QTensor]:
    """Codes that the files of a block-FP8 folder hold, by the name of the master that they are codes of."""
    if not is_block_fp8(folder):
        return {}
    files = Fp8Files(folder)
    found = {}
    for name, module in convertible(model, keep):
        if isinstance(module, torch.nn.Linear):
            held = files.codes(f"{name}.weight") if f"{name}.weight" in files.home else None
            if held is not None:
                found[f"{name}.weight"] = held
            continue
        for matrix, parts in (("gate_up_proj", ("gate_proj", "up_proj")), ("down_proj", ("down_proj",))):
            rows = [[files.codes(f"{name}.{index}.{part}.weight") for part in parts] for index in range(module.num_experts)]
            whole = [[q for q in row if q is not None] for row in rows]
            if all(len(row) == len(parts) for row in whole):
                found[f"{name}.{matrix}"] = _stack(whole)
    return found


def _stack(rows: Sequence[Sequence[QTensor]]) -> QTensor:
    codes = torch.stack([torch.cat([q.codes.view(torch.uint8) for q in row]) for row in rows])
    scales = torch.stack([torch.cat([q.scales for q in row]) for row in rows])
    return QTensor(codes.view(rows[0][0].codes.dtype), scales, SQUARE)


def fp8_model(
    folder: Path, config: Fp8Config, device: torch.device, *, attention_name: str = attention.NAME, **how: Any
) -> PreTrainedModel:
    """The policy of a folder, in high precision or in FP8, converted; on the CPU still. `how` goes to `convert`."""
    _backend(config, device)  # before a model is loaded
    model = load_model(folder, torch.float32, attention_name=attention_name)
    convert(model, config, device, given=codes_in(folder, model, config.keep), **how)
    return model
