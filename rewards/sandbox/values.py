"""Plain values between processes that do not trust each other: exact builtin types, as JSON, rebuilt from nothing.

What is read is checked and built anew, so no class, method or `__eq__` of a program comes along; pickle is not used anywhere. Integers
beyond 53 bits are hexadecimal, which has no limit on digits. Of the standard library's values there cross, of these exact types and
not of subclasses: range, slice, deque, Fraction, Decimal, date, time, datetime, timedelta, timezone; and iterators, as all that they
give, up to MAX_ITEMS. An object that is not plain may cross as a handle, a number that only the side that holds the object can use.
"""

import json
import math
import struct
from collections import deque
from collections.abc import Callable, Iterator
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from fractions import Fraction
from itertools import islice
from types import NoneType
from typing import Any

_DEPTH = 100
MAX_BYTES = 1 << 25
"""Of one message."""
MAX_ITEMS = 1 << 18
"""Of one iterator."""
_SAFE = 1 << 53

Handle = Callable[[Any], int | None]


class NotPlain(Exception):
    """A value that cannot cross. The message says which."""


def _clock(value: time | datetime) -> tuple[Any, ...]:
    return value.hour, value.minute, value.second, value.microsecond, value.tzinfo, value.fold


_STANDARD: dict[str, tuple[type, Callable[[Any], tuple[Any, ...]], Callable[..., Any], tuple[type, ...]]] = {
    "range": (range, lambda v: (v.start, v.stop, v.step), range, (int,)),
    "slice": (slice, lambda v: (v.start, v.stop, v.step), slice, (int, NoneType)),
    "Fraction": (Fraction, lambda v: (v.numerator, v.denominator), Fraction, (int,)),
    "Decimal": (Decimal, lambda v: (str(v),), Decimal, (str,)),
    "date": (date, lambda v: (v.year, v.month, v.day), date, (int,)),
    "time": (time, _clock, lambda *parts: time(*parts[:-1], fold=parts[-1]), (int, NoneType, timezone)),
    "datetime": (
        datetime,
        lambda v: (v.year, v.month, v.day, *_clock(v)),
        lambda *parts: datetime(*parts[:-1], fold=parts[-1]),
        (int, NoneType, timezone),
    ),
    "timedelta": (timedelta, lambda v: (v.days, v.seconds, v.microseconds), timedelta, (int,)),
    "timezone": (timezone, lambda v: (v.utcoffset(None), v.tzname(None)), timezone, (timedelta, str)),
}
"""By tag: the exact type, its parts, what makes it of them, and the exact types that parts may have (a date would take bytes as if
unpickled)."""
_TAG_OF = {kind: tag for tag, (kind, *_) in _STANDARD.items()}
STANDARD = (*_TAG_OF, deque)


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
    if type(value) in _TAG_OF:
        tag = _TAG_OF[type(value)]
        return {tag: [encode(part, depth=depth + 1) for part in _STANDARD[tag][1](value)]}
    if type(value) is deque:
        return {"q": [[encode(item, handle, depth + 1) for item in value], value.maxlen]}
    if isinstance(value, Iterator):
        items = [encode(item, handle, depth + 1) for item in islice(value, MAX_ITEMS + 1)]
        if len(items) > MAX_ITEMS:
            raise NotPlain(f"an iterator gives more than {MAX_ITEMS} items")
        return {"g": items}
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
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError):
        raise NotPlain("the message is no value") from None


def _pairs(body: Any, handle: Any) -> dict[Any, Any]:
    return {_decode(key, handle): _decode(value, handle) for key, value in body}


def _items(kind: type) -> Callable[[Any, Any], Any]:
    return lambda body, handle: kind([_decode(item, handle) for item in body])


def _deque(body: Any, handle: Any) -> deque[Any]:
    items, maxlen = body
    return deque([_decode(item, handle) for item in items], maxlen)


def _standard(tag: str) -> Callable[[Any, Any], Any]:
    _, _, make, kinds = _STANDARD[tag]

    def decode_parts(body: Any, _: Any) -> Any:
        parts = [_decode(part, None) for part in body]
        if not all(type(part) in kinds for part in parts):
            raise TypeError
        return make(*parts)

    return decode_parts


_TAGS: dict[str, Callable[[Any, Any], Any]] = {
    "i": lambda body, _: int(body, 16),
    "f": lambda body, _: float(body),
    "b": lambda body, _: bytes.fromhex(body),
    "c": lambda body, _: complex(*(float(_decode(part, None)) for part in body)),
    "d": _pairs,
    "t": _items(tuple),
    "s": _items(set),
    "z": _items(frozenset),
    "q": _deque,
    "g": lambda body, handle: iter([_decode(item, handle) for item in body]),
} | {tag: _standard(tag) for tag in _STANDARD}


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
