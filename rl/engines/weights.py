"""The weight file: how the learner's weights reach engines that are processes of their own.

One file of shared memory holds the whole model in checkpoint names and shapes, at places that never change: the manifest, read
from the policy's safetensors headers, says which tensors there are and so where each one's bytes begin. Sending is one copy into
the file; receiving is a view of it. The file keeps the whole model until the next update, so an engine that restarts is brought
to the current weights without asking the learner again.

An engine does not notice a tensor that is missing (it keeps the old one) and is ruined by one of a wrong shape. So the sender
checks names, shapes, dtypes and coverage against the manifest, and hands out chunks only when the whole model has passed.

The file has no name: receivers open it through the sender's entry in /proc (Linux), so it is gone when the sender is, however
that ends.
"""

import json
import mmap
import os
import shutil
import struct
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Protocol

import torch

from data.recipe import InputError
from rl.engines.base import TensorSlot, WeightChunk

ALIGN_bytes = 64
"""A tensor begins at a multiple of this: a cache line, and more than any dtype needs."""
CHUNK_bytes = 1 << 28
"""A chunk ends with the tensor that reaches this size."""
DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
"""safetensors' names of dtypes, and torch's."""


class WeightMismatch(ValueError):
    """The learner's export is not what the policy's checkpoint holds."""


@dataclass(frozen=True)
class TensorSpec:
    """What an update must bring for one name."""

    dtype: str
    """torch dtype by name, such as `float32`."""
    shape: tuple[int, ...]


Manifest = Mapping[str, TensorSpec]


def size_of(spec: TensorSpec) -> int:
    """Bytes."""
    return prod(spec.shape) * int(getattr(torch, spec.dtype).itemsize)


def slot_bytes(slot: TensorSlot) -> int:
    return size_of(TensorSpec(slot.dtype, slot.shape))


