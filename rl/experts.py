"""The names of experts in a checkpoint: transformers keeps a layer's experts fused, files and vLLM name each one.

E  experts      I  width of an expert      D  hidden size
"""

from collections.abc import Iterator

import torch


def expert_views(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """A tensor of the model as the tensors of a checkpoint: itself, or the experts it holds; views into its memory."""
    stem, _, leaf = name.rpartition(".")
    if not stem.endswith(".experts") or leaf not in ("gate_up_proj", "down_proj"):
        assert not stem.endswith(".experts"), f"{name}: this layout of fused experts is not known"
        yield name, tensor
        return
    for index, expert in enumerate(tensor.unbind(0)):
        if leaf == "gate_up_proj":
            gate, up = expert.chunk(2, dim=0)
            yield f"{stem}.{index}.gate_proj.weight", gate
            yield f"{stem}.{index}.up_proj.weight", up
        else:
            yield f"{stem}.{index}.down_proj.weight", expert
