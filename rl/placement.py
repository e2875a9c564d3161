"""`rollout.placement: colocate`: engines and learner share GPUs, and take turns on them.

    sample -> engines sleep -> optimizer comes back -> learn -> optimizer goes -> weights wake -> load -> KV caches wake -> sample

Both turns begin where the loop already calls: `stream.next` ends the engines' turn, `sync.push` ends the learner's. No side takes
memory before the other has given its own back: ranks hear of the groups when the engines sleep, and engines are woken when every rank
has let go. Evaluations and checkpoints come after the push, in the engines' turn.

What the learner keeps on the GPU are its weights. Its optimizer's moments and masters go to host memory while engines sample, where
`rl.estimate.beside` says that there is no room for both, and come back bit for bit. Only a GPU has anything to free: on a CPU engines
stand still, and that is all. None of this has run on a GPU.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.distributed.tensor import DTensor

from data.values import Group
from rl.config import RolloutConfig
from rl.engines.base import Engine
from rl.engines.weights import Exporter, Manifest
from rl.estimate import GATHERED_BYTES, beside
from rl.learner import Learner
from rl.ranks import Ranks
from rl.stream import GroupStream, SharedStream
from rl.sync import WeightSync


class Turns:
    """The learner's side of the turns; every rank has one."""

    def __init__(self, learner: Learner, rollout: RolloutConfig):
        self.optim = learner.optim
        self.ranks = learner.ranks
        device = learner.ranks.device
        self.frees = device.type == "cuda" and rollout.engine == "vllm"
        """Whether there is a GPU on which room has to be made."""
        room = torch.cuda.get_device_properties(device).total_memory if self.frees else 0
        state = [tensor for tensors in self.optim.state.values() for tensor in tensors.values()]
        parameters = list(learner.model.parameters())
        resident = sum(map(local_bytes, [*parameters, *state]))
        if learner.sharded is not None:  # a checkpoint gathers one tensor after the other, in the engines' turn
            resident += GATHERED_BYTES * max(p.numel() for p in parameters)
        self.offloads = self.frees and not beside(resident, rollout.gpu_memory_utilization, room)

    def learner_begins(self) -> None:
        """Called when engines sleep."""
        if self.offloads:
            self.optim.move_state(self.ranks.device)

    def learner_ends(self) -> None:
        """Returns when every rank has let go of what the engines need."""
        if self.offloads:
            self.optim.move_state("cpu")
        if self.frees:
            torch.cuda.empty_cache()  # what the allocator keeps for itself, the engines' processes cannot have
        self.ranks.barrier()


class ColocatedStream(SharedStream):
    """Groups are handed over when the engines sleep."""

    def __init__(self, ranks: Ranks, stream: GroupStream | None, turns: Turns):
        super().__init__(ranks, stream)
        self.turns = turns

    def next(self, count: int) -> list[Group]:
        groups = self.ranks.groups(lambda: self._sample(count))
        self.turns.learner_begins()
        return groups

    def _sample(self, count: int) -> list[Group]:
        groups = self.stream.next(count)
        self.stream.pool.sleep()
        return groups


@dataclass(frozen=True)
class LastWords:
    """The learner's export, with which its turn ends."""

    learner: Exporter
    turns: Turns

    def export(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self.learner.export()
        self.turns.learner_ends()  # after what was gathered for it


class ColocatedSync(WeightSync):
    """Engines get room for their weights before an update, and for their KV caches after it."""

    def __init__(self, engines: Sequence[Engine], manifest: Manifest | None, turns: Turns):
        super().__init__(engines, manifest)
        self.turns = turns

    def push(self, learner: Exporter, version: int) -> None:
        super().push(LastWords(learner, self.turns), version)

    def _load(self, engine: Engine) -> None:
        engine.wake("weights")
        super()._load(engine)
        engine.wake("kv_cache")


def local_bytes(tensor: torch.Tensor) -> int:
    """On this rank: of a sharded tensor its own share."""
    own = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return own.numel() * own.element_size()
