"""vLLM's end of a weight update, and the learner's where vLLM has one.

`cohort_file` is a backend of vLLM's RL API (start, update, finish) that reads the shared weight file, on a CPU with codes as their values;
it is registered when this module is imported, which vLLM does in each of its workers. Between GPUs the backend is `nccl`, vLLM's own,
whose sender in the learner's process is `NcclSender`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import vllm.v1.sample.rejection_sampler
from vllm.config import VllmConfig
from vllm.config.weight_transfer import WeightTransferConfig
from vllm.distributed.weight_transfer.base import (
    ParamMeta,
    WeightSource,
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo, NCCLTrainerWeightTransferEngine
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.model_executor.model_loader.mtp_validation import disable_mtp_completeness_check
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from rl.engines.base import TensorSlot, WeightChunk
from rl.engines.nccl import FanOut
from rl.engines.repairs import expand
from rl.engines.vllm import VllmEngine
from rl.engines.weights import Exporter, Manifest, read_chunk, views_of
from rl.fp8.decode import Decoder

Method = TypeVar("Method")


class WorkerExtension:
    """Adds nothing to vLLM's worker but the import of this module."""


@dataclass
class FileInit(WeightTransferInitInfo):
    """The file needs no rendezvous."""


@dataclass
class FileUpdate(WeightTransferUpdateInfo):
    """A WeightChunk in plain values, as it crosses from AsyncLLM to its engine core."""

    path: str
    slots: Sequence[dict[str, Any]]
    data: bytes | None = None
    """The tensors' bytes, one after the other, where the file is on another machine."""


class FileTransfer(WeightTransferEngine[FileInit, FileUpdate]):
    """Loads chunks of the shared weight file, layer by layer, as vLLM loads a checkpoint."""

    init_info_cls = FileInit
    update_info_cls = FileUpdate

    def __init__(self, config: WeightTransferConfig, vllm_config: VllmConfig, device: torch.device, model: torch.nn.Module) -> None:
        super().__init__(config, vllm_config, device, model)
        self.kernels: dict[UnquantizedFusedMoEMethod, Any] = {}
        self.decoder = Decoder(self.model_config.dtype)
        if device.type == "cpu":
            # Without it the attention kernel dies of SIGILL on a first prompt of a few tokens, where the CPU has AMX.
            torch.cpu._init_amx()
            vllm.v1.sample.rejection_sampler.expand_batch_to_tokens = expand

    def init_transfer_engine(self, init_info: FileInit) -> None:
        """Nothing to set up."""

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)
        if self.device.type == "cpu":
            # With a kernel in place vLLM takes new expert weights as packed already, and computes wrong experts without a word.
            for _, method in self.layers(UnquantizedFusedMoEMethod):
                self.kernels[method] = method.moe_kernel
                method.moe_kernel = None

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: FileUpdate) -> None:
        slots = tuple(TensorSlot(**{**slot, "shape": tuple(slot["shape"])}) for slot in update_info.slots)
        with disable_mtp_completeness_check():  # a chunk may hold nothing of the drafter; the sender has checked that all is there
            self.model.load_weights(self.tensors(WeightChunk(update_info.path, slots), update_info.data))

    def tensors(self, chunk: WeightChunk, data: bytes | None) -> Iterator[tuple[str, torch.Tensor]]:
        tensors = read_chunk(chunk) if data is None else views_of(bytearray(data), chunk.slots)
        if self.device.type == "cpu":
            yield from self.decoder.values(tensors)
            return
        for name, tensor in tensors:
            yield name, tensor.to(self.device)

    def finish_weight_update(self) -> None:
        self.decoder.end()
        finalize_layerwise_reload(self.model, self.model_config)
        if self.device.type != "cpu":
            torch.accelerator.synchronize()
            return
        for method, kernel in self.kernels.items():
            if method.moe_kernel is None:  # its layer got no weights
                method.moe_kernel = kernel
        self.kernels.clear()
        # A head that is tied to the embedding gets no weights of its own, and would go on with its packed copy of the old ones.
        for layer, method in self.layers(UnquantizedEmbeddingMethod):
            method.process_weights_after_loading(layer)

    def layers(self, kind: type[Method]) -> Iterator[tuple[torch.nn.Module, Method]]:
        """Layers whose weights are handled by this kind of method."""
        for layer in self.model.modules():
            method = getattr(layer, "quant_method", None)  # vLLM's layers have one or not
            if isinstance(method, kind):
                yield layer, method

    def shutdown(self) -> None:
        """The file is the sender's."""


WeightTransferEngineFactory.register_engine("cohort_file", FileTransfer)


class NcclSender:
    """The learner's end of vLLM's `nccl` backend: broadcasts from the learner's GPU to those of all engines. Has never run on one.

    Made on every rank, of engines whose `weight_backend` is `nccl`; rank 0 alone has them.
    """

    def __init__(self, engines: Sequence[VllmEngine], learner: Exporter, manifest: Manifest, *, rank: int, address: str, port: int) -> None:
        """address, port: where rank 0 and the engines' workers meet."""
        self.fan_out = FanOut(engines)
        self.sender = NCCLTrainerWeightTransferEngine.trainer_init(
            NCCLTrainerInitInfo(address, port, 1 + self.fan_out.workers, rank=rank),
            client=self.fan_out,
            source=ExportSource(learner, manifest),
        )

    def push(self, version: int) -> None:
        """Collective over ranks, as WeightSync.push."""
        self.fan_out.version = version
        self.sender.send_weights()


class ExportSource(WeightSource):
    """The learner's export as vLLM's trainer side wants it. It checks names, shapes and dtypes against the metadata."""

    def __init__(self, learner: Exporter, manifest: Manifest) -> None:
        self.learner = learner
        self.manifest = manifest

    def metadata(self) -> list[ParamMeta]:
        return [ParamMeta(name, getattr(torch, spec.dtype), spec.shape) for name, spec in self.manifest.items()]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return self.learner.export()
