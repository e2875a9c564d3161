"""Checkpoints: a folder that transformers and vLLM load as a policy, and beside it what the run needs to go on.

    step-<N>/  model.safetensors, config.json, tokenizer …     the policy after N steps
               trainer/                                        optimizer and RNG, by torch.distributed.checkpoint
               state.json                                      positions, versions, counters
               hashes.json                                     sha256 of every file above; written last

A checkpoint is written aside and renamed, so a folder named `step-<N>` is whole; its hashes are verified when it is read, and one
that was damaged is refused by name. Saving is collective over ranks; another number of ranks may load what it wrote.
"""

import errno
import hashlib
import json
import os
import shutil
import sqlite3
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch.distributed.checkpoint import CheckpointException
from transformers import PreTrainedTokenizerBase

from data.recipe import InputError
from rl.learner import Learner
from rl.policy import save_policy
from rl.ranks import Ranks

BLOCK_BYTES = 1 << 22
NO_SPACE = (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT), "database or disk is full")


class Checkpoints:
    """The `checkpoints/` folder of a run."""

    def __init__(self, folder: Path, keep: int, ranks: Ranks):
        self.folder = folder
        self.keep = keep
        self.ranks = ranks

    def steps(self) -> list[int]:
        """Steps of the checkpoints that are there, oldest first."""
        return steps_in(self.folder)

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step}"

    def save(self, step: int, learner: Learner, tokenizer: PreTrainedTokenizerBase, state: dict[str, Any]) -> Path:
        """Writes the checkpoint of `step` and removes the oldest beyond `keep`; collective.

        A full disk is an InputError that names the room needed; the checkpoints before it are intact.
        """
        aside = self.folder / f".step-{step}.partial"
        try:
            with full_disk_named(self.folder, f"the checkpoint of step {step}"):
                self._write(aside, step, learner, tokenizer, state)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
        self.ranks.barrier()
        return self.path(step)

    def _write(self, aside: Path, step: int, learner: Learner, tokenizer: PreTrainedTokenizerBase, state: dict[str, Any]) -> None:
        if self.ranks.main:
            shutil.rmtree(aside, ignore_errors=True)
            save_policy(aside, learner.export(), learner.model, tokenizer)
        else:
            for _ in learner.export():
                pass
        self.ranks.barrier()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one rank is meant
            dcp.save(_trainer_state(learner, self.ranks), checkpoint_id=aside / "trainer", no_dist=self.ranks.count == 1)
        if self.ranks.main:
            (aside / "state.json").write_text(json.dumps(state, indent=2) + "\n")
            (aside / "hashes.json").write_text(json.dumps(_hashes(aside), indent=2) + "\n")
            make_durable(aside)
            shutil.rmtree(self.path(step), ignore_errors=True)
            os.replace(aside, self.path(step))
            _sync(self.folder)  # the name too, before anything older goes
            for old in self.steps()[: -self.keep]:
                shutil.rmtree(self.path(old))

    def newest(self) -> int | None:
        """The newest step whose checkpoint is whole; a damaged one is named on the way."""
        for step in reversed(self.steps()):
            damage = _damage(self.path(step))
            if damage is None:
                return step
            print(f"{self.path(step)}: damaged ({damage}); not used", flush=True)
        return None

    def set_aside_after(self, step: int) -> None:
        """Renames checkpoints after `step`, which `newest` found damaged: what is written from here on must not be taken for older."""
        for later in self.steps():
            if later > step:
                aside = self.folder / f"damaged-step-{later}"
                shutil.rmtree(aside, ignore_errors=True)
                os.replace(self.path(later), aside)

    def load(self, step: int, learner: Learner) -> dict[str, Any]:
        """Puts optimizer and RNG back in place and returns the state; the learner's model was loaded from the same folder.

        InputError where the checkpoint is of other trained tensors, as one of an earlier version may be.
        """
        reader = dcp.FileSystemReader(self.path(step) / "trainer")
        state = _trainer_state(learner, self.ranks)
        held = reader.read_metadata().state_dict_metadata.keys()
        other = sorted(name for name in state.keys() ^ held if not name.startswith("rng/"))
        if other:
            whose = "the checkpoint lacks" if other[0] in state else "only the checkpoint has"
            raise InputError(
                f"{self.path(step)}: {whose} {other[0]} ({len(other)} such tensors in all): it is of another version of this program; "
                f"choose another run.name, with policy.path={self.path(step)}"
            )
        own = f"rng/{self.ranks.rank}"
        if own not in held:
            del state[own]  # written by fewer ranks
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            dcp.load(state, storage_reader=reader, no_dist=self.ranks.count == 1)
        if own in state:
            torch.set_rng_state(state[own])
        return json.loads((self.path(step) / "state.json").read_text())


def steps_in(folder: Path) -> list[int]:
    """Steps of the checkpoints in a folder, oldest first."""
    names = [p.name for p in folder.glob("step-*") if p.name.removeprefix("step-").isdigit()]
    return sorted(int(name.removeprefix("step-")) for name in names)


@contextmanager
def full_disk_named(folder: Path, what: str) -> Iterator[None]:
    """Makes an InputError of a write within that failed for want of space; `folder` has the checkpoints."""
    try:
        yield
    except (OSError, sqlite3.Error, RuntimeError, SafetensorError, CheckpointException) as error:
        if not _is_full(folder, error):
            raise
        last = steps_in(folder)[-1:]
        intact = f"the last checkpoint, {folder / f'step-{last[0]}'}, is intact" if last else "there is no checkpoint yet"
        said = " ".join(str(error).split())
        raise InputError(
            f"{folder}: no space for {what} ({said:.100}); make room and start again with the same command; {intact}"
        ) from None


def check_room(folder: Path, needed_bytes: int) -> None:
    """InputError if the disk of `folder` (or of its first parent that exists) has less room than a run's checkpoints take."""
    place = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    free = shutil.disk_usage(place).free
    if free < needed_bytes:
        raise InputError(
            f"{folder}: no space for the checkpoints: they take up to {needed_bytes / 1e9:.2f} GB, the disk has {free / 1e9:.2f} "
            "GB; make room, set run.output_dir to another disk, or lower checkpoint.keep"
        )


def _is_full(folder: Path, error: BaseException) -> bool:
    """Whether a write failed for want of space. Not every writer passes the system's error on, so the disk is asked as well."""
    if any(said in str(error) for said in NO_SPACE):
        return True
    place = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    ours = isinstance(error, RuntimeError) and type(error) is not RuntimeError  # says what it is
    return not ours and shutil.disk_usage(place).free < BLOCK_BYTES


def _trainer_state(learner: Learner, ranks: Ranks) -> dict[str, torch.Tensor]:
    return {**learner.state_dict(), f"rng/{ranks.rank}": torch.get_rng_state()}


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "hashes.json")


def _hashes(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): _sha256(p) for p in _files(folder)}


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        wanted = json.loads((folder / "hashes.json").read_text())
    except (OSError, ValueError) as error:
        return f"hashes.json: {error}"
    for name, digest in wanted.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if _sha256(folder / name) != digest:
            return f"{name} is not what was written"
    return None


def make_durable(folder: Path) -> None:
    """Returns when a folder and all in it survive a loss of power."""
    for path in (*folder.rglob("*"), folder):
        _sync(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)
