"""Weights from GPU to GPU, by vLLM's `nccl` backend (`rollout.weights: nccl`). Has never run on a GPU.

The learner's first rank is rank 0 of an NCCL group, the engines' workers come after it, engine by engine; each layer is broadcast as
it is exported, and no host memory is needed. The price: nothing is kept, so an engine that dies cannot be brought back to the current
weights, and ends the run.
"""

import socket
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from rl.engines.base import Engine, EngineDead
from rl.engines.vllm import VllmEngine
from rl.engines.weights import Exporter, Manifest, size_of
from rl.ranks import Ranks
from rl.sync import SyncStats

if TYPE_CHECKING:
    from rl.engines.vllm_weights import NcclSender


class NcclSync:
    """What `WeightSync` is, without its file; made on every rank, of which the first alone has engines."""

    def __init__(self, engines: Sequence[Engine], manifest: Manifest, ranks: Ranks) -> None:
        self.engines = [engine for engine in engines if isinstance(engine, VllmEngine)]
        self.manifest = manifest
        self.ranks = ranks
        self.version = 0
        self.stats: SyncStats | None = None
        self.standing_still: Callable[[int], AbstractContextManager[None]] = lambda version: nullcontext()
        """As WeightSync's."""
        self._sender: NcclSender | None = None

    def push(self, learner: Exporter, version: int) -> None:
        """Every engine, idle or paused, samples its next token from the learner's weights. Collective over ranks.

        Raises EngineDead if an engine is gone; what other engines have then is undefined.
        """
        began = time.perf_counter()
        if self._sender is None:
            from rl.engines.vllm_weights import NcclSender  # imports vllm: here in the learner's process, where its trainer side lives

            # Engines are processes of this machine.
            self._sender = NcclSender(self.engines, learner, self.manifest, rank=self.ranks.rank, address="127.0.0.1", port=free_port())
        with self.standing_still(version):
            still = time.perf_counter()
            self._sender.push(version)
        self.version = version
        self.stats = SyncStats(version, sum(map(size_of, self.manifest.values())), 0.0, still - began, time.perf_counter() - still)

    def metrics(self) -> dict[str, float]:
        """The last push as numbers of a step."""
        assert self.stats is not None, "no push yet"
        return self.stats.metrics()

    def replay(self, engine: Engine) -> None:
        """Before the first push there is nothing to bring; after it nothing is left that could be brought."""
        if self._sender is not None:
            raise EngineDead(
                f"engine {engine.name} is back at its first weights, and rollout.weights=nccl keeps no copy of the current ones; start "
                "again with the same command to go on from the last checkpoint, or set rollout.weights=file, which survives this"
            )

    def close(self) -> None:
        """The group ends with the processes that are in it."""


def free_port() -> int:
    """A port of the loopback interface that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class FanOut:
    """Each call returns when every engine has."""

    def __init__(self, engines: Sequence[VllmEngine]) -> None:
        self.engines = engines
        self.workers = sum(engine.spec.tensor_parallel for engine in engines)
        self.version = 0

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        offsets = [init_info["rank_offset"]]
        for engine in self.engines:
            offsets.append(offsets[-1] + engine.spec.tensor_parallel)
        infos = [{"init_info": {**init_info, "rank_offset": offset}} for offset in offsets[:-1]]
        self.each(lambda engine, info: engine.transfer("init_weight_transfer_engine", info), infos)

    def start_weight_update(self) -> None:
        self.each(lambda engine, version: engine.begin_update(version), [self.version] * len(self.engines))

    def update_weights(self, update_info: dict[str, Any]) -> None:
        infos = [{"update_info": update_info}] * len(self.engines)
        self.each(lambda engine, info: engine.transfer("update_weights", info), infos)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.each(lambda engine, _: engine.end_update(), self.engines)

    def each(self, call: Callable[[VllmEngine, Any], None], values: Sequence[Any]) -> None:
        with ThreadPoolExecutor(len(self.engines)) as threads:
            list(threads.map(call, self.engines, values))
