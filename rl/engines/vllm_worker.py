"""vLLM's side of an engine: what runs in its own process. No module of `rl` imports vllm but this, `vllm_weights` and `vllm_codes`.

vLLM has two shapes here, and the loop of `rl.engines.server` does not see which. On a CPU the engine core is stepped in this
process: a second one would import vllm once more and fight for the same cores. On a GPU AsyncLLM runs the engine core in a
process of its own, so that the GPU does not wait for Python. AsyncLLM is tested on a CPU; nothing here has run on a GPU.

Weights come through vLLM's RL API (start, update, finish), by the backends of `vllm_weights`. After an update every running request is
computed anew and the prefix cache is empty: no key of older weights is ever used again.
"""

import asyncio
import gc
import json
import logging
import os
import signal
import threading
from collections.abc import Coroutine, Iterable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import asdict, replace
from multiprocessing.connection import Connection
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np
import torch
from tqdm import tqdm  # type: ignore[import-untyped]
from vllm.config import VllmConfig
from vllm.config.weight_transfer import WeightTransferConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.inputs.engine import tokens_input
from vllm.model_executor.models.registry import ModelRegistry
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.usage.usage_lib import UsageContext
from vllm.v1.engine import FinishReason
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.llm_engine import LLMEngine
from vllm.v1.engine.output_processor import OutputProcessor

from data.values import Completion
from rl.engines.base import Part, Request, WeightChunk
from rl.engines.repairs import cpu_repairs
from rl.engines.server import Failed, Ready, Server
from rl.engines.vllm import VllmSpec
from rl.engines.vllm_codes import PLAIN, VALUES
from rl.engines.weights import chunk_bytes
from rl.fp8.files import is_block_fp8
from rl.replay import moe_layers, with_routes

KV_CACHE_MAX_bytes = 4 << 30
"""On a CPU: an engine whose slots could fill more takes this, and lets requests wait."""
SLEEP_LEVEL = 2
"""Weights are dropped, not copied to host memory: every update brings all of them (`rl.engines.weights` checks that it does)."""
OFFLINE = UsageContext.LLM_CLASS
"""Tells vLLM to choose its budget of tokens a step for throughput, as `LLM` does; a server's is half of it."""
POLL_s = 0.005
"""How long a step waits for AsyncLLM before the loop looks at the pipe again."""


def serve(pipe: Connection, spec: VllmSpec) -> None:
    """Builds the engine, says Ready, and serves calls until the pipe ends; then takes down every process it started."""
    signal.signal(signal.SIGTERM, lambda *_: os.killpg(0, signal.SIGKILL))
    gc.freeze()  # vLLM collects garbage five times in a start; what came with the fork server need not be looked at
    # tqdm's own would be a semaphore, of which multiprocessing complains when the engine is killed.
    tqdm.set_lock(threading.RLock())
    try:
        core = AsyncCore(spec) if spec.asynchronous else StepCore(spec)
        pipe.send(Ready())
        Server(pipe, core).run()
    except EOFError:
        pass  # the trainer closed the pipe, or is gone
    except Exception as error:
        logging.getLogger(__name__).exception("engine %s", spec.name)
        with suppress(BrokenPipeError):
            pipe.send(Failed(f"{type(error).__name__}: {' '.join(str(error).split())}"))
    finally:
        os.killpg(0, signal.SIGKILL)


