"""What vLLM on a CPU computes wrongly without a word, and the settings under which it does not.

Latent attention (DeepSeek-V2 and V3: a `kv_lora_rank` in the config) has two such faults in vLLM 0.32. Its C kernel for rotary embedding
reads strided queries and keys as if they were dense, so that most rows are not rotated; it is used with default rope, and not with
yarn, which the published DeepSeek-V3 has. And on a CPU with AMX the attention requantises `kv_b_proj`, from blocks to one scale, and
raises at an update of the weights. Neither is left to the recipe: engines are started so that both are away, and a run says so.

Speculative sampling at a temperature has another: the kernel that gives each draft token its request's temperature writes it into a copy
(`_expand_kernel_impl` in vllm/utils/cpu_triton_utils.py), logits are divided by memory that nobody wrote, and what is sampled is nonsense.
Engines that draft do that step with `expand`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Repair:
    settings: dict[str, Any]
    """Arguments of vLLM's engine."""
    says: str
    """One line for whoever started the run; empty where this machine and policy would not have met the fault."""


def expand(x: torch.Tensor, cu_num_tokens: torch.Tensor, num_tokens: int, replace_from: int = 0, replace_to: int = 0) -> torch.Tensor:
    """[requests] -> [tokens]: each request's value for each of its draft tokens; vLLM's `expand_batch_to_tokens`."""
    counts = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1))
    return x.masked_fill(x == replace_from, replace_to).repeat_interleave(counts)


def cpu_repairs(policy: Mapping[str, Any], drafts: bool = False) -> list[Repair]:
    """For a policy by its `config.json`, and an engine that drafts or not."""
    if "kv_lora_rank" not in policy:
        return []
    rope = policy.get("rope_parameters") or policy.get("rope_scaling") or {}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    rotates = f"vLLM's C kernel on a CPU leaves rows of latent attention with {kind} rope unrotated: rotary_embedding runs without it"
    amx = "vLLM's AMX_MLA requantises kv_b_proj and takes no weight update: attention runs by CPU_MLA"
    temperatures = "vLLM's kernel on a CPU leaves the temperatures of draft tokens unwritten: torch gives them theirs"
    return [
        *([Repair({}, temperatures)] if drafts else []),
        Repair({"compilation_config": {"custom_ops": ["all", "-rotary_embedding"]}}, "" if kind == "yarn" else rotates),
        Repair({"attention_config": {"backend": "CPU_MLA"}}, amx if torch.cpu._is_amx_tile_supported() else ""),
    ]
