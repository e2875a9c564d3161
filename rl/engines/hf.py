"""An engine on transformers, in a thread of this process: for tests, for bit-exact runs, and for machines without vLLM.

One submit is one call of fixed shape: the group's prompt is read once, then all its rows advance together until each has ended. A
token is the argmax of logits plus Gumbel noise (the same as sampling from the softmax) and every row draws its noise from a
generator of its own, so what a completion becomes depends on weights, prompt, sampling and seed, and on nothing else.

    G  rows of a group      V  vocabulary
"""

import logging
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from data.values import Completion
from rl import attention
from rl.config import Fp8Config
from rl.engines.base import Died, EngineDead, Finished, Health, Mailbox, Part, Pulse, PULSE_s, Request, Sampling, WeightChunk
from rl.engines.weights import read_chunk
from rl.fp8.convert import fp8_model
from rl.policy import checkpoint_views, end_tokens, load_model, load_tokenizer
from rl.replay import RouteRecorder, give_routes

log = logging.getLogger(__name__)

_loading = threading.Lock()
"""transformers changes settings of the whole process while it loads: two loads side by side miss tied weights."""
CLOSE_s = 5.0
"""A thread that has not ended so long after it was told to is taken for hung."""


@dataclass
class _Row:
    """A completion in the making."""

    request: Request
    noise: torch.Generator
    tokens: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    finish_reason: str | None = None


