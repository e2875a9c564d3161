"""The asserts' side of a program in another process: names of the program as plain values, or as proxies that call it.

A proxy can be called, asked for an attribute and handed back as an argument; compared, tested for truth or iterated it raises, since
the answer would be the program's. What comes back is a plain value of exact builtin types. Builtins are never the program's, or a
program with an `abs` of its own would judge itself.
"""

import ast
import builtins
from collections.abc import Iterable
from typing import Any

from rewards.sandbox.values import Link, NotPlain, decode, encode

_LOOP_ENDS = (StopIteration, StopAsyncIteration)
"""Raised by a program, they would end a loop of its asserts as if all were well."""


class Refused(Exception):
    """The asserts hand the program what cannot cross: they are unfit, not the program."""


class ProgramEnded(BaseException):
    """The program is gone. Not an Exception, so that no `except` of the asserts takes it for one of the program's."""


class ProgramError(Exception):
    """The program raised something that is no builtin exception."""


class Program:
    """A program in another process. Its replies must carry the nonce and the request's number."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._nonce = ""
        self._asked = 0

    def expect(self, nonce: str) -> None:
        self._nonce = nonce

    def names(self, wanted: Iterable[str]) -> dict[str, Any]:
        """What the program defines of these names; ProgramEnded if it has ended."""
        found = self._ask({"names": list(wanted)})
        if not isinstance(found, dict):
            raise NotPlain("the message is no value")
        return {name: decode(found[name], self.proxy) for name in wanted if name in found}

    def proxy(self, number: int) -> "Proxy":
        return Proxy(self, number)

    def get(self, number: int, name: str) -> Any:
        return decode(self._ask({"of": number, "get": name}), self.proxy)

    def call(self, number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            sent = {"args": encode(list(args), proxy_number), "kwargs": encode(kwargs, proxy_number)}
        except NotPlain as error:
            raise Refused(f"the asserts hand the program an argument that cannot cross: {error}") from None
        return decode(self._ask({"of": number, **sent}), self.proxy)

    def _ask(self, request: dict[str, Any]) -> Any:
        self._asked += 1
        try:
            self._link.send(request | {"id": self._asked})
            reply = self._link.receive()
        except (EOFError, OSError):
            raise ProgramEnded from None
        if not isinstance(reply, dict) or reply.get("nonce") != self._nonce or reply.get("id") != self._asked:
            raise NotPlain("it wrote what is no reply on its channel")
        if "raised" in reply:
            raise _exception(reply["raised"])
        return reply.get("value")


class Proxy:
    """Something of the program that is not plain: a function, a class, an object."""

    __slots__ = ("_number", "_program")

    def __init__(self, program: Program, number: int) -> None:
        self._program = program
        self._number = number

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._program.call(self._number, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._program.get(self._number, name)

    def _not_plain(self, *_: Any) -> Any:
        raise NotPlain("it gave an object of its own where the asserts use a plain value")

    __bool__ = __len__ = __iter__ = __contains__ = __getitem__ = __hash__ = _not_plain
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _not_plain
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __int__ = __float__ = __index__ = __str__ = __repr__ = _not_plain


def proxy_number(value: Any) -> int | None:
    return value._number if type(value) is Proxy else None


def plain_names(text: str, declared: Iterable[str]) -> list[str]:
    """Names that the asserts may take from the program: those they read, without builtins unless `declared` has them."""
    read = {node.id for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    return sorted((read - set(dir(builtins)) - {"__name__"}) | set(declared))


def _exception(raised: Any) -> Exception:
    """The builtin exception of that name, so that asserts about exceptions work; of other classes only the text."""
    if not isinstance(raised, list) or [type(part) for part in raised] != [str, str]:
        return NotPlain("it wrote what is no reply on its channel")
    name, said = raised
    kind = vars(builtins).get(name)
    if isinstance(kind, type) and issubclass(kind, Exception) and not issubclass(kind, _LOOP_ENDS):
        try:
            return kind(said)
        except TypeError:
            pass  # UnicodeDecodeError takes five arguments
    return ProgramError(f"{name}: {said}")
