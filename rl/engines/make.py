"""The engines that a recipe asks for."""

from pathlib import Path

import torch

from data.recipe import InputError
from rl.config import PolicyConfig, RolloutConfig
from rl.engines.base import Engine
from rl.engines.hf import HfEngine
from rl.engines.vllm import VllmEngine
from rl.inputs import check_gpus
from rl.policy import DTYPES


def make_engines(
    rollout: RolloutConfig, policy: PolicyConfig, folder: Path, max_model_len: int, logs: Path, *, returns_routes: bool = False
) -> list[Engine]:
    """Engines `engine-0`, `engine-1`, … for the policy in `folder`, not started; a vLLM engine's output goes to a file in `logs`.

    `folder` is what `rl.fp8.folder.engine_policy` gives; vLLM computes FP8 policies in BF16 around the codes. returns_routes:
    completions come with the experts that were chosen. InputError if this machine has GPUs, and fewer than needed.
    """
    codes = policy.precision == "fp8" and policy.lora is None
    dtype = DTYPES[policy.fp8.rest if policy.precision == "fp8" else policy.precision]
    gpus = torch.cuda.device_count()
    check_gpus(rollout, gpus)
    engines: list[Engine] = []
    for number in range(rollout.engines):
        name = f"engine-{number}"
        if rollout.engine == "hf":
            fp8 = policy.fp8 if codes else None
            device = "cuda" if gpus else "cpu"
            engines.append(HfEngine(name, str(folder), dtype, rollout.slots, device, fp8, returns_routes=returns_routes))
            continue
        engines.append(
            VllmEngine(
                name,
                folder,
                log_path=logs / f"{name}.log",
                dtype="float32" if dtype is torch.float32 and not codes else "bfloat16",
                max_model_len=max_model_len,
                slots=rollout.slots,
                tensor_parallel=rollout.tensor_parallel,
                devices=_devices(number, rollout, gpus),
                gpu_memory_utilization=rollout.gpu_memory_utilization,
                weight_backend="nccl" if rollout.weights == "nccl" else "cohort_file",
                stall_s=rollout.stall_s,
                returns_routes=returns_routes,
                sleeps=rollout.placement == "colocate",
            )
        )
    return engines


def check_engines(rollout: RolloutConfig, policy: PolicyConfig) -> None:
    """InputError where engines could not compute from what the learner sends: vLLM's CPU kernels for block-FP8 weights are for AMX."""
    codes = policy.precision == "fp8" and policy.lora is None
    if codes and rollout.engine == "vllm" and not torch.cuda.is_available() and not torch.cpu._is_amx_tile_supported():
        raise InputError(
            "rollout.engine: on a CPU vLLM computes from FP8 weights only with AMX (Intel Sapphire Rapids or newer), which this one has "
            "not; use rollout.engine=hf, or policy.precision=bf16"
        )


def _devices(number: int, rollout: RolloutConfig, gpus: int) -> tuple[int, ...]:
    """GPUs of an engine. split: the learner's ranks have the first ones, engines the last; colocate: engines begin at the first, too."""
    first = number * rollout.tensor_parallel
    if rollout.placement == "split":
        first += gpus - rollout.engines * rollout.tensor_parallel
    return tuple(range(first, first + rollout.tensor_parallel)) if gpus else ()
