"""Brings the learner's weights to the engines.

Writing comes before sending: the learner exports into the weight file, layer by layer and never the whole model at once, while
engines may still sample; the file is checked to hold exactly the policy's tensors; only then do the engines load it, all side by
side. So a bad export reaches no engine, and an engine stands still no longer than its own copy takes: to another machine the update
crosses before, but for an engine that began another life meanwhile. Where engines sample ahead of the learner, the stream says how they
come to stand still (`standing_still`).

The file keeps the update. An engine that is down, or dies of it, is passed over: the pool starts it again, at its first weights, and
`replay` brings it to the last ones, whatever became of the update in which it was lost. A push and a replay wait for one another.

Between GPUs of one machine, `rl.engines.nccl.NcclSync` does the same without the file.
"""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

from rl.engines.base import Engine, EngineDead, WeightChunk
from rl.engines.remote import RemoteEngine
from rl.engines.weights import Exporter, Manifest, WeightFile


@dataclass(frozen=True)
class SyncStats:
    """One update, for the metrics."""

    version: int
    bytes: int
    write_s: float
    """The learner's export and the copy into the file."""
    wait_s: float
    """Until the engines stood still."""
    load_s: float
    """From the file into all engines that live."""
    bring_s: float = 0.0
    """Before they stood still: until other machines had received it."""

    def metrics(self) -> dict[str, float]:
        """As numbers of a step."""
        return {"sync/bytes": self.bytes, "time/sync_s": self.write_s + self.bring_s + self.wait_s + self.load_s}


class WeightSync:
    """On rank 0 with engines and manifest, on the other ranks `WeightSync()`: they only take part in the export."""

    def __init__(self, engines: Sequence[Engine] = (), manifest: Manifest | None = None) -> None:
        """manifest: what the policy's checkpoint holds, from `read_manifest`. Raises ValueError where there is no room for it."""
        self.engines = engines
        self.file = WeightFile(manifest) if manifest is not None else None
        self.version = 0
        """Of the last update; 0 before the first."""
        self.stats: SyncStats | None = None
        """Of the last push, on rank 0."""
        self.standing_still: Callable[[int], AbstractContextManager[None]] = lambda version: nullcontext()
        """Stops what engines sample while they load this version; where they sample ahead of the learner, the stream's."""
        self._file_in_use = threading.Lock()

    def push(self, learner: Exporter, version: int) -> None:
        """Every engine samples its next token from the learner's weights; `standing_still` makes them idle or paused. Collective.

        Raises WeightMismatch before any engine is touched.
        """
        if self.file is None:
            for _ in learner.export():
                pass
            return
        began = time.perf_counter()
        with self._file_in_use:
            self.file.write(learner.export())
            self.version = version
            written = time.perf_counter()
            self._each(self._bring, [engine for engine in self.engines if isinstance(engine, RemoteEngine)])
        brought = time.perf_counter()
        with self.standing_still(version):
            still = time.perf_counter()
            with self._file_in_use:
                self._each(self._load, self.engines)
        self.stats = SyncStats(version, self.file.bytes, written - began, still - brought, time.perf_counter() - still, brought - written)

    def metrics(self) -> dict[str, float]:
        """The last push as numbers of a step."""
        assert self.stats is not None, "no push yet"
        return self.stats.metrics()

    def replay(self, engine: Engine) -> None:
        """Brings an engine that has just started to the last update, from any thread; before the first there is nothing to do."""
        with self._file_in_use:
            if self.version:
                if isinstance(engine, RemoteEngine):
                    self._bring(engine)
                self._load(engine)

    def _each(self, what: Callable[[Any], None], engines: Sequence[Engine]) -> None:
        """All at once; those that are dead, or die of it, are left out: their next lives are replayed."""

        def if_alive(engine: Engine) -> None:
            with suppress(EngineDead):
                what(engine)

        with ThreadPoolExecutor(max(1, len(engines))) as threads:
            list(threads.map(if_alive, engines))

    def _bring(self, engine: RemoteEngine) -> None:
        engine.bring(self.version, self._chunks())

    def _load(self, engine: Engine) -> None:
        if not isinstance(engine, RemoteEngine):
            engine.begin_update(self.version)
            for chunk in self._chunks():
                engine.load(chunk)
        engine.end_update()

    def _chunks(self) -> list[WeightChunk]:
        assert self.file is not None and self.file.chunks, "the weight file holds no whole update"
        return self.file.chunks

    def close(self) -> None:
        """Gives the file's memory back."""
        if self.file is not None:
            self.file.close()
