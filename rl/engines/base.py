"""An engine is a copy of the policy that samples. This is all the rest of Cohort knows of one.

Calls post work and return; what comes of it arrives in one mailbox that all engines of a pool share, so that whoever reads it
needs neither threads nor a loop for each engine. An engine never decides anything: which completion it samples, from which seed,
and under which weights are the pool's. Three kinds share the protocol: `hf` (transformers, in a thread of this process), `vllm`
(a process of its own), and servers reached by URL.

An engine may die and be started again: it then has another life, with a mailbox of its own and the weights it was first loaded
with. What an engine is not able to say (that it hangs) is seen from its silence: one that samples says so about once a second.

Weights travel as chunks of one shared file, in the names and shapes of a checkpoint. The file keeps the whole model until the
next update, so an engine that restarts can be brought to the current weights without asking the learner again.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from data.values import Completion, Prompt


@dataclass(frozen=True)
class Sampling:
    """How completions are sampled; the same for all completions of a group."""

    max_tokens: int
    temperature: float = 1.0
    """0 is greedy; its log-probs are those of temperature 1."""
    stop: tuple[str, ...] = ()
    """Strings that end a completion; their tokens stay in it."""
    top_p: float = 1.0
    top_k: int = 0
    """0 is all tokens."""


@dataclass(frozen=True)
class Request:
    """One completion asked of an engine."""

    prompt_id: str
    group_id: str
    attempt: int
    index: int
    seed: int
    prompt_ids: np.ndarray
    """int32 [prompt tokens]."""
    sampling: Sampling
    position: int = 0
    """The prompt's place in the stream; an engine that takes whole groups is chosen by it."""
    prompt: Prompt | None = None
    """The prompt itself, for a conversation to see; no engine is given it."""

    @property
    def id(self) -> str:
        return f"{self.group_id}#{self.index}"


@dataclass(frozen=True)
class TensorSlot:
    """One tensor of a chunk: checkpoint name, torch dtype by name (`float32`), shape, and where its bytes begin in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int


@dataclass(frozen=True)
class WeightChunk:
    """Some tensors of an update, by the shared file that holds their bytes."""

    path: str
    slots: tuple[TensorSlot, ...]


@dataclass(frozen=True)
class Finished:
    """An engine finished a completion (or gave back what it had of an aborted one)."""

    engine: str
    completion: Completion


@dataclass(frozen=True)
class Died:
    """An engine is gone; `reason` ends with the last lines of its log."""

    engine: str
    reason: str


@dataclass(frozen=True)
class Pulse:
    """An engine has sampled tokens since it last said so (about once a second), or was paused or resumed (at once)."""

    engine: str
    health: "Health"


Event = Finished | Died | Pulse


class Mailbox(Protocol):
    """Where the events of one life of an engine go; a `queue.SimpleQueue` is one."""

    def put(self, event: Event, /) -> None:
        """Called from any thread; never waits."""


class EngineDead(RuntimeError):
    """An engine died, or answered a call with an error. The message names it and holds its last log lines."""


@dataclass(frozen=True)
class Health:
    """What an engine says of itself."""

    alive: bool
    running: int
    """Completions submitted and not finished."""
    version: int
    """The policy version it samples from."""
    tokens: int
    """Completion tokens sampled since its start."""
    busy_s: float
    """Seconds since its start in which at least one completion was being sampled."""
    paused: bool = False


Part = Literal["weights", "kv_cache"]
"""What an engine that sleeps is woken in, one after the other."""
PULSE_s = 1.0
"""How often an engine that samples says so."""
PROMPT_TOKENS = 2048
"""Prompt tokens for which an engine may be silent once more as long: nothing is sampled while a prompt is read."""


def patience_s(stall_s: float, prompt_tokens: int) -> float:
    """How long an engine that has a prompt of this length to read may say nothing before it is taken for hung."""
    return stall_s * (1.0 + prompt_tokens / PROMPT_TOKENS)


class Engine(Protocol):
    """Any method but `start`, `close` and `last_words` raises EngineDead if the engine is gone, or not there yet."""

    name: str
    slots: int
    """Completions it samples at once; the pool keeps it that full."""
    whole_groups: bool
    """True where one submit is one call of fixed shape over a whole group, never split or joined (exactness (a))."""

    def start(self, mailbox: Mailbox) -> None:
        """Begins a life: loads the policy and returns when the engine can sample; it is at version 0 then. EngineDead if it cannot.

        Whatever ends this life before `close` is one Died in this mailbox, after all else that it had to say.
        """

    def submit(self, requests: Sequence[Request]) -> None:
        """Asks for completions of one group; each arrives in the mailbox once."""

    def abort(self, ids: Sequence[str]) -> None:
        """Ends these requests; what they have so far arrives with finish_reason `abort`. Unknown ids are passed over."""

    def pause(self) -> None:
        """Stops between two tokens and returns when it has; requests stay. Further submits are queued."""

    def resume(self) -> None:
        """Goes on where `pause` stopped."""

    def begin_update(self, version: int) -> None:
        """Opens an update; the engine must be idle or paused."""

    def load(self, chunk: WeightChunk) -> None:
        """Copies a chunk's tensors into the model."""

    def end_update(self) -> None:
        """Closes the update, drops the prefix cache, and returns when the next token comes from the new weights."""

    def sleep(self) -> None:
        """Gives its GPU memory to the learner until it is woken; it must have no work. Its weights are lost, so an update has to come
        between the two wakes. What has no GPU memory only stands still."""

    def wake(self, part: Part) -> None:
        """Takes the memory of its weights back, for an update, or of its KV cache, to sample; what is awake stays as it is."""

    def health(self) -> Health:
        """Answers when the token in the making is done."""

    def last_words(self) -> str:
        """The last lines of its log, to be shown where it is said that it died; empty if it keeps none."""

    def close(self) -> None:
        """Ends this life, hung or not, and frees what it holds. May be called twice, and from another thread while it starts."""
