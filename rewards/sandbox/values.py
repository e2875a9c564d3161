"""Plain values between processes that do not trust each other: exact builtin types, as JSON, rebuilt from nothing.

What is read is checked and built anew, so no class, method or `__eq__` of a program comes along; pickle is not used anywhere. Integers
beyond 53 bits are hexadecimal, which has no limit on digits. An object that is not plain may cross as a handle, a number that only
the side that holds the object can use.
"""

import json
import math
import struct
from collections.abc import Callable
from typing import Any

_DEPTH = 100
MAX_BYTES = 1 << 25
"""Of one message."""
_SAFE = 1 << 53

Handle = Callable[[Any], int | None]


class NotPlain(Exception):
    """A value that cannot cross. The message says which."""


def encode(value: Any, handle: Handle = lambda _: None, depth: int = 0) -> Any:
    """A plain value as JSON can carry it; `handle` gives the number of an object that is not plain, or None to refuse it."""
    if depth > _DEPTH:
        raise NotPlain("it is nested too deeply")
    number = handle(value)
    if number is not None:
        return {"h": number}
    if type(value).__module__ == "numpy" and hasattr(value, "item") and getattr(value, "shape", None) == ():
        value = value.item()  # a scalar of numpy is the number it holds
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return int(value) if -_SAFE < value < _SAFE else {"i": hex(value)}
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"f": repr(float(value))}
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, complex):
        return {"c": [encode(value.real), encode(value.imag)]}
    if isinstance(value, bytes | bytearray):
        return {"b": bytes(value).hex()}
    if isinstance(value, dict):
        return {"d": [[encode(k, handle, depth + 1), encode(v, handle, depth + 1)] for k, v in value.items()]}
    for kind, tag in ((list, None), (tuple, "t"), (set, "s"), (frozenset, "z")):
        if isinstance(value, kind):
            items = [encode(item, handle, depth + 1) for item in value]
            return {tag: items} if tag else items
    raise NotPlain(f"a value of type '{type(value).__name__}' is not plain")


def decode(data: Any, handle: Callable[[int], Any] | None = None) -> Any:
    """The value of what `encode` made; NotPlain for anything else, as the other side may send what it likes."""
    try:
        return _decode(data, handle)
    except RecursionError:
        raise NotPlain("it is nested too deeply") from None


def _decode(data: Any, handle: Callable[[int], Any] | None) -> Any:
    if data is None or isinstance(data, bool | int | float | str):
        return data
    if isinstance(data, list):
        return [_decode(item, handle) for item in data]
    if not isinstance(data, dict) or len(data) != 1:
        raise NotPlain("the message is no value")
    ((tag, body),) = data.items()
    if tag == "h" and handle and isinstance(body, int):
        return handle(body)
    try:
        return _TAGS[tag](body, handle)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise NotPlain("the message is no value") from None


def _pairs(body: Any, handle: Any) -> dict[Any, Any]:
    return {_decode(key, handle): _decode(value, handle) for key, value in body}


def _items(kind: type) -> Callable[[Any, Any], Any]:
    return lambda body, handle: kind([_decode(item, handle) for item in body])


_TAGS: dict[str, Callable[[Any, Any], Any]] = {
    "i": lambda body, _: int(body, 16),
    "f": lambda body, _: float(body),
    "b": lambda body, _: bytes.fromhex(body),
    "c": lambda body, _: complex(*(float(_decode(part, None)) for part in body)),
    "d": _pairs,
    "t": _items(tuple),
    "s": _items(set),
    "z": _items(frozenset),
}


def parse(text: bytes) -> Any:
    """JSON from the other side; NotPlain for what is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise NotPlain("the message is no JSON") from None


class Link:
    """Messages over a stream socket, each with its length before it."""

    def __init__(self, fd: int) -> None:
        self._stream = open(fd, "r+b", buffering=0)

    def send(self, message: Any) -> None:
        body = json.dumps(message).encode()
        if len(body) > MAX_BYTES:
            raise NotPlain("it is too large")
        view = memoryview(struct.pack("<I", len(body)) + body)
        while view:
            view = view[self._stream.write(view) :]

    def receive(self) -> Any:
        """The next message; EOFError if the other side is gone, NotPlain if it sent what is none."""
        (length,) = struct.unpack("<I", self._exactly(4))
        if length > MAX_BYTES:
            raise NotPlain("the message is too large")
        return parse(self._exactly(length))

    def _exactly(self, count: int) -> bytes:
        chunks: list[bytes] = []
        while count:
            chunk = self._stream.read(min(count, 1 << 20))
            if not chunk:
                raise EOFError
            chunks.append(chunk)
            count -= len(chunk)
        return b"".join(chunks)
