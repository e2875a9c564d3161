"""What a run takes of memory, by part, from the model's config alone: no weights are read.

Sizes come from the model that transformers builds on torch's meta device, so a parameter is counted as it will be there. Every part
names its formula where it is printed. GB are 10^9 bytes. What is no part stands in what is left: CUDA contexts, NCCL's buffers,
fragmentation, the programs themselves; and none of it has been held against a GPU by this project yet.

Under `placement: split` the engines have the last `engines * tensor_parallel` GPUs of the first node, the learner all others, and
FSDP2 shards its weights, masters, gradients and moments over them. On a CPU every rank holds the whole learner, in the same RAM.

    T  tokens of the longest pass      L  layers      D  hidden size      V  vocabulary      b  bytes of an element
"""

import os
import re
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from data.recipe import InputError
from rl.config import HardwareConfig, LoraConfig, TrainRecipe
from rl.logp import CHUNK_LOGITS
from rl.lora import add_adapter

GB = 1e9
ELEMENT_BYTES = {"fp32": 4, "bf16": 2, "fp8": 2}
"""Of an activation. FP8 products save codes, which is not counted: activations are then an upper bound."""
WEIGHT_BYTES = {"fp32": 4, "bf16": 2, "fp8": 1}
"""Of a weight where it is used, sent and saved; the few that are not converted to FP8 are counted as if they were."""
KEPT = 2.3
"""Bytes that autograd keeps of a layer, over those of the outputs of its matrices and norms: the most that saved_tensors_hooks
counts for tiny Qwen3-MoE and DeepSeek-V3 policies in fp32 (1.7 to 2.0) and bf16 (2.2 to 2.3); a test holds it."""
HEAD_COPIES = 6
"""FP32 copies of a chunk of logits at once in `rl.logp`: cast, scaled, two for the entropy, the gradients of the first two."""
VLLM_BATCH_TOKENS = 16384
"""Tokens that vLLM forwards at once while it measures its own need: its largest default (`max_num_batched_tokens`, vLLM 0.32)."""
VLLM_BLOCK = {"cuda": 16, "cpu": 128}
"""Tokens of a KV block by device; a sequence takes whole blocks."""
TWO_PROCESSES_BYTES = 3e9
"""Of a GPU that two processes share: their CUDA contexts, and what NCCL and the libraries keep. Assumed, not measured."""
CPU_KV_MAX_BYTES = 4 << 30
"""As in rl.engines.vllm_worker: more than this a vLLM engine on a CPU does not take for its KV cache."""


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
    total = active = root = 0
    for name, parameter in model.named_parameters():
        n = parameter.numel()
        expert = ".experts." in name
        total += n
        active += n * chosen // parameter.shape[0] if expert else n
        inside = re.search(r"\.layers\.(\d+)\.", name)
        if inside is None:
            root += n
            continue
        sums = layers.setdefault(int(inside[1]), [0, 0])
        sums[0] += n
        sums[1] += _outputs(name, parameter, chosen) if expert else parameter.shape[0]
    kv_token, kv_split = _kv(config)
    return Sizes(
        total=total, active=active, adapter=_adapter(model, lora), layers=len(layers), hidden=config.hidden_size,
        vocabulary=config.vocab_size, layer=max(n for n, _ in layers.values()), root=root,
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
    """GPUs that engines have to themselves; an hf engine lives in the learner's process, on its GPU."""
    return recipe.rollout.engines * recipe.rollout.tensor_parallel if recipe.rollout.engine == "vllm" else 0


def learner_ranks(recipe: TrainRecipe, machine: Machine) -> int:
    """Processes that learn; 0 or less if the engines leave no GPU."""
    return machine.gpus * machine.nodes - engine_gpus(recipe) if machine.gpus else machine.ranks


def pass_tokens(recipe: TrainRecipe, max_model_len: int) -> tuple[int, int]:
    """Tokens of the longest group and of the longest pass; G completions share a prompt, and their last tokens stay out."""
    rollout = recipe.rollout
    prompt = max(max_model_len - rollout.max_tokens, 1)
    group = prompt + rollout.group_size * (rollout.max_tokens - 1)
    groups = ceil(recipe.learner.prompts_per_step / recipe.learner.steps_per_batch)
    return group, max(group, min(recipe.learner.micro_tokens, group * groups))


def places(recipe: TrainRecipe, sizes: Sizes, machine: Machine, max_model_len: int) -> list[Place]:
    """Every kind of place with its parts. InputError if the engines leave no GPU to the learner."""
    ranks = learner_ranks(recipe, machine)
    if ranks < 1:
        raise InputError(
            f"rollout: {recipe.rollout.engines} engines on {recipe.rollout.tensor_parallel} GPUs each leave none of "
            f"{machine.gpus * machine.nodes} to the learner; lower rollout.engines or rollout.tensor_parallel"
        )
    shards = ranks if machine.gpus else 1
    learner = [*_state(recipe, sizes, shards), *_passing(recipe, sizes, shards, max_model_len)]
    if not machine.gpus:
        return [_ram(recipe, sizes, machine, learner, max_model_len)]
    first = f"{ranks} of {machine.gpus * machine.nodes} GPUs learn; on each"
    if recipe.rollout.engine == "hf":
        return [Place(first, machine.gpu_bytes, (*learner, *_hf_engines(recipe, sizes, max_model_len)))]
    return [Place(first, machine.gpu_bytes, tuple(learner)), _vllm_gpu(recipe, sizes, machine, max_model_len)]


# --- the learner ------------------------------------------------------------------------------------------------------


def _state(recipe: TrainRecipe, sizes: Sizes, shards: int) -> list[Part]:
    """What stays over the whole run, as `rl.optim.AdamW` holds it."""
    b = WEIGHT_BYTES[recipe.policy.precision]
    if recipe.policy.precision == "fp8" and recipe.policy.lora is not None:
        b += _sent_bytes(recipe)  # an adapter's base has its values beside its codes
    m = ELEMENT_BYTES[recipe.learner.optimizer.moments]
    share = f"{sizes.total / 1e9:.3f}e9 parameters" + (f" / {shards}" if shards > 1 else "")
    each = sizes.total / shards
    parts = [Part(f"weights, {recipe.policy.precision}", b * each, f"{b} bytes x {share}")]
    if recipe.policy.lora is not None:
        # The reference is the policy without its adapter, and frozen weights have no masters.
        share = f"{sizes.adapter / 1e9:.3f}e9 of the adapter" + (f" / {shards}" if shards > 1 else "")
        each = sizes.adapter / shards
        parts.append(Part("adapter, fp32", 4 * each, f"4 bytes x {share}"))
    elif b < 4:
        parts.append(Part("masters, fp32", 4 * each, f"4 bytes x {share}"))
    parts.append(Part("gradients, fp32", 4 * each, f"4 bytes x {share}"))
    parts.append(Part(f"two moments, {recipe.learner.optimizer.moments}", 2 * m * each, f"2 x {m} bytes x {share}"))
    if recipe.loss.kl_coef > 0.0 and recipe.policy.lora is None:
        parts.append(Part("reference", b * each, f"{b} bytes x {share}"))
    return parts


def _passing(recipe: TrainRecipe, sizes: Sizes, shards: int, max_model_len: int) -> list[Part]:
    """What a forward and backward pass needs on top, at its worst: every completion as long as it may be.

    Attention holds no scores, on a CPU (flash attention) as on a GPU (FlexAttention); what it keeps is a log-sum a row and head.
    """
    b = ELEMENT_BYTES[recipe.policy.precision]
    _, tokens = pass_tokens(recipe, max_model_len)
    parts = []
    if shards > 1:
        gathered = 2 * sizes.root + 3 * sizes.layer
        # Codes are made of FP32 masters, after those are gathered.
        wide, said = (4, "4 bytes") if recipe.policy.precision == "fp8" else (b, "b")
        parts.append(Part("gathered", wide * gathered, f"{said} x (2 x embedding and head + 3 x layer): this, the next one, one gradient"))
    checkpointing = recipe.policy.activation_checkpointing
    if checkpointing:
        parts.append(Part("layer inputs", b * tokens * sizes.hidden * sizes.layers, f"b x T x D x L, T = {tokens:,}"))
    kept = KEPT * b * tokens * (sizes.kept_layer if checkpointing else sizes.kept_layers)
    again = ", one layer is recomputed" if checkpointing else f", T = {tokens:,}"
    parts.append(Part("activations", kept, f"{KEPT} x b x T x outputs of {'a layer' if checkpointing else 'all layers'}{again}"))
    parts.append(Part("gradients of activations", KEPT * b * tokens * sizes.kept_layer, "as much as a layer keeps"))
    logits = min(CHUNK_LOGITS, tokens * sizes.vocabulary)
    parts.append(Part("output head", HEAD_COPIES * 4 * logits, f"{HEAD_COPIES} x 4 bytes x {logits:,} logits a chunk"))
    return parts


# --- the engines ------------------------------------------------------------------------------------------------------


def _vllm_gpu(recipe: TrainRecipe, sizes: Sizes, machine: Machine, max_model_len: int) -> Place:
    """A GPU of an engine: what vLLM may take, and what weights and one forward pass leave of it to the KV cache."""
    rollout = recipe.rollout
    b, tp = ELEMENT_BYTES[recipe.policy.precision], rollout.tensor_parallel
    w = _sent_bytes(recipe)
    room = rollout.gpu_memory_utilization * machine.gpu_bytes
    weights = Part("weights", w * sizes.total / tp, f"{w} bytes x {sizes.total / 1e9:.3f}e9 parameters / {tp}")
    work = b * VLLM_BATCH_TOKENS * sizes.kept_layer / tp + 8 * rollout.slots * sizes.vocabulary
    formula = f"b x {VLLM_BATCH_TOKENS} tokens x outputs of a layer / {tp} + 2 x 4 bytes x {rollout.slots} slots x V"
    token = b * sizes.kv_token / min(tp, sizes.kv_split)
    sequence = token * _blocks(max_model_len, VLLM_BLOCK["cuda"])
    # One sequence has to fit; slots that do not fit at full length wait, or vLLM computes them again.
    fitting = min(max(int((room - weights.bytes - work) // sequence), 1), rollout.slots)
    some = f"{fitting} of {rollout.slots} slots" if fitting < rollout.slots else f"{fitting} slots"
    formula_kv = f"{token:,.0f} bytes x {_blocks(max_model_len, VLLM_BLOCK['cuda'])} tokens at full length x {some}"
    return Place(
        f"{engine_gpus(recipe)} of {machine.gpus * machine.nodes} GPUs sample; of each vLLM may take "
        f"{rollout.gpu_memory_utilization:g} x {machine.gpu_bytes / GB:.1f} GB",
        room,
        (weights, Part("one forward pass", work, formula), Part("KV cache", fitting * sequence, formula_kv)),
    )


def _hf_engines(recipe: TrainRecipe, sizes: Sizes, max_model_len: int) -> list[Part]:
    b, rollout = ELEMENT_BYTES[recipe.policy.precision], recipe.rollout
    engines, w = rollout.engines, _sent_bytes(recipe)
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
    engines = _hf_engines(recipe, sizes, max_model_len)
    if rollout.engine == "vllm":
        slot = b * sizes.kv_token * (_blocks(max_model_len, VLLM_BLOCK["cpu"]) + VLLM_BLOCK["cpu"])
        cache = max(min(rollout.slots * slot, CPU_KV_MAX_BYTES), 2 * slot)
        formula = f"{rollout.slots} slots x {slot:,} bytes at full length, at most 4 GiB, x {rollout.engines}"
        engines[1] = Part("engines: KV cache", cache * rollout.engines, formula)
    file = Part("weight file", _sent_bytes(recipe) * sizes.total, "the policy once, in shared memory")
    return Place(
        f"this machine, {machine.ram_bytes / GB:.1f} GB free; {ranks} rank{'s' if ranks > 1 else ''} and {rollout.engines} "
        f"engine{'s' if rollout.engines > 1 else ''}", machine.ram_bytes, (*parts, *engines, file),
    )  # fmt: skip


def _sent_bytes(recipe: TrainRecipe) -> int:
    """Of a weight as engines have it: an adapter is merged into values, which are no codes."""
    bytes_of = WEIGHT_BYTES if recipe.policy.lora is None else ELEMENT_BYTES
    return bytes_of[recipe.policy.precision]


def _blocks(tokens: int, block: int) -> int:
    return ceil(tokens / block) * block
