"""Checkpoints of an SFT run, and how a Trainer goes on from one with every expert as it was.

transformers.Trainer writes a mixture of experts by the names of its experts and does not put them together again when it resumes:
experts would be back at their first weights without a word (transformers issue 48805). Here what is trained is written under the
model's own names and copied back into place, each tensor checked for its name and shape; optimizer, schedule and RNG are the
Trainer's. A checkpoint counts once `whole.json`, written last, stands in it with the hash of every file.

    checkpoints/checkpoint-<N>/  trained.safetensors, optimizer.pt, scheduler.pt, rng_state.pth, trainer_state.json, whole.json

Under FSDP weights and optimizer state stand in `sharded/` instead, by torch.distributed.checkpoint: each rank writes its own part, and
nothing is gathered.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from transformers import Trainer

from data.recipe import InputError

WEIGHTS = "trained.safetensors"
SCHEDULER = "scheduler.pt"
SHARDED = "sharded"
WHOLE = "whole.json"


class Resumable(Trainer):
    """A Trainer whose checkpoints hold what is trained, exactly; `data_fingerprint` tells the rows of one run from another's."""

    data_fingerprint = ""

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        Trainer._save_checkpoint(self, model, trial)  # trl's would add a model card that links to its hub
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            whole = {"data": self.data_fingerprint, "ranks": self.accelerator.num_processes, "files": _hashes(folder)}
            aside = folder / f".{WHOLE}"
            aside.write_text(json.dumps(whole, indent=2) + "\n")
            os.replace(aside, folder / WHOLE)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        assert output_dir is not None
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in trained_tensors(self.model).items()}
        save_file(tensors, Path(output_dir) / WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        if self.is_fsdp_enabled:
            return  # they come with the optimizer's, once the policy is sharded
        held = load_file(Path(resume_from_checkpoint) / WEIGHTS)
        here = trained_tensors(self.model)
        assert held.keys() == here.keys(), f"{resume_from_checkpoint}: holds other tensors than the policy"
        with torch.no_grad():
            for name, tensor in here.items():
                assert tensor.shape == held[name].shape, f"{resume_from_checkpoint}: {name} has another shape"
                tensor.copy_(held[name])

    # --- under FSDP: what the Trainer would write holds frozen weights too, and gathers ------------------------------------

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        dcp.save(self._sharded_state(), checkpoint_id=Path(output_dir) / SHARDED)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self.is_fsdp_enabled or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        state = self._sharded_state()
        dcp.load(state, checkpoint_id=Path(checkpoint) / SHARDED)  # weights into their places; names and shapes are checked
        set_optimizer_state_dict(self.model, self.optimizer, state["optimizer"])
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER, weights_only=True))

    def _sharded_state(self) -> dict[str, Any]:
        weights = {name: tensor.detach() for name, tensor in trained_tensors(self.model).items()}
        return {"weights": weights, "optimizer": get_optimizer_state_dict(self.model, self.optimizer)}


def trained_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What training changes, each tensor once, by the model's own names: parameters with a gradient, and buffers."""
    seen: set[int] = set()
    found = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        frozen = isinstance(tensor, torch.nn.Parameter) and not tensor.requires_grad
        if not frozen and id(tensor) not in seen:
            seen.add(id(tensor))  # tied weights stand under two names
            found[name] = tensor
    return found


def newest(folder: Path, fingerprint: str, ranks: int) -> Path | None:
    """The newest whole checkpoint under `folder`, others are removed; InputError if it is of other rows or ranks."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    for path in found:
        whole = _whole(path)
        if whole is None:
            print(f"{path}: not whole, so it is passed over", flush=True)
            continue
        if whole["data"] != fingerprint:
            raise InputError(f"data: not the rows that {path} was trained on; restore them, or choose another run.name")
        if whole["ranks"] != ranks:
            raise InputError(f"{path}: written by {whole['ranks']} ranks, and there are {ranks}; start as many, or choose another run.name")
        return path
    return None


def _whole(path: Path) -> dict[str, Any] | None:
    try:
        whole = json.loads((path / WHOLE).read_text())
    except (OSError, ValueError):
        return None
    return whole if _hashes(path) == whole["files"] else None


def remove_checkpoints(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def _hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in (WHOLE, f".{WHOLE}"))
    return {str(path.relative_to(folder)): hashlib.file_digest(path.open("rb"), "sha256").hexdigest() for path in files}
