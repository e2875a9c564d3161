"""An engine on transformers, in a thread of this process: for tests, for bit-exact runs, and for machines without vLLM.

One submit is one call of fixed shape: the group's prompt is read once, then all its rows advance together until each has ended. A
token is the argmax of logits plus Gumbel noise (the same as sampling from the softmax) and every row draws its noise from a
generator of its own, so what a completion becomes depends on weights, prompt, sampling and seed, and on nothing else.

    G  rows of a group      V  vocabulary
"""

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from data.values import Completion
from rl.engines.base import Died, EngineDead, Finished, Health, Mailbox, Request, Sampling, WeightChunk
from rl.engines.weights import read_chunk
from rl.policy import checkpoint_views, end_tokens, load_model, load_tokenizer

log = logging.getLogger(__name__)


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
    """Implements `rl.engines.base.Engine`."""

    whole_groups = True

    def __init__(self, name: str, path: str, dtype: torch.dtype, slots: int, device: torch.device | str = "cpu"):
        self.name = name
        self.slots = slots
        self.path = path
        self.dtype = dtype
        self.device = torch.device(device)
        self.version = 0
        self._work: SimpleQueue[Sequence[Request] | None] = SimpleQueue()
        self._between_tokens = threading.Lock()
        self._paused = False
        self._aborted: set[str] = set()
        self._running = 0
        self._tokens = 0
        self._busy_s = 0.0
        self._died: str | None = None
        self._thread: threading.Thread | None = None

    def start(self, mailbox: Mailbox) -> None:
        self.model: PreTrainedModel = load_model(self.path, self.dtype, attention_name="sdpa").to(self.device)
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(self.path)
        self.ends = frozenset(end_tokens(self.model.config, self.tokenizer, self.model.generation_config.eos_token_id))
        self.views = dict(checkpoint_views(self.model))
        self.mailbox = mailbox
        self._thread = threading.Thread(target=self._serve, name=self.name, daemon=True)
        self._thread.start()

    def submit(self, requests: Sequence[Request]) -> None:
        self._alive()
        self._running += len(requests)
        self._work.put(requests)

    def abort(self, ids: Sequence[str]) -> None:
        self._alive()
        self._aborted.update(ids)

    def pause(self) -> None:
        self._alive()
        if not self._paused:
            self._between_tokens.acquire()
            self._paused = True

    def resume(self) -> None:
        self._alive()
        if self._paused:
            self._paused = False
            self._between_tokens.release()

    def begin_update(self, version: int) -> None:
        self._alive()
        assert self._paused or self._running == 0, f"{self.name}: an update needs an idle or paused engine"
        self._next_version = version

    def load(self, chunk: WeightChunk) -> None:
        with torch.no_grad():
            for name, tensor in read_chunk(chunk):
                self.views[name].copy_(tensor)

    def end_update(self) -> None:
        self.version = self._next_version  # there is no prefix cache to drop: each call reads its prompt anew

    def health(self) -> Health:
        alive = self._died is None and self._thread is not None and self._thread.is_alive()
        return Health(alive, self._running, self.version, self._tokens, self._busy_s)

    def close(self) -> None:
        if self._thread is None:
            return
        self._aborted.update(["*"])
        if self._paused:
            self.resume()
        self._work.put(None)
        self._thread.join()
        self._thread = None

    def _alive(self) -> None:
        if self._died is not None or self._thread is None:
            raise EngineDead(f"engine {self.name} is not running: {self._died or 'it was not started'}")

    # --- the thread ---------------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        try:
            while (requests := self._work.get()) is not None:
                began = time.perf_counter()
                rows = self._sample(requests)
                self._busy_s += time.perf_counter() - began
                for row in rows:
                    self._running -= 1
                    self.mailbox.put(Finished(self.name, self._completion(row)))
        except Exception as error:  # an engine's death is data: the pool decides what becomes of its work
            log.exception("engine %s died", self.name)
            self._died = f"{type(error).__name__}: {error}"
            self.mailbox.put(Died(self.name, self._died))

    @torch.inference_mode()
    def _sample(self, requests: Sequence[Request]) -> list[_Row]:
        """Completions of one group, all rows in step."""
        rows = [_Row(r, torch.Generator(self.device).manual_seed(r.seed)) for r in requests]
        sampling = requests[0].sampling
        prompt = torch.as_tensor(requests[0].prompt_ids, dtype=torch.int64, device=self.device)
        tokens_G1 = prompt.expand(len(rows), -1)
        cache: Any = DynamicCache(config=self.model.config)
        for _ in range(sampling.max_tokens):
            with self._between_tokens:
                logits_GV = self.model(tokens_G1, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
                chosen_G = self._advance(rows, logits_GV, sampling)
            if all(row.finish_reason for row in rows):
                break
            tokens_G1 = chosen_G[:, None]
        return rows

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
                row.versions.append(self.version)
                row.finish_reason = self._finished(row, sampling)
        return chosen_G

    def _finished(self, row: _Row, sampling: Sampling) -> str | None:
        self._tokens += 1
        if row.tokens[-1] in self.ends:
            return "stop"
        if sampling.stop:
            text = self.tokenizer.decode(row.tokens)
            if any(stop in text for stop in sampling.stop):
                return "stop"
        if len(row.tokens) == sampling.max_tokens:
            return "length"
        return "abort" if row.request.id in self._aborted or "*" in self._aborted else None

    def _completion(self, row: _Row) -> Completion:
        r = row.request
        self._aborted.discard(r.id)
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
            engine=self.name,
        )


def _exponential(like_V: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Exponential noise; -log of it is Gumbel noise. Never 0, so its logarithm is finite."""
    tiny = torch.finfo(like_V.dtype).tiny
    return torch.empty_like(like_V).exponential_(generator=generator).clamp_(min=tiny)
