"""DeepSeek-V3's layout of a checkpoint: which weights of a model are codes, and what `config.json` says of them.

A weight `<module>.weight` in E4M3 stands beside `<module>.weight_scale_inv`, FP32, a scale for each 128x128 block (the name is
DeepSeek's; it is what a code is multiplied by). `quantization_config` names the block size and every matrix that is not in FP8; without
the gates in that list vLLM would take them for quantised.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from rl.fp8.experts import ExpertCodes
from rl.fp8.linear import Fp8Linear
from rl.fp8.quantize import BLOCK
from rl.fp8.weights import Codes

SCALE = "_scale_inv"
"""Ends the name of the scales of a weight."""
EXPERT_MATRICES = ("gate_up_proj", "down_proj")


def coded_modules(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """Modules that `rl.fp8.convert` has made, by name."""
    for name, module in model.named_modules():
        if isinstance(module, Fp8Linear) or isinstance(vars(module).get("fp8"), ExpertCodes):
            yield name, module


def coded(model: torch.nn.Module) -> dict[str, Codes]:
    """Codes by the name of their master; none for a model that was not converted."""
    found: dict[str, Codes] = {}
    for name, module in coded_modules(model):
        if isinstance(module, Fp8Linear):
            found[f"{name}.weight"] = module.codes
        else:
            found |= {f"{name}.{matrix}": getattr(module.fp8, matrix) for matrix in EXPERT_MATRICES}
    return found


def quantization_config(model: torch.nn.Module) -> dict[str, Any] | None:
    """What stands in `config.json`; None for a model without codes."""
    converted = {name for name, _ in coded_modules(model)}
    if not converted:
        return None
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    left = [
        name
        for name, module in model.named_modules()
        if name not in converted and module is not embedding and any(p.ndim > 1 for p in module.parameters(recurse=False))
    ]
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
        "modules_to_not_convert": left,
    }


def complete_config(folder: Path, model: Any, *, codes: bool = True) -> None:
    """Adds to a saved `config.json` what transformers leaves out: how weights are quantised, and how DeepSeek-V3 routes."""
    path = folder / "config.json"
    said = json.loads(path.read_text())
    config = {key: value for key, value in said.items() if key != "quantization_config"}
    if config.get("model_type") == "deepseek_v3":
        config |= {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}
    quantization = quantization_config(model) if codes else None
    if quantization is not None:
        config["quantization_config"] = quantization
    if config != said:
        path.write_text(json.dumps(config, indent=2) + "\n")
