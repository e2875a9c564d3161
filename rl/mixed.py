"""BF16 where it pays, FP32 where it is felt: `policy.precision: bf16` of the learner.

Matrices are BF16 and multiply in BF16. What adds up over the layers does not: the residual stream, norms and rotary angles stay in FP32,
as do the softmax over the vocabulary and whatever is summed over tokens. That is what autocast over FP32 weights computes, but
with the weights that the engines have: each master is rounded once a step, not once a pass, and there is no second copy of it to keep.

A module with a matrix of its own reads BF16, embeddings give FP32, RMS norms read FP32 and so give it.
transformers' grouped product of experts casts what it reads itself, and the attention what it gets.
"""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter


def residual_in_fp32(model: PreTrainedModel) -> None:
    """Lets the layers of a model in BF16, or of one that FSDP gathers in BF16, add up in FP32. Adds hooks, changes no parameter."""
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        if isinstance(module, nn.Embedding):
            module.register_forward_hook(_gives_fp32)
        elif type(module).__name__.endswith("RMSNorm"):
            module.register_forward_pre_hook(_reads_fp32)
        elif isinstance(module, DeepseekV3TopkRouter):
            pass  # multiplies in FP32 by itself
        elif isinstance(module, nn.LayerNorm) or any(p.ndim == 2 for p in own):
            module.register_forward_pre_hook(_reads_bf16)


def _gives_fp32(module: nn.Module, args: tuple[Any, ...], out: torch.Tensor) -> torch.Tensor:
    return out.float()


def _reads_fp32(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (args[0].float(), *args[1:])


def _reads_bf16(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (args[0].bfloat16(), *args[1:])
