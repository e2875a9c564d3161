"""The asserts' side of a program in another process: names of the program as plain values, or as proxies that ask it.

What crosses as a plain value says `rewards.sandbox.values`; everything else is held by the program, and the asserts have a proxy. What
they do with it is done by the program, and what comes back is its word, as whatever a function returns is: calls, attributes, length,
items, iteration, conversion to text and numbers, `isinstance` of its classes, `is`, and operators between its objects.

Its word is not taken for what would be the verdict itself. It never says that `==` holds or what is true: `==` is False where a plain
value meets an object without an equality of its own, and refused otherwise, as are `!=`, order, truth and hash, and calls that say
whether something holds, named as those of plain types (`startswith`). `in` looks through what it iterates over. A difference from a plain
value is refused too, since that may be what is expected (`abs(f() - 7) < 1e-6`); other operators with one must give an object of its own,
and what an operator gave is no number, nor text where a plain value took part. What is refused raises NotCarried: the limit is the judge's,
so the completion is unscored, and not wrong.

Builtins are never the program's, or a program with an `abs` of its own would judge itself; nor is `math` in `math.isclose(…)`, and the
like, where the asserts forgot to import it.
"""

import ast
import builtins
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from rewards.sandbox.values import Link, NotPlain, decode, encode

_LOOP_ENDS = (StopIteration, StopAsyncIteration)
"""Raised by a program, they would end a loop of its asserts as if all were well."""
_ONE_BY_ONE, _MOST_AHEAD = 8, 256
"""Items of an iterator are taken when they are asked for; after so many, as many ahead as were taken, up to so many."""
ARITHMETIC = ("add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "pow", "lshift", "rshift", "and", "or", "xor")
ORDER = ("lt", "le", "gt", "ge")
UNARY = ("len", "iter", "reversed", "str", "repr", "int", "float", "abs", "neg", "pos", "invert")
_COMPARE = {"sub", "isub"}
_NUMBERS, _TEXT = {"int", "float", "abs", "round"}, {"len", "str", "repr", "format"}
_MODULES = {"math", "cmath", "collections", "itertools", "functools", "operator", "re", "string", "statistics", "heapq", "bisect", "json"}
_HOLDS = {"startswith", "endswith", "issubset", "issuperset", "isdisjoint", *(name for name in dir(str) if name.startswith("is"))}
"""Methods of plain types that say whether something holds."""
_ABOUT = {"__name__", "__qualname__", "__module__", "__dict__", "__wrapped__", "__annotations__", "__cause__", "__context__"}
"""What asserts read of a function or a class; other such names are the business of Python's own machinery."""


class Refused(Exception):
    """The asserts hand the program what cannot cross: they are unfit, not the program."""


class NotCarried(BaseException):
    """The asserts use an object of the program in a way that its word cannot decide. No `except` of the asserts takes it."""


class ProgramEnded(BaseException):
    """The program is gone. Not an Exception, so that no `except` of the asserts takes it for one of the program's."""


class ProgramError(Exception):
    """The program raised what cannot be made anew here."""


@dataclass
class _Ahead:
    """Items that an iterator gave and the asserts have not taken."""

    items: deque[Any] = field(default_factory=deque)
    end: Any = None
    """After them: `stop`, or what it raised."""
    taken: int = 0


class Program:
    """A program in another process. Its replies must carry the nonce and the request's number."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._nonce = ""
        self._asked = 0
        self._ahead: dict[int, _Ahead] = {}
        self._reckoned: dict[int, bool] = {}
        """Objects that an operator gave, and whether a plain value took part."""
        self.raised: list[Exception] = []
        """What it raised itself."""
        self.flattened = False
        """It gave an instance of a subclass of list, dict or another plain type, of which the plain value alone crossed."""

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
        return decode(self._ask({"of": self._whole(number), "get": name}), self.proxy)

    def call(self, number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        sent = {"args": self._sent(list(args)), "kwargs": self._sent(kwargs)}
        return decode(self._ask({"of": self._whole(number), **sent}), self.proxy)

    def do(self, operation: str, *args: Any) -> Any:
        """What an operation of `rewards.sandbox.program.OPERATIONS` gives there."""
        alone = self._reckoned.get(args[0]._cohort_number) if args and isinstance(args[0], Proxy) else None
        if operation in ORDER or (alone is not None and operation in _NUMBERS) or (alone and operation in _TEXT):
            raise NotCarried(f"the asserts ask what only an object of its own could decide ({operation})")
        return decode(self._ask({"do": operation, "args": self._sent(list(args), NotCarried)}), self.proxy)

    def reckon(self, operation: str, left: Any, right: Any) -> Any:
        """An operator or a comparison of order; NotCarried where it may tell the program what is expected of it."""
        alone = not (isinstance(left, Proxy) and isinstance(right, Proxy))
        if alone and operation in _COMPARE:
            raise NotCarried(f"the asserts compare an object of its own with a plain value ({operation})")
        value = self.do(operation, left, right)
        if alone and not isinstance(value, Proxy):
            raise NotCarried(f"an operator between an object of its own and a plain value gave a plain value ({operation})")
        if isinstance(value, Proxy):
            self._reckoned[value._cohort_number] = alone or self._reckoned.get(value._cohort_number, False)
        return value

    def next(self, number: int) -> Any:
        ahead = self._ahead.setdefault(number, _Ahead())
        if not ahead.items and ahead.end is None:
            count = 1 if ahead.taken < _ONE_BY_ONE else min(ahead.taken, _MOST_AHEAD)
            reply = self._ask({"of": number, "next": count})
            if not isinstance(reply, dict) or reply.keys() != {"items", "end"} or not isinstance(reply["items"], list):
                raise NotPlain("the message is no value")
            ahead.items.extend(decode(reply["items"], self.proxy))
            ahead.end = reply["end"]
        if ahead.items:
            ahead.taken += 1
            return ahead.items.popleft()
        end, ahead.end = ahead.end, None
        if end == "stop":
            raise StopIteration
        raise self._exception(end)

    def _whole(self, number: int) -> int:
        """The number, if what it stands for is as far as the asserts believe."""
        if number in self._ahead and (self._ahead[number].items or self._ahead[number].end is not None):
            raise NotCarried("the asserts use an iterator of its own after items of it were taken ahead")
        return number

    def _sent(self, value: Any, limit: type[BaseException] = Refused) -> Any:
        try:
            return encode(value, lambda item: self._whole(item._cohort_number) if isinstance(item, Proxy) else None)
        except NotPlain as error:
            if "deep" in f"{error}":
                raise  # no text of asserts is: the program gave it
            raise limit(f"the asserts hand the program an argument that cannot cross: {error}") from None

    def _ask(self, request: dict[str, Any]) -> Any:
        self._asked += 1
        try:
            self._link.send(request | {"id": self._asked})
            reply = self._link.receive()
        except (EOFError, OSError):
            raise ProgramEnded from None
        if not isinstance(reply, dict) or reply.get("nonce") != self._nonce or reply.get("id") != self._asked:
            raise NotPlain("it wrote what is no reply on its channel")
        self.flattened = self.flattened or reply.get("flattened") is True
        if "raised" in reply:
            raise self._exception(reply["raised"])
        if "uncarried" in reply:
            raise NotCarried(f"it gave a value that cannot cross: {reply['uncarried']}"[:300])
        return reply.get("value")

    def _exception(self, raised: Any) -> Exception:
        error = _exception(raised)
        self.raised.append(error)
        return error


class Proxy:
    # Something of the program that is not plain: a function, a class, an object. (A docstring would be its `__doc__`.)

    __slots__ = ("_cohort_number", "_cohort_program")
    _cohort_number: int
    _cohort_program: Program
    __doc__ = property(lambda self: self._cohort_program.get(self._cohort_number, "__doc__"))

    def __init__(self, program: Program, number: int) -> None:
        object.__setattr__(self, "_cohort_program", program)
        object.__setattr__(self, "_cohort_number", number)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._cohort_program.call(self._cohort_number, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name.endswith("__") and name not in _ABOUT:
            raise AttributeError(name)
        if name in _HOLDS:
            raise NotCarried(f"the asserts ask an object of its own whether something holds ({name})")
        return self._cohort_program.get(self._cohort_number, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._cohort_program.do("setattr", self, name, value)

    def __delattr__(self, name: str) -> None:
        self._cohort_program.do("delattr", self, name)

    def __next__(self) -> Any:
        return self._cohort_program.next(self._cohort_number)

    def __getitem__(self, key: Any) -> Any:
        return self._cohort_program.do("getitem", self, key)

    def __setitem__(self, key: Any, value: Any) -> None:
        self._cohort_program.do("setitem", self, key, value)

    def __delitem__(self, key: Any) -> None:
        self._cohort_program.do("delitem", self, key)

    def __contains__(self, item: Any) -> bool:
        try:
            items = iter(self)
        except TypeError:
            raise NotCarried("the asserts ask an object of its own what is in it") from None
        return any(item is one or item == one for one in items)

    def __round__(self, *digits: Any) -> Any:
        return self._cohort_program.do("round", self, *digits)

    def __format__(self, spec: str) -> Any:
        return self._cohort_program.do("format", self, spec)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Proxy) or self._cohort_program.do("has_equality", self) is not False:
            self._refused()
        return False

    def _refused(self, *_: Any) -> Any:
        raise NotCarried("the asserts use an object of its own for `==`, `!=`, truth, a key or a copy")

    __ne__ = __bool__ = __hash__ = __index__ = __copy__ = __deepcopy__ = __reduce_ex__ = _refused


def _forward(operation: str) -> Callable[[Proxy], Any]:
    return lambda self: self._cohort_program.do(operation, self)


def _operator(operation: str, reflected: bool = False) -> Callable[[Proxy, Any], Any]:
    if reflected:
        return lambda self, other: self._cohort_program.reckon(operation, other, self)
    return lambda self, other: self._cohort_program.reckon(operation, self, other)


for _name in UNARY:
    setattr(Proxy, f"__{_name}__", _forward(_name))
for _name in (*ORDER, *ARITHMETIC):
    setattr(Proxy, f"__{_name}__", _operator(_name))
for _name in ARITHMETIC:
    setattr(Proxy, f"__r{_name}__", _operator(_name, reflected=True))
    setattr(Proxy, f"__i{_name}__", _operator(f"i{_name}"))


def plain_names(text: str, declared: Iterable[str]) -> list[str]:
    """Names that the asserts may take from the program: those they read, without builtins unless `declared` has them."""
    read = {node.id for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    return sorted((read - set(dir(builtins)) - {"__name__"} - modules(text, declared).keys()) | set(declared))


def modules(text: str, declared: Iterable[str]) -> dict[str, Any]:
    """Modules of the standard library that the asserts read something of, under names that they use for nothing else."""
    nodes = list(ast.walk(ast.parse(text)))
    of = {id(node.value) for node in nodes if isinstance(node, ast.Attribute)}
    otherwise = {node.id for node in nodes if isinstance(node, ast.Name) and id(node) not in of}
    read = {node.id for node in nodes if isinstance(node, ast.Name)}
    return {name: import_module(name) for name in (_MODULES & read) - otherwise - set(declared)}


def said(error: BaseException) -> str:
    """What an exception says, at most 300 characters; nothing is asked of an object of the program that it holds."""
    plain = [arg for arg in error.args if type(arg) in (str, int, float, bool)]
    return (str(error) if len(plain) == len(error.args) else " ".join(map(str, plain)))[:300]


def _exception(raised: Any) -> Exception:
    """The builtin exception of that name, so that asserts about exceptions work; of other classes one of that name and base."""
    if not isinstance(raised, list) or [type(part) for part in raised] != [str, str, str]:
        return NotPlain("it wrote what is no reply on its channel")
    name, base, said = raised[0][:200], raised[1], raised[2][:1000]
    kind = vars(builtins).get(base)
    if isinstance(kind, type) and issubclass(kind, Exception) and not issubclass(kind, _LOOP_ENDS) and name.isidentifier():
        try:
            return (kind if name == base else type(name, (kind,), {}))(said)
        except TypeError:
            pass  # UnicodeDecodeError takes five arguments
    return ProgramError(f"{name}: {said}")
