"""FSDP2: weights, gradients and optimizer state of the policy spread over all ranks, gathered layer by layer where they are used.

Whether to shard, and how, is said by the accelerate config that the command is launched with (`recipes/accelerate_fsdp2.yaml`). The
parameters are the FP32 masters, experts by whole expert (dimension 0); under bf16 precision each layer is gathered as BF16 and its
gradients are reduced in FP32. Masters of an FP8 policy are shared beside FSDP and gathered as codes (`rl/fp8/sharded.py`). Gradients
are summed over ranks, not averaged: losses are divided by counts over all ranks already.

The output head is gathered once a pass and not through FSDP's hooks: it runs in chunks, more of them on one rank than on another,
and a collective in each would wait for ranks that have none.
"""

import os
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import FullyShardedDataParallelPlugin, str_to_bool
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor
from transformers import PreTrainedModel

from data.recipe import InputError
from rl.config import TrainRecipe
from rl.fp8.layout import coded
from rl.fp8.sharded import spread
from rl.ranks import Ranks


def wanted() -> bool:
    """Whether accelerate was told to shard."""
    return bool(str_to_bool(os.environ.get("ACCELERATE_USE_FSDP", "false")))


def check_sharded(recipe: TrainRecipe) -> None:
    """InputError for what sharding does not have yet, if accelerate was told to shard."""
    if wanted() and recipe.policy.lora is not None:
        raise InputError("policy.lora: adapters with FSDP are not there yet; launch without it, or train all weights")
    if wanted() and recipe.learner.optimizer.masters == "bf16":
        raise InputError("learner.optimizer.masters: what FSDP shards are FP32 masters; set fp32, or launch without it")


def shard(model: PreTrainedModel, ranks: Ranks, compute: torch.dtype) -> None:
    """Shards a float32 model in place; `compute` is what its layers run in. Collective.

    Raises InputError for FSDP of the first version, for a policy whose output head is tied to its embedding, and for one in FP8 whose
    masters are to be kept on the CPU.
    """
    plugin = FullyShardedDataParallelPlugin()  # reads what accelerate launch has set
    if plugin.fsdp_version != 2:
        raise InputError(f"accelerate config: fsdp_version is {plugin.fsdp_version}; the learner shards with FSDP2, set it to 2")
    if model.get_output_embeddings().weight is model.get_input_embeddings().weight:
        raise InputError("policy: output head and embedding are tied; sharding does not have that yet, launch without FSDP")
    offload = isinstance(plugin.cpu_offload, CPUOffloadPolicy)
    if offload and coded(model):
        raise InputError("accelerate config: fsdp_offload_params with policy.precision fp8 is not there yet; set it to false")
    mesh = init_device_mesh(ranks.device.type, (ranks.count,))
    settings: dict[str, Any] = {
        "mesh": mesh,
        # What a layer reads stays as it is: the residual stream is wider than BF16 matrices (rl/mixed.py).
        "mp_policy": MixedPrecisionPolicy(compute, torch.promote_types(compute, torch.float32), cast_forward_inputs=False),
        "reshard_after_forward": bool(plugin.reshard_after_forward),
        "offload_policy": CPUOffloadPolicy() if offload else OffloadPolicy(),
    }
    decoder = model.get_decoder()
    settings["ignored_params"] = _share_masters(model, mesh)
    for layer in decoder.layers:
        fully_shard(layer, **settings)
    fully_shard(decoder, **settings)
    for module in decoder.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(distribute_tensor(head.weight.detach(), mesh, [Shard(0)]))


def _share_masters(model: PreTrainedModel, mesh: DeviceMesh) -> set[torch.nn.Parameter]:
    """Leaves each rank its part of the masters of codes; these are not FSDP's."""
    masters = set()
    for name, codes in coded(model).items():
        module, _, leaf = name.rpartition(".")
        master = spread(model.get_parameter(name), mesh)
        setattr(model.get_submodule(module), leaf, master)
        codes.share(master)
        masters.add(master)
    return masters


@dataclass(frozen=True)
class GatheredHead:
    """A sharded output head in one piece, for one pass."""

    weight: torch.Tensor
    """[V, D]."""

    def __call__(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(hidden_ND.to(self.weight.dtype), self.weight)


def output_head(model: PreTrainedModel, compute: torch.dtype | None = None) -> Any:
    """The output head, a function of hidden states; a sharded one is gathered now, in `compute`, and its gradient summed over ranks."""
    head = model.get_output_embeddings()
    if not isinstance(head.weight, DTensor):
        return head
    return GatheredHead(head.weight.full_tensor(grad_placements=[Partial()]).to(compute))
