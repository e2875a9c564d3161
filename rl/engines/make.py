"""The engines that a recipe asks for, on this machine or elsewhere; and the host of one that is lent to other machines."""

import hashlib
import json
import os
import secrets
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from rl.config import PolicyConfig, RolloutConfig
from rl.engines.base import Engine
from rl.engines.hf import HfEngine
from rl.engines.host import Host
from rl.engines.http_client import HttpTransport
from rl.engines.remote import Fleet, RemoteEngine, Transport
from rl.engines.repairs import cpu_repairs
from rl.engines.vllm import VllmEngine
from rl.engines.weights import TensorSpec, read_manifest
from rl.engines.wire import Hello
from rl.fp8.folder import engine_policy
from rl.inputs import check_gpus, server_token
from rl.policy import DTYPES, policy_fingerprint, policy_folder

TOKENIZER = ("tokenizer.json", "tokenizer.model", "generation_config.json")
"""Files that say what tokens mean, and which of them end a completion."""


def make_engines(
    rollout: RolloutConfig,
    policy: PolicyConfig,
    folder: Path,
    max_model_len: int | None,
    logs: Path,
    *,
    returns_routes: bool = False,
    manifest: Mapping[str, TensorSpec] | None = None,
    over_nodes: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> list[Engine]:
    """Engines `engine-0`, `engine-1`, … for the policy in `folder`, not started; a vLLM engine's output goes to a file in `logs`.

    `folder` is what `rl.fp8.folder.engine_policy` gives; on a GPU vLLM computes around codes in BF16 alone. max_model_len: None is
    the policy's context. returns_routes: completions come with the experts that were chosen. manifest: of the weight updates that
    there will be, for engines elsewhere. over_nodes: vLLM finds its GPUs on a Ray cluster. say: told what of vLLM's settings had to be
    repaired, a line each. InputError if this machine has GPUs, and fewer than needed.
    """
    if rollout.elsewhere:
        assert max_model_len is not None
        return _elsewhere(rollout, policy, max_model_len, facts_of(rollout, policy, returns_routes), dict(manifest or {}), say)
    codes = policy.precision == "fp8" and policy.lora is None
    dtype = DTYPES[policy.fp8.rest if policy.precision == "fp8" else policy.precision]
    gpus = torch.cuda.device_count()
    if not over_nodes:
        check_gpus(rollout, gpus)
    if rollout.engine == "vllm" and not gpus and not over_nodes:
        for repair in cpu_repairs(json.loads((folder / "config.json").read_text()), drafts=rollout.draft_tokens > 0):
            if repair.says:
                say(repair.says)
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
                dtype="float32" if dtype is torch.float32 and not (codes and (gpus or over_nodes)) else "bfloat16",
                max_model_len=max_model_len,
                slots=rollout.slots,
                tensor_parallel=rollout.tensor_parallel,
                devices=() if over_nodes else _devices(number, rollout, gpus),
                over_nodes=over_nodes,
                gpu_memory_utilization=rollout.gpu_memory_utilization,
                weight_backend="nccl" if rollout.weights == "nccl" else "cohort_file",
                stall_s=rollout.stall_s,
                returns_routes=returns_routes,
                sleeps=rollout.placement == "colocate",
                draft_tokens=rollout.draft_tokens,
            )
        )
    return engines


def _elsewhere(
    rollout: RolloutConfig,
    policy: PolicyConfig,
    max_model_len: int,
    facts: dict[str, str],
    manifest: dict[str, TensorSpec],
    say: Callable[[str], None],
) -> list[Engine]:
    names = [f"engine-{number}" for number in range(len(rollout.servers) or rollout.engines)]
    transports: Sequence[Transport]
    if rollout.servers:
        token = server_token(rollout)
        transports = [HttpTransport(url, token) for url in rollout.servers]
    else:
        from rl.engines.ray_actor import ray_transports  # loads ray

        transports = ray_transports(rollout, policy, max_model_len, returns_routes=facts["routes"] == "returned")
    fleet = Fleet(len(names), say)
    me = f"process {os.getpid()} on {socket.gethostname()}"
    return [
        RemoteEngine(
            name, transport, Hello(secrets.token_hex(8), me, facts, max_model_len, manifest), fleet,
            slots=rollout.slots, whole_groups=rollout.engine == "hf",
        )
        for name, transport in zip(names, transports, strict=True)
    ]  # fmt: skip


def make_host(
    rollout: RolloutConfig,
    policy: PolicyConfig,
    max_model_len: int | None,
    work: Path,
    *,
    returns_routes: bool = False,
    over_nodes: bool = False,
) -> Host:
    """One engine of this machine, to be lent; it begins to load. Its log, and what has to be written for FP8, go to the folder `work`.

    over_nodes: vLLM finds its GPUs on a Ray cluster. InputError for a policy or an engine that cannot be had here.
    """
    assert policy.path is not None
    facts = facts_of(rollout, policy, returns_routes)
    rollout = rollout.model_copy(update={"servers": [], "placement": "split", "engines": 1})
    folder = engine_policy(policy, policy_folder(policy.path, policy.revision), work / "policy")
    says: list[str] = []
    (engine,) = make_engines(
        rollout, policy, folder, max_model_len, work, returns_routes=returns_routes, over_nodes=over_nodes, say=says.append
    )
    return Host(engine, facts, read_manifest(folder), max_model_len if rollout.engine == "vllm" else None, says)


def facts_of(rollout: RolloutConfig, policy: PolicyConfig, returns_routes: bool) -> dict[str, str]:
    """What an engine elsewhere and the learner have to have in common, in words; the same where it is the same."""
    assert policy.path is not None
    folder = policy_folder(policy.path, policy.revision)
    tokenizer = hashlib.sha256()
    for name in TOKENIZER:
        if (folder / name).is_file():
            tokenizer.update(name.encode() + (folder / name).read_bytes())
    precision: str = policy.precision
    if policy.precision == "fp8":
        precision = " ".join(["fp8", *(f"{key}={value}" for key, value in policy.fp8.model_dump(mode="json").items())])
    return {
        "policy": policy_fingerprint(folder),
        "tokenizer": tokenizer.hexdigest(),
        "engine": rollout.engine,
        "precision": f"{precision}, adapter merged" if policy.lora is not None else precision,
        "routes": "returned" if returns_routes else "not returned",
    }


def _devices(number: int, rollout: RolloutConfig, gpus: int) -> tuple[int, ...]:
    """GPUs of an engine. split: the learner's ranks have the first ones, engines the last; colocate: engines begin at the first, too."""
    first = number * rollout.tensor_parallel
    if rollout.placement == "split":
        first += gpus - rollout.engines * rollout.tensor_parallel
    return tuple(range(first, first + rollout.tensor_parallel)) if gpus else ()
