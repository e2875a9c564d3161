"""Low-rank adapters through peft: the base weights stay as they are, and a few small matrices are trained (arXiv:2106.09685).

peft puts its layers into the model in place, experts included. What leaves the learner is merged on the way out, one tensor at a time,
`W + scale * B A`, under the names of the base model: engines and files see a policy like any other, and the policy itself is never
merged. The reference of a KL term is the policy with its adapter off, so no second model is kept.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from data.recipe import InputError
from rl.config import LoraConfig

if TYPE_CHECKING:  # a learner without an adapter needs no peft
    from peft.tuners.tuners_utils import BaseTunerLayer

ADAPTER = "default"


def add_adapter(model: PreTrainedModel, config: LoraConfig, seed: int) -> None:
    """Adds an adapter that changes nothing yet (B is zero) and leaves it alone trainable, in float32; A depends on `seed` alone.

    Raises InputError where no module of the model is meant by `config.targets`, or peft cannot adapt what is.
    """
    from peft import LoraConfig as PeftLoraConfig
    from peft import inject_adapter_in_model

    def inject(into: torch.nn.Module, targets: str | list[str], parameters: list[str]) -> None:
        settings = PeftLoraConfig(
            r=config.rank, lora_alpha=config.alpha, target_modules=targets, target_parameters=parameters or None, lora_dropout=0.0
        )
        inject_adapter_in_model(settings, into, ADAPTER)

    wanted = [name for name in _linears(model) if _is_meant(name, config.targets)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            inject(model, config.targets, config.parameters)
            # In a mixture of experts peft takes `gate_proj`, `up_proj` and `down_proj` to be the experts' alone. Within a module that
            # has no config they are what they are: those of dense layers and of shared experts.
            adapted = adapter_layers(model)
            for name in wanted:
                if f"{name}.weight" not in adapted:
                    parent, _, child = name.rpartition(".")
                    inject(torch.nn.ModuleDict({"of": model.get_submodule(parent)}), [f"of.{child}"], [])
        except ValueError as error:
            raise InputError(f"policy.lora.targets: {config.targets}: {' '.join(str(error).split())}") from None
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))


def _linears(model: PreTrainedModel) -> list[str]:
    """Names of the model's linear layers, without the output head."""
    head = model.get_output_embeddings()
    return [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and module is not head]


def _is_meant(name: str, targets: str | list[str]) -> bool:
    """As peft reads them: `all-linear`, a regular expression, or the ends of names."""
    if isinstance(targets, str):
        return targets == "all-linear" or re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)


def has_adapter(model: torch.nn.Module) -> bool:
    return any("lora_" in name for name, _ in model.named_parameters())


def adapter_layers(model: torch.nn.Module) -> "dict[str, BaseTunerLayer]":
    """peft's layers by the parameter that each changes, as the base model names it; empty without an adapter."""
    if not has_adapter(model):
        return {}
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = {}
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            parameter = getattr(module, "parameter_name", "weight")  # peft: an expert's parameter, or a Linear's weight
            layers[f"{base_name(name)}.{parameter}"] = module
    return layers


def base_name(name: str) -> str:
    """A parameter's name without what peft put into it."""
    return name.replace(".base_layer", "")


@torch.no_grad()
def merge(tensor: torch.Tensor, layer: "BaseTunerLayer") -> torch.Tensor:
    """A new tensor: the base weight with its adapter added. Sharded ones are gathered first, which is collective."""
    with _gathered(layer):
        delta: torch.Tensor = layer.get_delta_weight(ADAPTER)  # type: ignore[attr-defined]
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return (whole + delta.to(whole.device)).to(whole.dtype)


@contextmanager
def _gathered(layer: "BaseTunerLayer") -> Iterator[None]:
    """Within, a layer's A and B are whole: peft takes slices and products of them, which shards of them do not give."""
    parts = [getattr(layer, name)[ADAPTER] for name in ("lora_A", "lora_B")]
    sharded = [part.weight for part in parts]
    for part, weight in zip(parts, sharded, strict=True):
        if isinstance(weight, DTensor):
            part.weight = torch.nn.Parameter(weight.full_tensor(), requires_grad=False)
    try:
        yield
    finally:
        for part, weight in zip(parts, sharded, strict=True):
            part.weight = weight


@contextmanager
def adapter_off(model: torch.nn.Module) -> Iterator[None]:
    """Within, the model is what it was before it had an adapter."""
    layers = list(adapter_layers(model).values())
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