class StepCore:
    """The engine core in this process, one step at a time: CPU."""

    def __init__(self, spec: VllmSpec) -> None:
        self.name = spec.name
        self.routed = routed_layers(spec)
        self.llm = LLMEngine.from_vllm_config(engine_config(spec), disable_log_stats=True)
        self.llm.set_weight_version("0")
        self.drafter = Drafter(spec)
        self.requests: dict[str, Request] = {}
        self.internal: dict[str, str] = {}
        """vLLM's own id of each request."""

    def add(self, request: Request) -> None:
        prompt = tokens_input(request.prompt_ids.tolist())
        self.internal[request.id] = self.llm.add_request(request.id, prompt, sampling_params(request))
        self.requests[request.id] = request

    def abort(self, ids: Sequence[str]) -> list[Completion]:
        outputs = []
        for request_id in ids:
            # LLMEngine.abort_request gives nothing back, so what there is is taken first.
            state = self.llm.output_processor.request_states[self.internal[request_id]]
            outputs.append(state.make_request_output([], None, FinishReason.ABORT, None))
            self.llm.abort_request([self.internal[request_id]], internal=True)
        return self.completions(outputs)

    def step(self) -> list[Completion]:
        return self.completions(self.llm.step())

    def completions(self, outputs: Iterable[RequestOutput]) -> list[Completion]:
        for output in outputs:
            del self.internal[output.request_id]
        return [to_completion(self.requests.pop(output.request_id), output, self.name, self.routed) for output in outputs]

    def pause(self) -> None:
        """Nothing runs between two steps."""

    def resume(self) -> None:
        """The next step goes on."""

    def check(self) -> None:
        """It lives and dies with this process."""

    def running_tokens(self) -> int:
        return count_tokens(self.llm.output_processor)

    def begin_update(self) -> None:
        self.drafter.begin()
        self.llm.collective_rpc("start_weight_update")

    def load(self, chunk: WeightChunk) -> None:
        self.drafter.note(chunk)
        self.llm.collective_rpc("update_weights", kwargs={"update_info": asdict(chunk)})

    def transfer(self, method: str, info: dict[str, Any]) -> None:
        self.llm.collective_rpc(method, kwargs=info)

    def end_update(self, version: int) -> None:
        self.llm.collective_rpc("finish_weight_update")
        if self.drafter.chunks:
            self.llm.collective_rpc("start_draft_weight_update")
            for chunk in self.drafter.chunks:
                self.llm.collective_rpc("update_weights", kwargs={"update_info": asdict(chunk)})
            self.llm.collective_rpc("finish_weight_update")
        self.llm.reset_prefix_cache(reset_running_requests=True)
        self.llm.set_weight_version(str(version))

    def sleep(self) -> None:
        self.llm.sleep(level=SLEEP_LEVEL)

    def wake(self, part: Part) -> None:
        self.llm.wake_up([part])


