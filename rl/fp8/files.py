"""Reads the safetensors files of a block-FP8 policy, tensor by tensor: as codes, or as the values they stand for.

transformers' own loader of such files is for inference on a GPU and takes no weight whose rows are no multiple of 128, as DeepSeek-V3's
`kv_a_proj_with_mqa` (576). Here it is given lazy tensors that are dequantised when it reads them, so it loads any policy as if it
were saved in high precision, and never the whole model twice.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from data.recipe import InputError
from rl.fp8.layout import SCALE
from rl.fp8.quantize import BLOCK, E4M3, SQUARE, QTensor


def is_block_fp8(folder: Path) -> bool:
    """Whether the folder's weights are codes in 128x128 blocks. InputError for any other quantisation."""
    try:
        said = json.loads((folder / "config.json").read_text()).get("quantization_config")
    except (OSError, ValueError):
        return False  # transformers says what is wrong with it
    if said is None:
        return False
    if said.get("quant_method") != "fp8" or said.get("weight_block_size") != [BLOCK, BLOCK]:
        method, block = said.get("quant_method"), said.get("weight_block_size")
        raise InputError(
            f"policy.path: '{folder}' is quantised by '{method}' with blocks {block}; known is fp8 with blocks [128, 128], "
            "as DeepSeek-V3 has it; use a checkpoint of that kind, or one in BF16"
        )
    return True


class Fp8Files:
    """The tensors of a folder by name, scales with their weights."""

    def __init__(self, folder: Path):
        self.files = [safe_open(path, framework="pt") for path in sorted(folder.glob("*.safetensors"))]
        self.home = {name: file for file in self.files for name in file.keys()}

    def names(self) -> Iterator[str]:
        """All but the scales."""
        return (name for name in self.home if not name.endswith(SCALE))

    def codes(self, name: str) -> QTensor | None:
        """Codes of a weight, or None where it is in high precision. InputError if its scales are missing or of a wrong shape."""
        if self.home[name].get_slice(name).get_dtype() != "F8_E4M3":
            return None
        codes = self.home[name].get_tensor(name)
        scales_name = name + SCALE
        wanted = [-(-codes.shape[-2] // BLOCK), -(-codes.shape[-1] // BLOCK)]
        there = self.home[scales_name].get_slice(scales_name).get_shape() if scales_name in self.home else None
        if there != wanted:
            raise InputError(f"policy.path: {scales_name} has shape {there}, but {name} in 128x128 blocks needs {wanted}")
        return QTensor(codes.view(torch.uint8).view(E4M3), self.home[scales_name].get_tensor(scales_name).float(), SQUARE)

    def tensor(self, name: str) -> torch.Tensor:
        """In high precision: FP32 for codes."""
        codes = self.codes(name)
        return self.home[name].get_tensor(name) if codes is None else codes.dequantize()

    def state_dict(self) -> dict[str, "LazyTensor"]:
        return {name: LazyTensor(self, name) for name in self.names()}


class LazyTensor:
    """What transformers' loader asks of an entry of a state dict."""

    def __init__(self, files: Fp8Files, name: str):
        self.files = files
        self.name = name

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self.files.tensor(self.name)[index]

    def get_shape(self) -> list[int]:
        return self.files.home[self.name].get_slice(self.name).get_shape()

    def get_dtype(self) -> str:
        kind = self.files.home[self.name].get_slice(self.name).get_dtype()
        return "F32" if kind == "F8_E4M3" else kind