class HfEngine:
    """Implements `rl.engines.base.Engine`. A life is a thread; a thread that hangs cannot be ended, and is left behind."""

    whole_groups = True

    def __init__(
        self,
        name: str,
        path: str,
        dtype: torch.dtype,
        slots: int,
        device: torch.device | str = "cpu",
        fp8: Fp8Config | None = None,
        *,
        returns_routes: bool = False,
    ):
        """fp8: how an FP8 policy computes; its weights are codes then, and `dtype` is that of the rest. returns_routes: completions
        come with the experts that each position was sent to, if the policy has any."""
        self.name = name
        self.slots = slots
        self.path = path
        self.dtype = dtype
        self.fp8 = fp8
        self.device = torch.device(device)
        self.returns_routes = returns_routes
        self.version = 0
        self.model: PreTrainedModel | None = None
        self._life: _Life | None = None

    def start(self, mailbox: Mailbox) -> None:
        self.close()
        if self.model is None:
            with _loading:
                self.model = self._load().to(self.device)
            self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(self.path)
            self.ends = frozenset(end_tokens(self.model.config, self.tokenizer, self.model.generation_config.eos_token_id))
            self.views = dict(checkpoint_views(self.model))
            self.recorder = RouteRecorder(self.model, on=self.returns_routes)
        else:  # transformers' loading sets defaults of the whole process, in which the learner may be at work by now
            for file in sorted(Path(self.path).glob("*.safetensors")):
                self._copy((name, tensor) for name, tensor in load_file(file).items() if name in self.views)
        self.version = 0
        self._life = _Life(self, self.model, mailbox)

    def _load(self) -> PreTrainedModel:
        if self.fp8 is None:
            return load_model(self.path, self.dtype, attention_name=attention.CACHED)
        return fp8_model(Path(self.path), self.fp8, self.device, masters="none", attention_name=attention.CACHED)

    def submit(self, requests: Sequence[Request]) -> None:
        life = self._alive()
        life.running += len(requests)
        life.work.put(requests)

    def abort(self, ids: Sequence[str]) -> None:
        self._alive().aborted.update(ids)

    def pause(self) -> None:
        self._alive().pause()

    def resume(self) -> None:
        self._alive().resume()

    def begin_update(self, version: int) -> None:
        life = self._alive()
        assert life.paused or life.running == 0, f"{self.name}: an update needs an idle or paused engine"
        self._next_version = version

    def load(self, chunk: WeightChunk) -> None:
        self._alive()
        self._copy(read_chunk(chunk))

    def end_update(self) -> None:
        self._alive()
        self.version = self._next_version  # there is no prefix cache to drop: each call reads its prompt anew

    def sleep(self) -> None:
        self._alive().pause()  # it shares the learner's memory, and has nothing to give back

    def wake(self, part: Part) -> None:
        if part == "kv_cache":
            self._alive().resume()

    def health(self) -> Health:
        return self._alive().health()

    def last_words(self) -> str:
        return ""

    def close(self) -> None:
        life, self._life = self._life, None
        if life is not None:
            life.close()

    def _copy(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        with torch.no_grad():
            for name, tensor in tensors:
                self.views[name].copy_(tensor)

    def _alive(self) -> "_Life":
        if self._life is None or self._life.died is not None:
            raise EngineDead(f"engine {self.name} is not running: {self._life.died if self._life else 'it was not started, or closed'}")
        return self._life


class _Life:
    """One life of an engine: the thread, what it has to do, and what it has done."""

    def __init__(self, engine: HfEngine, model: PreTrainedModel, mailbox: Mailbox) -> None:
        self.engine = engine
        self.model = model
        self.mailbox = mailbox
        self.work: SimpleQueue[Sequence[Request] | None] = SimpleQueue()
        self.between_tokens = threading.Lock()
        self.paused = False
        self.aborted: set[str] = set()
        self.closing = False
        self.running = 0
        self.tokens = 0
        self.busy_s = 0.0
        self.told = time.monotonic()
        self.died: str | None = None
        self.thread = threading.Thread(target=self._serve, name=engine.name, daemon=True)
        self.thread.start()

    def pause(self) -> None:
        if not self.paused:
            self.between_tokens.acquire()
            self.paused = True
            self.mailbox.put(Pulse(self.engine.name, self.health()))

    def resume(self) -> None:
        if self.paused:
            self.paused = False
            self.between_tokens.release()
            self.mailbox.put(Pulse(self.engine.name, self.health()))

    def health(self) -> Health:
        return Health(True, self.running, self.engine.version, self.tokens, self.busy_s, self.paused)

    def close(self) -> None:
        self.closing = True
        if self.paused:
            self.paused = False
            self.between_tokens.release()
        self.work.put(None)
        self.thread.join(CLOSE_s)

    # --- the thread ---------------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        try:
            while (requests := self.work.get()) is not None:
                began = time.perf_counter()
                with self.engine.recorder.recording() as routes:
                    done = [self._completion(row) for row in self._sample(requests)]
                self.busy_s += time.perf_counter() - began
                for completion in give_routes(done, routes):
                    self.running -= 1
                    self.mailbox.put(Finished(self.engine.name, completion))
        except Exception as error:  # an engine's death is data: the pool decides what becomes of its work
            log.exception("engine %s died", self.engine.name)
            self.died = f"{type(error).__name__}: {error}"
            self.mailbox.put(Died(self.engine.name, self.died))

    @torch.inference_mode()
    def _sample(self, requests: Sequence[Request]) -> list[_Row]:
        """Completions of one group, all rows in step."""
        device = self.engine.device
        rows = [_Row(r, torch.Generator(device).manual_seed(r.seed)) for r in requests]
        sampling = requests[0].sampling
        prompt = torch.as_tensor(requests[0].prompt_ids, dtype=torch.int64, device=device)
        tokens_G1 = prompt.expand(len(rows), -1)
        cache: Any = DynamicCache(config=self.model.config)
        for _ in range(sampling.max_tokens):
            with self.between_tokens:
                logits_GV = self.model(tokens_G1, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
                chosen_G = self._advance(rows, logits_GV, sampling)
            self._tell()
            if all(row.finish_reason for row in rows):
                break
            tokens_G1 = chosen_G[:, None]
        return rows

    def _tell(self) -> None:
        if (now := time.monotonic()) - self.told >= PULSE_s:
            self.told = now
            self.mailbox.put(Pulse(self.engine.name, self.health()))

    def _advance(self, rows: list[_Row], logits_GV: torch.Tensor, sampling: Sampling) -> torch.Tensor:
        """Draws a token for each row and notes it in the rows that are still open."""
        scaled_GV = logits_GV.float() / (sampling.temperature or 1.0)
        logp_GV = scaled_GV.log_softmax(-1)
        noisy_GV = scaled_GV
        if sampling.temperature > 0.0:
            noisy_GV = torch.stack([z - _exponential(z, row.noise).log() for z, row in zip(scaled_GV, rows, strict=True)])
        chosen_G = noisy_GV.argmax(-1)
        chosen_logp_G = logp_GV.gather(-1, chosen_G[:, None]).squeeze(-1)
        for row, token, logp in zip(rows, chosen_G.tolist(), chosen_logp_G.tolist(), strict=True):
            if row.finish_reason is None:
                row.tokens.append(token)
                row.logps.append(logp)
                row.versions.append(self.engine.version)
                row.finish_reason = self._finished(row, sampling)
        return chosen_G

    def _finished(self, row: _Row, sampling: Sampling) -> str | None:
        self.tokens += 1
        if row.tokens[-1] in self.engine.ends:
            return "stop"
        if sampling.stop:
            text = self.engine.tokenizer.decode(row.tokens)
            if any(stop in text for stop in sampling.stop):
                return "stop"
        if len(row.tokens) == sampling.max_tokens:
            return "length"
        return "abort" if self.closing or row.request.id in self.aborted else None

    def _completion(self, row: _Row) -> Completion:
        r = row.request
        self.aborted.discard(r.id)
        assert row.finish_reason in ("stop", "length", "abort")
        return Completion(
            prompt_id=r.prompt_id,
            group_id=r.group_id,
            index=r.index,
            attempt=r.attempt,
            seed=r.seed,
            token_ids=np.asarray(row.tokens, dtype=np.int32),
            mask=np.ones(len(row.tokens), dtype=np.uint8),
            engine_logp=np.asarray(row.logps, dtype=np.float32),
            policy_version=np.asarray(row.versions, dtype=np.int32),
            finish_reason=row.finish_reason,  # type: ignore[arg-type]
            engine=self.engine.name,
        )


def _exponential(like_V: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Exponential noise; -log of it is Gumbel noise. Never 0, so its logarithm is finite."""
    tiny = torch.finfo(like_V.dtype).tiny
    return torch.empty_like(like_V).exponential_(generator=generator).clamp_(min=tiny)
