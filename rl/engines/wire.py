"""How values cross from one machine to another: a line of JSON for what is plain, and the bytes of arrays after it. No pickle.

Both ends of a connection are ours, but a network is not: what arrives becomes plain values, arrays of numbers and the few dataclasses
named here, and nothing that it says is ever run. An array comes back byte for byte.
"""

import json
from dataclasses import dataclass, fields, is_dataclass
from math import prod
from typing import Any

import numpy as np

from data.values import Completion
from rl.engines import base
from rl.engines.server import Answer, Call, Failed, Ready
from rl.engines.weights import TensorSpec


class Malformed(ValueError):
    """What arrived is none of ours."""


@dataclass(frozen=True)
class Hello:
    """A learner asks for an engine."""

    owner: str
    """One learner's place for one engine; the same through all lives of it."""
    name: str
    """Who that is, for people."""
    facts: dict[str, str]
    """What both ends have to have in common; see `rl.engines.make.facts_of`."""
    max_model_len: int
    """Longest prompt and completion together that it will ask for, in tokens."""
    manifest: dict[str, TensorSpec]
    """What every weight update will bring; empty: there will be none."""


@dataclass(frozen=True)
class Welcome:
    """The engine is the learner's. Ready comes as an event, when it can sample."""

    session: str
    slots: int
    says: tuple[str, ...] = ()
    """What of the engine's settings had to be repaired, a line each, for whoever started the run."""


@dataclass(frozen=True)
class Broken:
    """What call `number` raised; the engine's life is over."""

    number: int
    error: str


_CLASSES = {
    kind.__name__: kind
    for kind in (
        base.Died, base.Finished, base.Health, base.Pulse, base.Request, base.Sampling, base.TensorSlot,
        Answer, Broken, Call, Completion, Failed, Hello, Ready, TensorSpec, Welcome,
    )
}  # fmt: skip


def encode(value: Any) -> bytes:
    """Any value of plain values, arrays of numbers, lists, tuples, string-keyed mappings and the dataclasses of `_CLASSES`."""
    arrays: dict[int, tuple[int, np.ndarray]] = {}
    head = json.dumps(_plain(value, arrays), allow_nan=False).encode()
    return b"\n".join([head, b"".join(array.tobytes() for _, array in arrays.values())])


def decode(message: bytes) -> Any:
    """What was encoded; its arrays own their memory. Malformed for anything else."""
    head, newline, body = message.partition(b"\n")
    try:
        if not newline:
            raise ValueError("its head has no end")
        reader = _Reader(memoryview(body))
        value = reader.value(json.loads(head))
        if reader.at != len(body):
            raise ValueError(f"{len(body) - reader.at} bytes too many")
    except (ValueError, TypeError, KeyError, IndexError, RecursionError) as error:
        raise Malformed(f"not a message of this version of Cohort: {error}") from None
    return value


def _plain(value: Any, arrays: dict[int, tuple[int, np.ndarray]]) -> Any:
    match value:
        case None | bool() | int() | float() | str():
            return value
        case np.ndarray():
            if id(value) in arrays:  # the prompt of a group travels once
                return {"again": arrays[id(value)][0]}
            arrays[id(value)] = (len(arrays), value)
            return {"array": [value.dtype.str, value.shape]}
        case list():
            return [_plain(one, arrays) for one in value]
        case tuple():
            return {"tuple": [_plain(one, arrays) for one in value]}
        case dict():
            return {"dict": {key: _plain(one, arrays) for key, one in value.items()}}
    assert is_dataclass(value) and type(value).__name__ in _CLASSES, f"{type(value).__name__} is not sent to other machines"
    return {type(value).__name__: {field.name: _plain(getattr(value, field.name), arrays) for field in fields(value)}}


class _Reader:
    """Makes values of their plain form, and of the bytes of their arrays in the order in which they stand in it."""

    def __init__(self, body: memoryview) -> None:
        self.body = body
        self.at = 0
        self.arrays: list[np.ndarray] = []

    def value(self, plain: Any) -> Any:
        if isinstance(plain, list):
            return [self.value(one) for one in plain]
        if not isinstance(plain, dict):
            return plain
        ((kind, inner),) = plain.items()
        match kind:
            case "array":
                return self.array(*inner)
            case "again":
                return self.arrays[inner]
            case "tuple":
                return tuple(self.value(one) for one in inner)
            case "dict":
                return {key: self.value(one) for key, one in inner.items()}
        return _CLASSES[kind](**{key: self.value(one) for key, one in inner.items()})

    def array(self, dtype_name: str, shape: list[int]) -> np.ndarray:
        dtype = np.dtype(dtype_name)
        end = self.at + prod(shape) * dtype.itemsize
        if dtype.kind not in "biuf" or min(shape, default=0) < 0 or end > len(self.body):
            raise ValueError(f"an array {dtype_name} {shape} in {len(self.body) - self.at} bytes")
        self.arrays.append(np.frombuffer(self.body[self.at : end], dtype).reshape(shape).copy())
        self.at = end
        return self.arrays[-1]
