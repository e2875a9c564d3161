"""A model in numbers, from its config alone: what an estimate of memory or time has to know of it.

Sizes come from the model that transformers builds on torch's meta device, so a parameter is counted as it will be there. A module for
multi-token prediction, which transformers drops, is not in them.

    E  experts      K  experts a token      V  vocabulary
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from data.recipe import InputError
from rl.config import LoraConfig
from rl.lora import add_adapter


@dataclass(frozen=True)
class Sizes:
    """A model in numbers; counts are of elements."""

    total: int
    active: int
    """Parameters that one token passes through: of the experts those it is sent to."""
    adapter: int
    """Parameters of a low-rank adapter, which are trained in place of the others; 0 is none."""
    layers: int
    hidden: int
    vocabulary: int
    layer: int
    """Parameters of the largest layer."""
    expert_layer: int
    """Of those, in experts that tokens are routed to; 0 is a dense model."""
    routed: int
    """Parameters of such experts in all layers."""
    expert_layers: int
    experts: int
    """E of a layer that has any."""
    chosen: int
    """K: of these for a token."""
    attention: int
    """Products of a query with a key and of its weight with a value, in all layers and heads: scalars for each pair of tokens."""
    largest: int
    """Of the largest tensor."""
    root: int
    """Parameters outside of the layers: embedding, head, last norm."""
    kept_layer: int
    kept_layers: int
    """A token's outputs of every matrix and norm, in the largest layer and in all."""
    kv_token: int
    """Keys and values of a token in all layers; of MLA its latents."""
    kv_split: int
    """Into how many parts tensor parallelism can split them."""
    context: int | None


def sizes_of(config_file: Path, lora: LoraConfig | None = None) -> Sizes:
    """Sizes of the model that a config in JSON describes. InputError for one that transformers cannot read or does not know."""
    try:
        config = AutoConfig.from_pretrained(config_file, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise InputError(f"{config_file}: no config of a model: {' '.join(str(error).split())}") from None
    chosen = getattr(config, "num_experts_per_tok", 0)
    layers: dict[int, list[int]] = {}
    routed: dict[int, int] = {}
    total = active = root = experts = largest = 0
    for name, parameter in model.named_parameters():
        n = parameter.numel()
        expert = ".experts." in name
        total += n
        largest = max(largest, n)
        active += n * chosen // parameter.shape[0] if expert else n
        inside = re.search(r"\.layers\.(\d+)\.", name)
        if inside is None:
            root += n
            continue
        sums = layers.setdefault(int(inside[1]), [0, 0])
        sums[0] += n
        if expert:
            routed[int(inside[1])] = routed.get(int(inside[1]), 0) + n
            experts = parameter.shape[0]
        sums[1] += _outputs(name, parameter, chosen) if expert else parameter.shape[0]
    kv_token, kv_split = _kv(config)
    return Sizes(
        total=total, active=active, adapter=_adapter(model, lora), layers=len(layers), hidden=config.hidden_size,
        vocabulary=config.vocab_size, root=root, largest=largest, layer=max(n for n, _ in layers.values()),
        expert_layer=max(routed.values(), default=0), routed=sum(routed.values()), expert_layers=len(routed), experts=experts,
        chosen=chosen, attention=_attention(config),
        kept_layer=max(kept for _, kept in layers.values()), kept_layers=sum(kept for _, kept in layers.values()),
        kv_token=kv_token, kv_split=kv_split, context=getattr(config, "max_position_embeddings", None),
    )  # fmt: skip


def _outputs(name: str, parameter: torch.Tensor, chosen: int) -> int:
    """Of a layer's experts for one token: gate and up, or their product and what goes down."""
    _, rows, columns = parameter.shape
    return chosen * (rows + (columns if name.endswith("down_proj") else 0))


def _adapter(model: PreTrainedModel, lora: LoraConfig | None) -> int:
    if lora is None:
        return 0
    with torch.device("meta"):
        add_adapter(model, lora, seed=0)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _kv(config: Any) -> tuple[int, int]:
    layers = config.num_hidden_layers
    if getattr(config, "kv_lora_rank", None):
        return (config.kv_lora_rank + config.qk_rope_head_dim) * layers, 1
    heads = config.num_key_value_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * heads * width * layers, heads


def _attention(config: Any) -> int:
    heads = config.num_attention_heads
    if getattr(config, "kv_lora_rank", None):
        return config.num_hidden_layers * heads * (config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim)
    return 2 * config.num_hidden_layers * heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
