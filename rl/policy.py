"""The policy: a causal LM that transformers loads, and its tensors under the names of a checkpoint.

transformers keeps a layer's experts fused (`gate_up_proj` [E, 2I, D], `down_proj` [E, D, I]); files, vLLM and everything that
travels name each expert. `checkpoint_views` is the one place that knows both: it walks a model and yields every tensor by its name
in a checkpoint, as a view into the model's own memory. The learner reads through these views when it saves and when it sends
weights to the engines; an engine that runs on transformers writes through them.

    E  experts      I  width of an expert      D  hidden size
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from data.recipe import InputError
from rl import attention
from rl.experts import expert_views
from rl.fp8.files import Fp8Files, is_block_fp8
from rl.fp8.layout import SCALE, coded, complete_config
from rl.fp8.quantize import BLOCK
from rl.fp8.weights import Codes
from rl.lora import adapter_layers, base_name, has_adapter, merge
from rl.mtp import load_mtp, repeated

logging.disable_progress_bar()  # the display is ours
# The table of what is wrong with weights: `load_model` says it in a line. (A level would make it warn of tensor parallelism.)
logging.get_logger("transformers.modeling_utils").addFilter(lambda record: "LOAD REPORT" not in record.getMessage())

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16}
"""Of activations, by precision."""
SHARD_BYTES = 4 << 30
END_BYTES = 1 << 20


def policy_folder(path: str, revision: str | None) -> Path:
    """The folder of a policy: itself, or what the hub has under this id (safetensors, configs and tokenizer alone)."""
    if Path(path).is_dir():
        return Path(path)
    try:
        patterns = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]
        return Path(snapshot_download(path, revision=revision, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        raise InputError(f"policy.path: '{path}' is no folder, and the hub gave: {' '.join(str(error).split())}") from None


def policy_fingerprint(folder: Path) -> str:
    """Tells a policy from another in the same folder: sha256 over its config, and name, size and both ends of each safetensors file."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            digest.update(file.read(END_BYTES))
            file.seek(max(0, size - END_BYTES))
            digest.update(file.read(END_BYTES))
    return digest.hexdigest()


