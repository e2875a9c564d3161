"""What a run takes of memory, by part, from the model's config alone: no weights are read.

Sizes are those of `rl/sizes.py`. Every part names its formula where it is printed. GB are 10^9 bytes. What is no part stands in what is
left: CUDA contexts, NCCL's buffers, fragmentation, the programs themselves; and none of it has been held against a GPU by this project
yet.

Under `placement: split` the engines have the last `engines * tensor_parallel` GPUs of the first node, the learner all others, and
FSDP2 shards its masters, gradients and moments over them. Under `colocate` the learner has all, and engines the first ones in turns
with it. On a CPU every rank holds the whole learner, in the same RAM.

    T  tokens of the longest pass      L  layers      D  hidden size      V  vocabulary      b  bytes of an element
"""

import os
from dataclasses import dataclass
from math import ceil

import psutil
import torch

from data.recipe import InputError
from rl.config import HardwareConfig, TrainRecipe
from rl.logp import CHUNK_LOGITS
from rl.sizes import Sizes

GB = 1e9
ELEMENT_BYTES = {"fp32": 4, "bf16": 2, "fp8": 2}
"""Of an activation. FP8 products save codes, which is not counted: activations are then an upper bound."""
WEIGHT_BYTES = {"fp32": 4, "bf16": 2, "fp8": 1}
"""Of a weight where it is used, sent and saved; the few that are not converted to FP8 are counted as if they were."""
STREAM_BYTES = ELEMENT_BYTES | {"bf16": 4}
"""Of the residual stream, which is what a layer reads (rl/mixed.py)."""
KEPT = {"fp32": 2.0, "bf16": 2.5, "fp8": 2.3}
"""Bytes that autograd keeps of a layer, over those of the outputs of its matrices and norms: no less than saved_tensors_hooks
counts for tiny Qwen3-MoE and DeepSeek-V3 policies in fp32 (1.6 to 1.8) and bf16 (2.2 to 2.5); a test holds these two."""
HEAD_COPIES = 6
"""FP32 copies of a chunk of logits at once in `rl.logp`: cast, scaled, two for the entropy, the gradients of the first two."""
VLLM_BATCH_TOKENS = 16384
"""Tokens that vLLM forwards at once while it measures its own need: its largest default (`max_num_batched_tokens`, vLLM 0.32)."""
VLLM_BLOCK = {"cuda": 16, "cpu": 128}
"""Tokens of a KV block by device; a sequence takes whole blocks."""
MASTERS_BESIDE = "masters, "
"""How the part is named that masters are where they are not the weights themselves; they then belong to the optimizer's state."""
TWO_PROCESSES_BYTES = 3e9
"""Of a GPU that two processes share: their CUDA contexts, and what NCCL and the libraries keep. Assumed, not measured."""
GATHERED_BYTES = 6
"""Of an element of the one tensor that a sharded learner gathers for a checkpoint: FP32, and what it is saved in."""
CPU_KV_MAX_BYTES = 4 << 30
"""As in rl.engines.vllm_worker: more than this a vLLM engine on a CPU does not take for its KV cache."""


@dataclass(frozen=True)
class Machine:
    """Where a run is to happen; without GPUs everything is in RAM."""

    gpus: int
    gpu_bytes: float
    nodes: int
    ram_bytes: float
    ranks: int
    """Processes of the learner on a machine without GPUs."""


@dataclass(frozen=True)
class Part:
    name: str
    bytes: float
    formula: str


@dataclass(frozen=True)
class Place:
    """A GPU of a kind, or the machine's RAM, and what stands in it."""

    name: str
    room_bytes: float
    parts: tuple[Part, ...]

    @property
    def used_bytes(self) -> float:
        return sum(part.bytes for part in self.parts)

    @property
    def left_bytes(self) -> float:
        return self.room_bytes - self.used_bytes


def beside(resident_bytes: float, gpu_memory_utilization: float, gpu_bytes: float) -> bool:
    """Whether what the learner keeps between its turns leaves an engine on the same GPU the share that it takes."""
    return resident_bytes + gpu_memory_utilization * gpu_bytes + TWO_PROCESSES_BYTES <= gpu_bytes


