"""All engines at once, as the trainer's side of vLLM's `nccl` weight backend wants to call one. Has never run on a GPU.

The backend calls the four methods of vLLM's VLLMWeightSyncClient and broadcasts meanwhile. The learner is rank 0 of the NCCL group,
the engines' workers come after it, engine by engine. `rl.engines.vllm_worker.NcclSender` brings the two together.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from rl.engines.vllm import VllmEngine


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