class AsyncCore:
    """AsyncLLM, which runs the engine core in a process of its own, and an event loop in a thread: GPU."""

    def __init__(self, spec: VllmSpec) -> None:
        self.name = spec.name
        self.over_nodes = spec.over_nodes
        self.drafter = Drafter(spec)
        self.routed = routed_layers(spec)
        self.requests: dict[str, Request] = {}
        self.finished: SimpleQueue[Future[RequestOutput]] = SimpleQueue()
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        self.llm = self.wait(self.build(spec))

    async def build(self, spec: VllmSpec) -> AsyncLLM:
        llm = AsyncLLM.from_vllm_config(engine_config(spec), disable_log_stats=True)
        await llm.update_weight_version("0")
        return llm

    def wait(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result()

    def add(self, request: Request) -> None:
        self.requests[request.id] = request
        asyncio.run_coroutine_threadsafe(self.generate(request), self.loop).add_done_callback(self.finished.put)

    async def generate(self, request: Request) -> RequestOutput:
        prompt = tokens_input(request.prompt_ids.tolist())
        # One output, the last: sampling_params asks for no other.
        async for output in self.llm.generate(prompt, sampling_params(request), request.id):
            last = output
        return last

    def abort(self, ids: Sequence[str]) -> list[Completion]:
        self.wait(self.llm.abort(ids))
        return []  # `generate` ends with what they have

    def step(self) -> list[Completion]:
        outputs: list[RequestOutput] = []
        try:
            while True:
                outputs.append(self.finished.get(timeout=0 if outputs else POLL_s).result())
        except Empty:
            return [to_completion(self.requests.pop(output.request_id), output, self.name, self.routed) for output in outputs]

    def pause(self) -> None:
        self.wait(self.llm.pause_generation(mode="keep", clear_cache=False))

    def resume(self) -> None:
        self.wait(self.llm.resume_generation())

    def check(self) -> None:
        self.wait(self.llm.check_health())

    def running_tokens(self) -> int:
        async def count() -> int:
            return count_tokens(self.llm.output_processor)

        return self.wait(count())

    def begin_update(self) -> None:
        self.drafter.begin()
        self.wait(self.llm.collective_rpc("start_weight_update"))

    def load(self, chunk: WeightChunk) -> None:
        self.drafter.note(chunk)
        self.send(chunk)

    def send(self, chunk: WeightChunk) -> None:
        info = asdict(chunk)
        if self.over_nodes:  # a worker on another node cannot open the file
            info["data"] = bytes(chunk_bytes(chunk))
        self.wait(self.llm.collective_rpc("update_weights", kwargs={"update_info": info}))

    def transfer(self, method: str, info: dict[str, Any]) -> None:
        self.wait(self.llm.collective_rpc(method, kwargs=info))

    def end_update(self, version: int) -> None:
        self.wait(self.llm.collective_rpc("finish_weight_update"))
        if self.drafter.chunks:
            self.wait(self.llm.collective_rpc("start_draft_weight_update"))
            for chunk in self.drafter.chunks:
                self.send(chunk)
            self.wait(self.llm.collective_rpc("finish_weight_update"))
        self.wait(self.llm.reset_prefix_cache(reset_running_requests=True))
        self.wait(self.llm.update_weight_version(str(version)))

    def sleep(self) -> None:
        self.wait(self.llm.sleep(level=SLEEP_LEVEL))

    def wake(self, part: Part) -> None:
        self.wait(self.llm.wake_up([part]))


class Drafter:
    """What of an update the drafter takes, which is a model of its own to vLLM: its layer, and the embedding that it shares."""

    def __init__(self, spec: VllmSpec) -> None:
        self.names: tuple[str, ...] = ()
        """How its tensors' names begin; nothing if nobody drafts."""
        self.chunks: list[WeightChunk] = []
        """Of the last update. The weight file keeps their bytes until the next one."""
        if spec.draft_tokens:
            layers = json.loads((spec.policy_path / "config.json").read_text())["num_hidden_layers"]
            self.names = (f"model.layers.{layers}.", "model.embed_tokens.")

    def begin(self) -> None:
        self.chunks = []

    def note(self, chunk: WeightChunk) -> None:
        slots = tuple(slot for slot in chunk.slots if slot.name.startswith(self.names))
        if slots:
            self.chunks.append(replace(chunk, slots=slots))


def count_tokens(processor: OutputProcessor) -> int:
    return sum(state.detokenizer.num_output_tokens() for state in processor.request_states.values())


def sampling_params(request: Request) -> SamplingParams:
    """Text is made only where a stop string has to be found in it; the log-prob is that of the sampled token alone."""
    wanted = request.sampling
    return SamplingParams(
        max_tokens=wanted.max_tokens,
        temperature=wanted.temperature,
        top_p=wanted.top_p,
        top_k=wanted.top_k,
        seed=request.seed,
        stop=list(wanted.stop),
        include_stop_str_in_output=True,
        detokenize=bool(wanted.stop),
        skip_special_tokens=False,
        logprobs=0,
        flat_logprobs=True,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def routed_layers(spec: VllmSpec) -> list[int]:
    """The layers whose routes are wanted: those with experts, or none."""
    return moe_layers(json.loads((spec.policy_path / "config.json").read_text())) if spec.returns_routes else []


def to_completion(request: Request, output: RequestOutput, engine: str, routed: list[int]) -> Completion:
    """vLLM names the weights of every span of tokens; an aborted request without a token has no span."""
    sampled = output.outputs[0]
    version = np.zeros(len(sampled.token_ids), np.int32)
    for span in sampled.weight_versions or ():
        version[span.start : span.end] = int(span.version)
    drafts = sampled.spec_decode_metrics
    completion = Completion(
        prompt_id=request.prompt_id,
        group_id=request.group_id,
        index=request.index,
        attempt=request.attempt,
        seed=request.seed,
        token_ids=np.array(sampled.token_ids, np.int32),
        mask=np.ones(len(sampled.token_ids), np.uint8),
        engine_logp=np.array(sampled.logprobs.logprobs, np.float32),
        policy_version=version,
        finish_reason=sampled.finish_reason,
        engine=engine,
        drafted=drafts.num_draft_tokens if drafts else 0,
        drafts_kept=sum(kept * steps for kept, steps in enumerate(drafts.histogram)) if drafts else 0,
    )
    if not routed or sampled.routed_experts is None:
        return completion
    # [positions, all layers, K]; has not run: vLLM returns routes on a GPU alone. The last token is not forwarded.
    positions = len(request.prompt_ids) + len(sampled.token_ids) - 1
    assert len(sampled.routed_experts) >= positions, f"vLLM gave routes of {len(sampled.routed_experts)} positions, not {positions}"
    routes_TLK = sampled.routed_experts[:positions, routed]
    return with_routes(completion, routes_TLK if routes_TLK.dtype == np.uint8 else routes_TLK.astype(np.int16))


def engine_config(spec: VllmSpec) -> VllmConfig:
    """vLLM's configuration; on a CPU with every setting that makes it right there."""
    args: dict[str, Any] = {
        "model": str(spec.policy_path),
        "dtype": spec.dtype,
        "max_model_len": spec.max_model_len,
        "max_num_seqs": spec.slots,
        "tensor_parallel_size": spec.tensor_parallel,
        "logprobs_mode": "processed_logprobs",  # of the distribution that was sampled from, at its temperature
        "disable_log_stats": True,
        "seed": 0,
        # vLLM imports this in each of its workers, and so finds our backend.
        "worker_extension_cls": "rl.engines.vllm_weights.WorkerExtension",
        "weight_transfer_config": WeightTransferConfig(backend=spec.weight_backend),
        "enable_return_routed_experts": spec.returns_routes,
    }
    overrides: dict[str, Any] = {}
    policy = json.loads((spec.policy_path / "config.json").read_text())
    if policy["model_type"] == "deepseek_v3":
        # transformers does not save what it takes for granted of DeepSeek-V3; vLLM then routes by another rule, without a word.
        overrides |= {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}
    if not (spec.devices or spec.over_nodes) and is_block_fp8(spec.policy_path):
        args["load_format"] = VALUES
        overrides |= PLAIN
    args["hf_overrides"] = overrides
    if spec.draft_tokens:
        args["speculative_config"] = {"method": "mtp", "num_speculative_tokens": spec.draft_tokens}
        if not (spec.devices or spec.over_nodes):  # the drafter takes no other setting of attention from the policy's
            args["speculative_config"]["attention_backend"] = "CPU_MLA"
        args["per_request_spec_decode_metrics"] = "summary"
    if spec.over_nodes:
        args["distributed_executor_backend"] = "ray"
    if spec.devices:
        seen = os.environ.get("CUDA_VISIBLE_DEVICES")  # a scheduler may have left this process some of the machine's
        names = seen.split(",") if seen else list(map(str, range(max(spec.devices) + 1)))
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(names[device] for device in spec.devices)
    if spec.devices or spec.over_nodes:
        # Sleep mode takes memory from an allocator of vLLM's own, which can give it back; it has not run on a GPU.
        return AsyncEngineArgs(
            gpu_memory_utilization=spec.gpu_memory_utilization, enable_sleep_mode=spec.sleeps, **args
        ).create_engine_config(OFFLINE)

    # The platform would otherwise put the executor into one more process, and import vllm again.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["OMP_NUM_THREADS"] = str(spec.threads)
    torch.set_num_threads(spec.threads)
    # Even eager vLLM compiles the ranks of log-probs, which nobody reads here: 25 s of C++ compiler, where there is one.
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    torch._dynamo.config.disable = True
    for architecture in policy["architectures"]:
        # vLLM looks at a model class in a subprocess, which imports vllm again, to keep CUDA out of this one.
        ModelRegistry.register_model(architecture, ModelRegistry.models[architecture].load_model_cls())
    for repair in cpu_repairs(policy):
        args |= repair.settings
    # In chunks vLLM samples after each and winds the seeded generator back, which one of a CPU refuses: "does not use offset".
    config = AsyncEngineArgs(enforce_eager=True, enable_chunked_prefill=False, **args).create_engine_config(OFFLINE)
    config.cache_config.kv_cache_memory_bytes = kv_cache_bytes(config)
    return config


def kv_cache_bytes(config: VllmConfig) -> int:
    """Room for every slot at full length as far as KV_CACHE_MAX_bytes goes, at least for one; told, vLLM skips its warm-up."""
    model, parallel = config.model_config, config.parallel_config
    vectors = 1 if model.use_mla else 2 * model.get_num_kv_heads(parallel)
    drafter = config.speculative_config.draft_model_config if config.speculative_config is not None else None
    layers = model.get_num_layers(parallel) + (drafter.get_num_layers(parallel) if drafter is not None else 0)
    token_bytes = vectors * model.get_head_size() * layers * model.dtype.itemsize
    block = config.cache_config.block_size
    slot_bytes = (-(-model.max_model_len // block) + 1) * block * token_bytes
    return max(min(config.scheduler_config.max_num_seqs * slot_bytes, KV_CACHE_MAX_bytes), 2 * slot_bytes)
