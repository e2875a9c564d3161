"""The inside of an engine that is a process: what it is told, what it answers, and the loop between.

The loop takes what came through the pipe, lets the sampler do one step, and sends what finished. Between two steps the engine can
be fed, paused, updated or asked how it is: a free slot never waits for a batch to end, and an update falls between two tokens.
Idle, it blocks on the pipe; when the trainer is gone the pipe ends, and so does the loop. While tokens come it says so about once
a second; when they stop coming it says nothing, and that is how the trainer sees that it hangs. What samples is behind `Core`,
so nothing here knows vLLM.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from multiprocessing.connection import Connection
from typing import Any, Protocol

import numpy as np

from data.values import Completion
from rl.engines.base import Health, Part, PULSE_s, Request, WeightChunk

SEND_s = 0.02
"""While it samples, completions are sent together so often: each message wakes the trainer, which takes 100 us of a step."""
TOGETHER_s = 0.003
"""What comes to an idle engine so soon after one another begins together: a first step with one group would delay all others."""


@dataclass(frozen=True)
class Call:
    """Trainer to engine: a method of Server."""

    number: int | None
    """Names the answer; None where none is waited for."""
    method: str
    args: tuple[Any, ...]


@dataclass(frozen=True)
class Answer:
    """Engine to trainer: what call `number` returned."""

    number: int
    value: Any


@dataclass(frozen=True)
class Ready:
    """Engine to trainer: the policy is loaded."""


@dataclass(frozen=True)
class Failed:
    """Engine to trainer: the exception that ends the engine."""

    error: str


@dataclass(frozen=True)
class Sampled:
    """Engine to trainer: what finished lately, with the numbers of all completions in one stretch of bytes each.

    Four small arrays a completion take five times as long to pickle.
    """

    fields: list[tuple[Any, ...]]
    """Of each completion: how many tokens it has, and the values that are no arrays of its tokens, in the order of `PLAIN`."""
    arrays: tuple[bytes, ...]
    """In the order of `BY_TOKEN`."""

    @classmethod
    def of(cls, completions: Sequence[Completion]) -> "Sampled":
        fields = [(len(c.token_ids), *(getattr(c, name) for name in PLAIN)) for c in completions]
        return cls(fields, tuple(np.concatenate([getattr(c, name) for c in completions]).tobytes() for name in BY_TOKEN))

    def completions(self) -> list[Completion]:
        arrays = [np.frombuffer(data, kind) for data, kind in zip(self.arrays, BY_TOKEN.values(), strict=True)]
        done, begin = [], 0
        for tokens, *plain in self.fields:
            values: dict[str, Any] = dict(zip(PLAIN, plain, strict=True))
            values |= {name: array[begin : begin + tokens].copy() for name, array in zip(BY_TOKEN, arrays, strict=True)}
            done.append(Completion(**values))
            begin += tokens
        return done


BY_TOKEN = {"token_ids": np.int32, "mask": np.uint8, "engine_logp": np.float32, "policy_version": np.int32}
"""Arrays of a completion with an entry for each token, and their types."""
PLAIN = tuple(field.name for field in fields(Completion) if field.name not in BY_TOKEN)


class Core(Protocol):
    """What the loop needs of that which samples."""

    requests: dict[str, Request]
    """Submitted and not given back."""

    def add(self, request: Request) -> None: ...

    def abort(self, ids: Sequence[str]) -> list[Completion]:
        """Gives back what these have, now or in a later step."""

    def step(self) -> list[Completion]:
        """What finished: by one step, or within a few milliseconds."""

    def pause(self) -> None: ...

    def resume(self) -> None: ...

    def check(self) -> None:
        """Raises if a process it depends on is gone."""

    def running_tokens(self) -> int:
        """Tokens sampled so far of `requests`."""

    def begin_update(self) -> None: ...

    def load(self, chunk: WeightChunk) -> None: ...

    def transfer(self, method: str, info: dict[str, Any]) -> None:
        """A call that only the weight backend understands."""

    def end_update(self, version: int) -> None:
        """Names the new weights, and drops every key and value of older ones, those of running requests included."""

    def sleep(self) -> None:
        """Frees weights and KV cache."""

    def wake(self, part: Part) -> None:
        """Takes room for one of them again; the other is as it was."""


class Server:
    """The loop, and what each call does."""

    def __init__(self, pipe: Connection, core: Core) -> None:
        self.pipe = pipe
        self.core = core
        self.paused = False
        self.asleep: set[Part] = set()
        self.weights_lost = False
        """It has slept and had no update since."""
        self.version = 0
        self.next_version = 0
        self.tokens = 0
        self.busy_s = 0.0
        self.finished: list[Completion] = []
        """Not sent yet."""

    def run(self) -> None:
        """Ends with EOFError when the other end of the pipe is closed."""
        turned = told = sent = time.perf_counter()
        tokens = 0
        idle = True
        while True:
            sampling = bool(self.core.requests) and not self.paused
            if self.finished and (not sampling or turned - sent >= SEND_s):
                self.pipe.send(Sampled.of(self.finished))
                self.finished, sent = [], turned
            if not sampling or self.pipe.poll(TOGETHER_s if idle else 0.0):
                self.answer(self.pipe.recv())
                idle = idle or not sampling
            else:
                self.finish(self.core.step())
                idle = False
            now = time.perf_counter()
            if sampling:
                self.busy_s += now - turned
            if sampling and now - told >= PULSE_s:
                health, told = self.health(), now
                if health.tokens > tokens:
                    tokens = health.tokens
                    self.pipe.send(health)
            turned = now

    def answer(self, call: Call) -> None:
        value = getattr(self, call.method)(*call.args)
        if call.number is not None:
            self.pipe.send(Answer(call.number, value))

    def finish(self, completions: Sequence[Completion]) -> None:
        self.tokens += sum(len(completion.token_ids) for completion in completions)
        self.finished += completions

    def submit(self, requests: Sequence[Request]) -> None:
        assert not self.asleep, "an engine that sleeps was asked for completions"
        for request in requests:
            assert request.id not in self.core.requests, f"{request.id} is being sampled already"
            self.core.add(request)

    def abort(self, ids: Sequence[str]) -> None:
        self.finish(self.core.abort([i for i in ids if i in self.core.requests]))

    def pause(self) -> None:
        self.core.pause()
        self.paused = True
        self.pipe.send(self.health())

    def resume(self) -> None:
        self.core.resume()
        self.paused = False
        self.pipe.send(self.health())

    def begin_update(self, version: int) -> None:
        assert self.paused or not self.core.requests, "an update began while completions were sampled; pause the engine first"
        assert "weights" not in self.asleep, "an update has nowhere to go: the weights sleep"
        self.next_version = version
        self.core.begin_update()

    def load(self, chunk: WeightChunk) -> None:
        self.core.load(chunk)

    def transfer(self, method: str, info: dict[str, Any]) -> None:
        self.core.transfer(method, info)

    def end_update(self) -> None:
        self.core.end_update(self.next_version)
        self.version = self.next_version
        self.weights_lost = False

    def sleep(self) -> None:
        assert not self.core.requests, "an engine was put to sleep over its work"
        if not self.asleep:
            self.core.sleep()
        self.asleep = {"weights", "kv_cache"}
        self.weights_lost = True

    def wake(self, part: Part) -> None:
        if part not in self.asleep:
            return
        assert part == "weights" or not self.weights_lost, "an engine was to sample from weights that it has lost; update it first"
        self.core.wake(part)
        self.asleep.remove(part)

    def health(self) -> Health:
        self.core.check()
        tokens = self.tokens + self.core.running_tokens()
        return Health(True, len(self.core.requests), self.version, tokens, self.busy_s, self.paused)