class Exporter(Protocol):
    """What a weight update needs of the learner."""

    def export(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor of the checkpoint once, by checkpoint name, experts apart. Collective: all ranks exhaust it."""


def read_manifest(policy: Path, *, dtype: str | None = None) -> dict[str, TensorSpec]:
    """What the safetensors files of a policy folder hold, in their order, from the headers alone.

    dtype: what the learner exports its `float32`, `bfloat16` and `float16` tensors as; None is as saved.
    Raises ValueError if the folder has no safetensors file.
    """
    files = sorted(policy.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{policy}: no *.safetensors file; save the policy with save_pretrained, or check policy.path")
    manifest = {}
    for file in files:
        with file.open("rb") as opened:
            (header_bytes,) = struct.unpack("<Q", opened.read(8))
            header = json.loads(opened.read(header_bytes))
        for name, entry in header.items():
            if name != "__metadata__":
                saved = DTYPES[entry["dtype"]]
                if dtype is not None and saved in ("float32", "bfloat16", "float16"):
                    saved = dtype
                manifest[name] = TensorSpec(saved, tuple(entry["shape"]))
    return manifest


class WeightFile:
    """The sender's end: `write` the model, then give `chunks` to each engine."""

    def __init__(self, manifest: Manifest, *, chunk_bytes: int = CHUNK_bytes) -> None:
        """Reserves the memory at once, so that a full disk is an error here and not a crash in the middle of a copy."""
        self.slots: dict[str, TensorSlot] = {}
        self.bytes = 0
        """Size of the model in the file."""
        for name, spec in manifest.items():
            self.slots[name] = TensorSlot(name, spec.dtype, spec.shape, self.bytes)
            self.bytes += -(-size_of(spec) // ALIGN_bytes) * ALIGN_bytes
        self._chunk_bytes = chunk_bytes
        self._fd = _anonymous_file(self.bytes)
        # Populated here, the first update is as quick as later ones.
        self._map = mmap.mmap(self._fd, self.bytes, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
        self.path = f"/proc/{os.getpid()}/fd/{self._fd}"
        """How other processes of this user and machine open it."""
        self._views = {slot.name: _view(self._map, slot, slot.offset) for slot in self.slots.values()}
        self._complete = False
        self._missing: dict[str, None] | None = None
        """What has not come of an update that has begun."""

    def write(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Copies a whole model into the file, over the one before it.

        Raises WeightMismatch at a name, shape or dtype that is not in the manifest, a name that comes twice, and at the end if
        one did not come; `chunks` then has nothing to give until a write succeeds.
        """
        self.begin()
        for name, tensor in tensors:
            self._check(name, tensor)
            self.came([self.slots[name]])
            self._views[name].copy_(tensor.detach())
        self.complete()

    def begin(self) -> None:
        """Opens an update whose tensors are written to their `room`, in any order, some perhaps twice; `complete` closes it."""
        self._complete = False
        self._missing = dict.fromkeys(self.slots)

    def room(self, slots: Sequence[TensorSlot]) -> list[memoryview]:
        """Where the bytes of these tensors are to be written. WeightMismatch for a name, shape or dtype that is not in the manifest."""
        if self._missing is None:
            raise WeightMismatch("weight update: tensors came, and none was begun")
        for slot in slots:
            own = self.slots.get(slot.name)
            if own is None or (own.dtype, own.shape) != (slot.dtype, slot.shape):
                has = f"{own.dtype} {own.shape}" if own is not None else "no tensor of this name"
                raise WeightMismatch(f"weight update: {slot.name} came as {slot.dtype} {slot.shape}, and the policy's checkpoint has {has}")
        whole = memoryview(self._map)
        ranges = [(self.slots[slot.name].offset, slot_bytes(slot)) for slot in slots]
        return [whole[offset : offset + size] for offset, size in ranges]

    def came(self, slots: Sequence[TensorSlot]) -> None:
        """Notes that the bytes of these tensors stand in their room."""
        assert self._missing is not None, "no update was begun"
        for slot in slots:
            self._missing.pop(slot.name, None)

    def complete(self) -> None:
        """The update is whole, and `chunks` gives it. WeightMismatch if a tensor did not come, or none was begun."""
        if self._missing is None and not self._complete:
            raise WeightMismatch("weight update: it is to end, and none was begun")
        if self._missing:
            some = ", ".join(list(self._missing)[:3])
            raise WeightMismatch(
                f"weight update: {len(self._missing)} of {len(self.slots)} tensors did not come, first {some}; "
                "an engine would keep its old ones: the learner's export must cover the policy's checkpoint"
            )
        self._missing = None
        self._complete = True

    @property
    def chunks(self) -> list[WeightChunk]:
        """The last complete update, in the manifest's order. Empty before the first."""
        if not self._complete:
            return []
        chunks: list[list[TensorSlot]] = [[]]
        for slot in self.slots.values():
            if chunks[-1] and slot.offset - chunks[-1][0].offset >= self._chunk_bytes:
                chunks.append([])
            chunks[-1].append(slot)
        return [WeightChunk(self.path, tuple(slots)) for slots in chunks]

    def close(self) -> None:
        """Gives the memory back; engines that still hold views keep theirs. May be called twice."""
        if self._fd >= 0:
            self._views.clear()
            with suppress(BufferError):  # somebody still writes what came too late: the memory goes with the last of them
                self._map.close()
            os.close(self._fd)
            self._fd = -1
            self._complete = False

    def _check(self, name: str, tensor: torch.Tensor) -> None:
        slot = self.slots.get(name)
        if slot is None:
            raise WeightMismatch(f"weight update: {name} is not in the policy's checkpoint; export checkpoint names, each expert apart")
        if name not in (self._missing or ()):
            raise WeightMismatch(f"weight update: {name} came twice; export every tensor once")
        if tuple(tensor.shape) != slot.shape:
            raise WeightMismatch(f"weight update: {name} has shape {tuple(tensor.shape)}, the policy's checkpoint has {slot.shape}")
        if str(tensor.dtype) != f"torch.{slot.dtype}":
            raise WeightMismatch(f"weight update: {name} is {tensor.dtype}, expected torch.{slot.dtype}; cast it in the export")


def read_chunk(chunk: WeightChunk) -> Iterator[tuple[str, torch.Tensor]]:
    """The chunk's tensors as views of the shared file, without a copy; they hold until the next update is written.

    The mapping is private: a receiver that writes into a view changes its own copy and no one else's.
    """
    first, last = chunk.slots[0], chunk.slots[-1]
    start = first.offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
    end = last.offset + prod(last.shape) * getattr(torch, last.dtype).itemsize
    with open(chunk.path, "rb") as file:
        mapped = mmap.mmap(file.fileno(), end - start, access=mmap.ACCESS_COPY, offset=start)
    for slot in chunk.slots:
        yield slot.name, _view(mapped, slot, slot.offset - start)


def chunk_bytes(chunk: WeightChunk) -> bytearray:
    """The bytes of a chunk's tensors, one after the other: for a machine that cannot open the file."""
    data = bytearray(sum(map(slot_bytes, chunk.slots)))
    room, at = memoryview(data), 0
    with open(chunk.path, "rb") as file:
        for slot in chunk.slots:
            file.seek(slot.offset)
            file.readinto(room[at : at + slot_bytes(slot)])
            at += slot_bytes(slot)
    return data


def views_of(data: bytearray, slots: Sequence[TensorSlot]) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors whose bytes stand there, one after the other."""
    at = 0
    for slot in slots:
        # A clone begins where its type may; the bytes here may not.
        flat = torch.frombuffer(data, dtype=torch.uint8, count=slot_bytes(slot), offset=at)
        yield slot.name, flat.clone().view(getattr(torch, slot.dtype)).view(slot.shape)
        at += slot_bytes(slot)


def _view(mapped: mmap.mmap, slot: TensorSlot, offset: int) -> torch.Tensor:
    dtype = getattr(torch, slot.dtype)
    return torch.frombuffer(mapped, dtype=dtype, count=prod(slot.shape), offset=offset).view(slot.shape)


def _anonymous_file(size_bytes: int) -> int:
    """A descriptor of an unlinked file with this much memory behind it: of /dev/shm, or of the temporary folder."""
    folders = ["/dev/shm", tempfile.gettempdir()]
    free = {folder: shutil.disk_usage(folder).free for folder in folders if os.path.isdir(folder)}
    for folder, free_bytes in free.items():
        if free_bytes > size_bytes:
            fd, path = tempfile.mkstemp(prefix="cohort-weights-", dir=folder)
            os.unlink(path)
            os.posix_fallocate(fd, 0, size_bytes)
            return fd
    room = ", ".join(f"{folder} has {free_bytes / 1e9:.2f} GB" for folder, free_bytes in free.items())
    raise InputError(
        f"weight file: the policy's weights need {size_bytes / 1e9:.2f} GB of shared memory, but {room} free; "
        "enlarge /dev/shm (docker: --shm-size) or set TMPDIR to a folder with room"
    )
