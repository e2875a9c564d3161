"""Policy folders from and to FP8, tensor by tensor: no model is built, and one weight at a time is in memory.

An engine starts from a folder in the layout of what it will be sent: codes for an FP8 policy, BF16 where an adapter is trained, whose
merged weights are no codes any more. Either holds the values that the learner starts from.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from rl.config import Fp8Config, PolicyConfig
from rl.experts import expert_views
from rl.fp8.convert import REST, convert
from rl.fp8.files import Fp8Files, is_block_fp8
from rl.fp8.layout import SCALE, coded
from rl.fp8.quantize import SQUARE, quantize
from rl.mtp import attach, in_files, repeated
from rl.policy import load_tokenizer, plain_config, save_policy


def engine_policy(policy: PolicyConfig, source: Path, target: Path) -> Path:
    """The folder that an engine of this policy starts from: `source`, or what is written to `target`.

    An engine is given codes where the learner sends codes, and else none; either way the values that the learner starts from.
    """
    if policy.precision == "fp8":
        return rewrite(source, target, policy.fp8, policy.fp8.rest, merged=policy.lora is not None)
    if is_block_fp8(source):
        return rewrite(source, target, None, policy.precision, merged=True)
    return source


def rewrite(source: Path, target: Path, config: Fp8Config | None, rest: str, *, merged: bool) -> Path:
    """Writes the policy of `source` to `target`, over what is there. Codes that `source` holds are taken as they are.

    config: what is quantised, None is nothing; rest: the type of everything else; merged: write the values of the codes.
    """
    model = _empty_model(source)
    if config is not None:
        convert(model, config.model_copy(update={"backend": "reference"}), torch.device("cpu"))
    weights = {inner for name in coded(model) for inner, _ in expert_views(name, model.get_parameter(name))}
    aside = target.with_name(f".{target.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    save_policy(aside, _tensors(source, model, weights, REST[rest], merged), model, load_tokenizer(source), codes=not merged)
    shutil.rmtree(target, ignore_errors=True)
    aside.rename(target)
    return target


def _empty_model(source: Path) -> PreTrainedModel:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(plain_config(source), dtype=torch.float32, trust_remote_code=False)
        if in_files(source, model.config):
            attach(model)
    if (source / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(source)
    return model


def _tensors(
    source: Path, model: PreTrainedModel, weights: set[str], rest: torch.dtype, merged: bool
) -> Iterator[tuple[str, torch.Tensor]]:
    files = Fp8Files(source)
    buffers = dict(model.named_buffers())
    known = weights | {inner for name, p in model.state_dict().items() for inner, _ in expert_views(name, p)}
    known |= {name for name, _ in repeated(model)}
    for name in files.names():
        if name not in known:
            continue  # transformers ignores it too
        if name not in weights:
            yield name, files.tensor(name).to(buffers[name].dtype if name in buffers else rest)
            continue
        codes = files.codes(name) or quantize(files.tensor(name), SQUARE)
        if merged:
            yield name, codes.dequantize(rest)
        else:
            yield name, codes.codes
            yield name + SCALE, codes.scales