def machine_of(hardware: HardwareConfig | None) -> Machine:
    """The machine that a recipe names, or this one."""
    memory = psutil.virtual_memory()
    if hardware is not None:
        return Machine(hardware.gpus, hardware.gpu_gb * GB, hardware.nodes, memory.available, 1)
    gpus = torch.cuda.device_count()
    gpu_bytes = torch.cuda.get_device_properties(0).total_memory if gpus else 0
    return Machine(gpus, gpu_bytes, 1, memory.available, int(os.environ.get("WORLD_SIZE", "1")))


def engine_gpus(recipe: TrainRecipe) -> int:
    """GPUs that vLLM engines are on, servers left out; an hf engine lives in the learner's process, on its GPU."""
    if recipe.rollout.servers:
        return 0
    return recipe.rollout.engines * recipe.rollout.tensor_parallel if recipe.rollout.engine == "vllm" else 0


def learner_ranks(recipe: TrainRecipe, machine: Machine) -> int:
    """Processes that learn; 0 or less if the engines leave no GPU."""
    if not machine.gpus:
        return machine.ranks
    return machine.gpus * machine.nodes - (engine_gpus(recipe) if recipe.rollout.placement != "colocate" else 0)


def pass_tokens(recipe: TrainRecipe, max_model_len: int) -> tuple[int, int]:
    """Tokens of the longest group and of the longest pass; G completions share a prompt, and their last tokens stay out."""
    rollout = recipe.rollout
    prompt = max(max_model_len - rollout.max_tokens, 1)
    group = prompt + rollout.group_size * (rollout.max_tokens - 1)
    groups = ceil(recipe.learner.prompts_per_step / recipe.learner.steps_per_batch)
    return group, max(group, min(recipe.learner.micro_tokens, group * groups))


def places(recipe: TrainRecipe, sizes: Sizes, machine: Machine, max_model_len: int, expert_parallel: int = 1) -> list[Place]:
    """Every kind of place with its parts. InputError if the engines leave no GPU to the learner.

    expert_parallel: GPUs that each layer's experts are spread over. The learner has none of that; a dry run says what it would bring.
    """
    ranks = learner_ranks(recipe, machine)
    if ranks < 1:
        raise InputError(
            f"rollout: {recipe.rollout.engines} engines on {recipe.rollout.tensor_parallel} GPUs each leave none of "
            f"{machine.gpus * machine.nodes} to the learner; lower rollout.engines or rollout.tensor_parallel"
        )
    shards = ranks if machine.gpus else 1
    learner = [*_state(recipe, sizes, shards), *_passing(recipe, sizes, shards, max_model_len, expert_parallel)]
    if not machine.gpus:
        return [_ram(recipe, sizes, machine, learner, max_model_len)]
    first = f"{ranks} of {machine.gpus * machine.nodes} GPUs learn; on each"
    if recipe.rollout.servers:
        return [Place(first, machine.gpu_bytes, tuple(learner))]
    if recipe.rollout.engine == "hf":
        return [Place(first, machine.gpu_bytes, (*learner, *_hf_engines(recipe, sizes, max_model_len)))]
    engine = _vllm_gpu(recipe, sizes, machine, max_model_len)
    if recipe.rollout.placement == "colocate":
        return _turns(recipe, sizes, machine, learner, engine)
    return [Place(first, machine.gpu_bytes, tuple(learner)), engine]


def _turns(recipe: TrainRecipe, sizes: Sizes, machine: Machine, learner: list[Part], engine: Place) -> list[Place]:
    """A shared GPU: in the learner's turn; the engine in its share; and the share beside what the learner keeps (`rl/placement.py`)."""
    contexts = Part("two processes", TWO_PROCESSES_BYTES, "CUDA contexts and buffers, assumed")
    resident, away = resident_and_parked(recipe, sizes, machine)
    kept = [Part(f"learner: {part.name}", part.bytes, part.formula) for part in resident]
    share = Part("engine: its share", engine.room_bytes, f"{recipe.rollout.gpu_memory_utilization:g} x {machine.gpu_bytes / GB:.1f} GB")
    gpus = machine.gpus * machine.nodes
    goes = (
        f"{sum(part.bytes for part in away) / GB:.2f} GB of optimizer state are in host memory" if away else "the optimizer's state stays"
    )
    return [
        Place(f"{gpus} GPUs in the learner's turn; on each", machine.gpu_bytes, (*learner, contexts)),
        engine,
        Place(f"{engine_gpus(recipe)} of them in the engines' turn, {goes}; on each", machine.gpu_bytes, (*kept, share, contexts)),
    ]


