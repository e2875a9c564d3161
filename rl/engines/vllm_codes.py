"""vLLM on a CPU with the weights of an FP8 policy: codes on the disk and on the wire, values in the engine.

vLLM's own kernels for block-FP8 weights on a CPU keep activations in BF16 (W8A16), need AMX, and take fused projections of whole blocks
alone. Decoded as they are loaded, the same weights run on its plain kernels, on any CPU, whatever the shapes; an engine in FP32 then
has the very values of the learner. The engine's weights take as much memory as in BF16. On a GPU vLLM computes from the codes.
"""

from collections.abc import Generator
from dataclasses import replace
from pathlib import Path

import torch
from vllm.config import ModelConfig
from vllm.config.load import LoadConfig
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from rl.fp8.files import Fp8Files

VALUES = "cohort_values"
"""In vLLM's registry of load formats."""
PLAIN = {"quantization_config": None}
"""What such an engine is told of the folder's config."""


@register_model_loader(VALUES)
class ValuesLoader(DefaultModelLoader):
    """Reads a block-FP8 folder as values."""

    def __init__(self, load_config: LoadConfig):
        super().__init__(replace(load_config, load_format="safetensors"))

    def get_all_weights(self, model_config: ModelConfig, model: torch.nn.Module) -> Generator[tuple[str, torch.Tensor], None, None]:
        files = Fp8Files(Path(model_config.model))
        for name in files.names():
            yield name, files.tensor(name)