def load_model(path: str | Path, dtype: torch.dtype, *, attention_name: str = attention.NAME) -> PreTrainedModel:
    """A causal LM from a folder, safetensors only, in eval mode (RL trains without dropout). Block-FP8 weights are dequantised.

    Raises InputError with the library's reason if it cannot be loaded, or if a tensor is missing or has another shape: transformers
    would fill it with random numbers.
    """
    # transformers' own choice is the grouped product; it takes no float64, in which only tests compute.
    experts = {"experts_implementation": "eager"} if dtype is torch.float64 else {}
    in_codes = is_block_fp8(Path(path))
    try:
        kind, source = _coded_source(Path(path)) if in_codes else (AutoModelForCausalLM, {"pretrained_model_name_or_path": str(path)})
        model, found = kind.from_pretrained(
            **source,
            dtype=dtype,
            use_safetensors=True,
            attn_implementation=attention_name,
            **experts,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except SafetensorError as error:
        raise InputError(f"policy.path: cannot load '{path}': its safetensors are damaged ({error}); copy or save them again") from None
    except (OSError, ValueError) as error:
        raise InputError(f"policy.path: cannot load '{path}': {' '.join(str(error).split())}") from None
    _check_weights(path, sorted(found["missing_keys"]), sorted(found["mismatched_keys"]))
    if in_codes and (Path(path) / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(path)
    load_mtp(model, Path(path))  # transformers leaves it out
    return model.eval()


def drop_nothing(model: torch.nn.Module) -> None:
    """Sets every rate of dropout to 0, of layers too: RL trains without, and where activations are recomputed eval mode cannot say so."""
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and ("drop" in name or (isinstance(module, torch.nn.Dropout) and name == "p")):
                setattr(module, name, 0.0)


def _coded_source(path: Path) -> tuple[Any, dict[str, Any]]:
    """The class of a block-FP8 policy, and what its `from_pretrained` takes to load it as if it were saved in high precision."""
    config = plain_config(path)
    given = {"pretrained_model_name_or_path": None, "config": config, "state_dict": Fp8Files(path).state_dict()}
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], given


def plain_config(path: Path) -> PretrainedConfig:
    """The config of a policy without what it says of quantised weights, by which transformers would load them itself."""
    config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    return config


def _check_weights(path: str | Path, missing: list[str], mismatched: list[tuple[str, object, object]]) -> None:
    if mismatched:
        name, there, wanted = mismatched[0]
        what = f"{name} has the size {list(there)} and its config.json asks for {list(wanted)}"  # type: ignore[call-overload]
    elif missing:
        what = f"{missing[0]} is missing" + (f", and {len(missing) - 1} more" if missing[1:] else "")
    else:
        return
    raise InputError(f"policy.path: cannot load '{path}': {what}; save weights and config together with save_pretrained")


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer saved with a policy; raises InputError where there is none or it has no end or pad token."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)
    except Exception as error:  # noqa: BLE001 - tokenizers raises nothing narrower for a file that it cannot read
        said = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(
            f"policy.path: cannot read the tokenizer in '{path}' ({said}); save it again with tokenizer.save_pretrained"
        ) from None
    for role in ("eos", "pad"):
        if getattr(tokenizer, f"{role}_token_id") is None:
            raise InputError(
                f"policy.path: the tokenizer of '{path}' has no {role} token; set tokenizer.{role}_token to a token of its "
                "vocabulary and save it again with tokenizer.save_pretrained"
            )
    return tokenizer


def end_tokens(model_config: object, tokenizer: PreTrainedTokenizerBase, generation_eos: int | list[int] | None) -> tuple[int, ...]:
    """Token ids that end a completion: the generation config's, the model config's and the tokenizer's."""
    found: set[int] = set()
    for value in (generation_eos, getattr(model_config, "eos_token_id", None), tokenizer.eos_token_id):
        found.update([] if value is None else [value] if isinstance(value, int) else value)
    return tuple(sorted(found))


def persistent_tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters, each once, and the buffers that a checkpoint holds, in the order of the modules; adapters merged into them."""
    adapters = adapter_layers(model)
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in seen or (adapters and "lora_" in name):
            continue  # tied weights stand under two names
        seen.add(id(tensor))
        base = base_name(name) if adapters else name
        yield base, merge(tensor, adapters[base]) if base in adapters else tensor
    if isinstance(model, PreTrainedModel):
        yield from repeated(model)


def checkpoint_views(model: torch.nn.Module, cast: torch.dtype | None = None) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of a checkpoint as a view into the model; sharded parameters are gathered, one at a time, which is collective.

    An FP8 policy's weights are their codes and scales; of sharded masters the codes are gathered. `cast` gives other parameters in
    another type, as new tensors; buffers keep theirs.
    """
    codes = exported_codes(model)
    for name, tensor in persistent_tensors(model):
        if name in codes:
            held = codes[name].of(tensor)
            for (inner, code), (_, scales) in zip(expert_views(name, held.codes), expert_views(name, held.scales), strict=True):
                yield inner, code
                yield inner + SCALE, scales
            continue
        whole = tensor.detach()
        if isinstance(whole, DTensor):
            whole = whole.full_tensor()
        if cast is not None and isinstance(tensor, torch.nn.Parameter):
            whole = whole.to(cast)
        yield from expert_views(name, whole)


def exported_codes(model: torch.nn.Module) -> dict[str, Codes]:
    """Masters that leave the model as codes; none where an adapter is merged into their values."""
    return {} if has_adapter(model) else coded(model)


def checkpoint_specs(model: torch.nn.Module, cast: torch.dtype | None = None) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Name, dtype and shape of every tensor of a checkpoint; gathers nothing."""
    codes = exported_codes(model)
    for name, tensor in persistent_tensors(model):
        if name in codes:
            for inner, view in expert_views(name, torch.empty(codes[name].shape_of(tensor), device="meta")):
                blocks = tuple(-(-size // BLOCK) for size in view.shape)
                yield inner, "float8_e4m3fn", tuple(view.shape)
                yield inner + SCALE, "float32", blocks
            continue
        kind = cast if cast is not None and isinstance(tensor, torch.nn.Parameter) else tensor.dtype
        for inner, view in expert_views(name, torch.empty(tensor.shape, dtype=kind, device="meta")):
            yield inner, str(view.dtype).removeprefix("torch."), tuple(view.shape)


def save_policy(
    folder: Path,
    tensors: Iterable[tuple[str, torch.Tensor]],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    codes: bool = True,
) -> None:
    """Writes a folder that transformers and vLLM load: safetensors in shards, config, generation config, tokenizer.

    codes: whether an FP8 model's weights are among `tensors` as codes; with an adapter they are values in any case.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, torch.Tensor]] = [{}]
    index: dict[str, int] = {}
    size = total = 0
    for name, tensor in tensors:
        if size + tensor.nbytes > SHARD_BYTES and shards[-1]:
            _write_shard(folder, len(shards) - 1, shards[-1])
            shards[-1] = {}
            shards.append({})
            size = 0
        saved = tensor.detach().cpu().contiguous()
        # The same memory under a second name (a head written twice): safetensors takes it once.
        shards[-1][name] = saved.clone() if any(saved.data_ptr() == other.data_ptr() for other in shards[-1].values()) else saved
        index[name] = len(shards) - 1
        size += tensor.nbytes
        total += tensor.nbytes
    _write_shard(folder, len(shards) - 1, shards[-1])
    _name_shards(folder, len(shards), index, total)
    if not model.config.architectures:  # a model made from a config has none until it saves itself
        model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    complete_config(folder, model, codes=codes and not has_adapter(model))
    model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _write_shard(folder: Path, number: int, tensors: dict[str, torch.Tensor]) -> None:
    shard = folder / f"shard-{number}.safetensors"
    shard.touch()
    mode = shard.stat().st_mode  # as the umask has it; safetensors makes a file that its owner alone can read
    save_file(tensors, shard, metadata={"format": "pt"})
    shard.chmod(mode)


def _name_shards(folder: Path, count: int, index: dict[str, int], total: int) -> None:
    if count == 1:
        (folder / "shard-0.safetensors").rename(folder / "model.safetensors")
        return
    names = [f"model-{n + 1:05d}-of-{count:05d}.safetensors" for n in range(count)]
    for number, name in enumerate(names):
        (folder / f"shard-{number}.safetensors").rename(folder / name)
    weight_map = {tensor: names[number] for tensor, number in index.items()}
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2)
    (folder / "model.safetensors.index.json").write_text(text + "\n")