def resident_and_parked(recipe: TrainRecipe, sizes: Sizes, machine: Machine) -> tuple[list[Part], list[Part]]:
    """Of a colocated learner: what stays on its GPU while engines sample, and what goes to host memory, if it has to."""
    ranks = learner_ranks(recipe, machine)
    state = [part for part in _state(recipe, sizes, ranks) if not part.name.startswith("gradients")]
    if ranks > 1:
        state.append(Part("a tensor for a checkpoint", GATHERED_BYTES * sizes.largest, f"{GATHERED_BYTES} bytes x the largest"))
    if beside(sum(part.bytes for part in state), recipe.rollout.gpu_memory_utilization, machine.gpu_bytes):
        return state, []
    parked = [part for part in state if part.name.startswith((MASTERS_BESIDE, "two moments"))]
    return [part for part in state if part not in parked], parked


def colocated_share(recipe: TrainRecipe, sizes: Sizes, machine: Machine, max_model_len: int) -> tuple[float, float] | None:
    """The `gpu_memory_utilization` that an engine needs under `placement: colocate`, and the most that it may; None if nothing fits."""
    rollout = recipe.rollout.model_copy(update={"placement": "colocate", "gpu_memory_utilization": 1.0})
    recipe = recipe.model_copy(update={"rollout": rollout})
    if rollout.engines * rollout.tensor_parallel > machine.gpus or places(recipe, sizes, machine, max_model_len)[0].left_bytes < 0:
        return None
    kept = sum(part.bytes for part in resident_and_parked(recipe, sizes, machine)[0]) + TWO_PROCESSES_BYTES
    sequence = _kv_token_bytes(recipe, sizes) * _blocks(max_model_len, VLLM_BLOCK["cuda"])
    least = (sum(part.bytes for part in _vllm_weights_and_work(recipe, sizes)) + sequence) / machine.gpu_bytes
    most = 1 - kept / machine.gpu_bytes
    return (least, most) if least <= most else None


# --- the learner ------------------------------------------------------------------------------------------------------


def _state(recipe: TrainRecipe, sizes: Sizes, shards: int) -> list[Part]:
    """What stays over the whole run, as `rl.optim.AdamW` holds it."""
    b = WEIGHT_BYTES[recipe.policy.precision]
    sharded = shards > 1 and recipe.policy.lora is None
    if recipe.policy.precision == "fp8" and recipe.policy.lora is not None:
        b += sent_bytes(recipe)  # an adapter's base has its values beside its codes
    m = ELEMENT_BYTES[recipe.learner.optimizer.moments]
    share = f"{sizes.total / 1e9:.3f}e9 parameters" + (f" / {shards}" if shards > 1 else "")
    each = sizes.total / shards
    if sharded:  # what FSDP2 keeps are the masters; a layer's weights are made of them where it is gathered
        parts = [Part("weights, fp32 masters", 4 * each, f"4 bytes x {share}")]
    else:
        parts = [Part(f"weights, {recipe.policy.precision}", b * each, f"{b} bytes x {share}")]
    if recipe.policy.lora is not None:
        # The reference is the policy without its adapter, and frozen weights have no masters.
        share = f"{sizes.adapter / 1e9:.3f}e9 of the adapter" + (f" / {shards}" if shards > 1 else "")
        each = sizes.adapter / shards
        parts.append(Part("adapter, fp32", 4 * each, f"4 bytes x {share}"))
    elif not sharded and recipe.policy.precision not in ("fp32", masters := recipe.learner.optimizer.masters):
        parts.append(Part(MASTERS_BESIDE + masters, ELEMENT_BYTES[masters] * each, f"{ELEMENT_BYTES[masters]} bytes x {share}"))
    parts.append(Part("gradients, fp32", 4 * each, f"4 bytes x {share}"))
    parts.append(Part(f"two moments, {recipe.learner.optimizer.moments}", 2 * m * each, f"2 x {m} bytes x {share}"))
    if recipe.loss.kl_coef > 0.0 and recipe.policy.lora is None:
        parts.append(Part("reference", (4 if sharded else b) * each, f"{4 if sharded else b} bytes x {share}"))
    return parts


def _passing(recipe: TrainRecipe, sizes: Sizes, shards: int, max_model_len: int, expert_parallel: int) -> list[Part]:
    """What a forward and backward pass needs on top, at its worst: every completion as long as it may be.

    Attention holds no scores, on a CPU (flash attention) as on a GPU (FlexAttention); what it keeps is a log-sum a row and head.
    """
    b, stream, k = (of[recipe.policy.precision] for of in (ELEMENT_BYTES, STREAM_BYTES, KEPT))
    _, tokens = pass_tokens(recipe, max_model_len)
    parts = []
    if shards > 1:
        layer = sizes.layer - sizes.expert_layer + sizes.expert_layer / expert_parallel
        if recipe.policy.precision == "fp8":
            formula = "b x 2 x embedding and head + 5 bytes x layer: codes, and a gradient in FP32"
            parts.append(Part("gathered", b * 2 * sizes.root + 5 * layer, formula))
        else:
            formula = "b x 2 x embedding and head + b x 3 x layer: this, the next one, one gradient"
            parts.append(Part("gathered", b * 2 * sizes.root + b * 3 * layer, formula))
    checkpointing = recipe.policy.activation_checkpointing
    if checkpointing:
        parts.append(Part("layer inputs", stream * tokens * sizes.hidden * sizes.layers, f"{stream} bytes x T x D x L, T = {tokens:,}"))
    kept = k * b * tokens * (sizes.kept_layer if checkpointing else sizes.kept_layers)
    again = ", one layer is recomputed" if checkpointing else f", T = {tokens:,}"
    parts.append(Part("activations", kept, f"{k} x b x T x outputs of {'a layer' if checkpointing else 'all layers'}{again}"))
    parts.append(Part("gradients of activations", k * b * tokens * sizes.kept_layer, "as much as a layer keeps"))
    logits = min(CHUNK_LOGITS, tokens * sizes.vocabulary)
    parts.append(Part("output head", HEAD_COPIES * 4 * logits, f"{HEAD_COPIES} x 4 bytes x {logits:,} logits a chunk"))
    return parts


# --- the engines ------------------------------------------------------------------------------------------------------


def _vllm_gpu(recipe: TrainRecipe, sizes: Sizes, machine: Machine, max_model_len: int) -> Place:
    """A GPU of an engine: what vLLM may take, and what weights and one forward pass leave of it to the KV cache."""
    rollout = recipe.rollout
    room = rollout.gpu_memory_utilization * machine.gpu_bytes
    weights, work = _vllm_weights_and_work(recipe, sizes)
    fitting = fitting_slots(recipe, sizes, machine, max_model_len)
    some = f"{fitting} of {rollout.slots} slots" if fitting < rollout.slots else f"{fitting} slots"
    tokens = _blocks(max_model_len, VLLM_BLOCK["cuda"])
    token = _kv_token_bytes(recipe, sizes)
    cache = Part("KV cache", fitting * token * tokens, f"{token:,.0f} bytes x {tokens} tokens at full length x {some}")
    name = f"{engine_gpus(recipe)} of {machine.gpus * machine.nodes} GPUs sample; of each vLLM may take "
    return Place(f"{name}{rollout.gpu_memory_utilization:g} x {machine.gpu_bytes / GB:.1f} GB", room, (weights, work, cache))


def _vllm_weights_and_work(recipe: TrainRecipe, sizes: Sizes) -> tuple[Part, Part]:
    tp, slots = recipe.rollout.tensor_parallel, recipe.rollout.slots
    b, w = ELEMENT_BYTES[recipe.policy.precision], sent_bytes(recipe)
    weights = Part("weights", w * sizes.total / tp, f"{w} bytes x {sizes.total / 1e9:.3f}e9 parameters / {tp}")
    work = b * VLLM_BATCH_TOKENS * sizes.kept_layer / tp + 8 * slots * sizes.vocabulary
    formula = f"b x {VLLM_BATCH_TOKENS} tokens x outputs of a layer / {tp} + 2 x 4 bytes x {slots} slots x V"
    return weights, Part("one forward pass", work, formula)


def _kv_token_bytes(recipe: TrainRecipe, sizes: Sizes) -> float:
    """Of a token on each GPU of a vLLM engine."""
    return ELEMENT_BYTES[recipe.policy.precision] * sizes.kv_token / min(recipe.rollout.tensor_parallel, sizes.kv_split)


def fitting_slots(recipe: TrainRecipe, sizes: Sizes, machine: Machine, max_model_len: int) -> int:
    """Sequences of full length that an engine has room for; what does not fit waits, or vLLM computes it again. One has to fit."""
    room = recipe.rollout.gpu_memory_utilization * machine.gpu_bytes - sum(p.bytes for p in _vllm_weights_and_work(recipe, sizes))
    sequence = _kv_token_bytes(recipe, sizes) * _blocks(max_model_len, VLLM_BLOCK["cuda"])
    return min(max(int(room // sequence), 1), recipe.rollout.slots)


def _hf_engines(recipe: TrainRecipe, sizes: Sizes, max_model_len: int) -> list[Part]:
    b, rollout = ELEMENT_BYTES[recipe.policy.precision], recipe.rollout
    engines, w = rollout.engines, sent_bytes(recipe)
    cache = b * sizes.kv_token * max_model_len * rollout.group_size * engines
    return [
        Part("engines: weights", w * sizes.total * engines, f"{w} bytes x {sizes.total / 1e9:.3f}e9 parameters x {engines}"),
        Part("engines: KV cache", cache, f"b x {sizes.kv_token:,} x {max_model_len} tokens x G = {rollout.group_size} x {engines}"),
    ]


def _ram(recipe: TrainRecipe, sizes: Sizes, machine: Machine, learner: list[Part], max_model_len: int) -> Place:
    """One memory for all: each rank a whole learner, the engines, and the file through which weights travel."""
    b, rollout = ELEMENT_BYTES[recipe.policy.precision], recipe.rollout
    ranks = machine.ranks
    parts = [Part(p.name, ranks * p.bytes, p.formula + (f" x {ranks} ranks" if ranks > 1 else "")) for p in learner]
    engines = [] if rollout.servers else _hf_engines(recipe, sizes, max_model_len)
    if engines and rollout.engine == "vllm":
        w = ELEMENT_BYTES[recipe.policy.precision]  # on a CPU an engine decodes what it is sent
        formula = f"{w} bytes x {sizes.total / 1e9:.3f}e9 parameters x {rollout.engines}"
        engines[0] = Part("engines: weights", w * sizes.total * rollout.engines, formula)
        slot = b * sizes.kv_token * (_blocks(max_model_len, VLLM_BLOCK["cpu"]) + VLLM_BLOCK["cpu"])
        cache = max(min(rollout.slots * slot, CPU_KV_MAX_BYTES), 2 * slot)
        formula = f"{rollout.slots} slots x {slot:,} bytes at full length, at most 4 GiB, x {rollout.engines}"
        engines[1] = Part("engines: KV cache", cache * rollout.engines, formula)
    file = Part("weight file", sent_bytes(recipe) * sizes.total, "the policy once, in shared memory")
    here = "no engine" if rollout.servers else f"{rollout.engines} engine{'s' if rollout.engines > 1 else ''}"
    return Place(
        f"this machine, {machine.ram_bytes / GB:.1f} GB free; {ranks} rank{'s' if ranks > 1 else ''} and {here}",
        machine.ram_bytes, (*parts, *engines, file),
    )  # fmt: skip


def sent_bytes(recipe: TrainRecipe) -> int:
    """Of a weight as engines have it: an adapter is merged into values, which are no codes."""
    bytes_of = WEIGHT_BYTES if recipe.policy.lora is None else ELEMENT_BYTES
    return bytes_of[recipe.policy.precision]


def _blocks(tokens: int, block: int) -> int:
    return ceil(tokens / block) * block
