"""Reads a scalar expression in LaTeX or plain text as a tree, and evaluates the tree at given values of its variables.

A reader of our own, because an answer has to be read strictly: all of it or nothing, no guess at what a half-read text may mean.
What is no scalar expression (words, tuples, equations, calculus) raises Unreadable, and whoever asks must then not know.
Nothing here runs text as code, and a number too large to handle (9^9^9^9) is refused before it is computed.

    number  variable  + - * /  implicit product  ^  !  |x|  \\frac  \\sqrt  \\binom  functions  degrees inside functions  mixed
    numbers
"""

import re
from collections.abc import Mapping
from typing import Any

import mpmath

LARGEST_EXPONENT = 100_000
LARGEST_MAGNITUDE = 100_000
"""Bits of a value; beyond, it is refused."""
LARGEST_ARGUMENT = 64
"""Bits of what sin, exp and the like are asked of; mpmath would write the powers out."""

Tree = tuple[Any, ...]
"""("number", text), ("variable", name), ("pi",), …, or (operation, Tree, …)."""


class Unreadable(ValueError):
    """The text is no scalar expression that this module knows."""


_TOKEN = re.compile(
    r"\s*(\d+(?:\.\d+)?[eE][-+]?\d{1,3}(?!\d)|(?:[1-9]\d{0,2}(?:,\d{3})+(?![\d,])|\d+)?\.\d+|[1-9]\d{0,2}(?:,\d{3})+(?![\d,])|\d+|\\[a-zA-Z]+|[^\W\d_]|\*\*|[-+*/^_(){}\[\]|!°×÷·√])"
)
_FUNCTIONS = frozenset("sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln exp".split())
_NAMES = re.compile(r"(?<![\\a-zA-Z])(arcsin|arccos|arctan|sinh|cosh|tanh|sin|cos|tan|cot|sec|csc|log|ln|exp|sqrt|pi)(?![a-zA-Z])")
_GREEK = frozenset("alpha beta gamma delta epsilon theta lambda mu nu omega phi psi rho sigma tau".split())
_TIMES = frozenset({r"\cdot", r"\times", "*", "×", "·"})
_OVER = frozenset({r"\div", "/", "÷"})
_ENDS = frozenset({None, "+", "-", ")", "}", "]", "|"}) | _TIMES | _OVER


def read(text: str) -> Tree:
    """The tree of a text that is one scalar expression; raises Unreadable."""
    if re.search(r"(?<![\\a-zA-Z])(?<!_\{)[a-zA-Z]{3,}", _NAMES.sub("", re.sub(r"\\[a-zA-Z]+", "", text))):
        raise Unreadable("holds words")
    text = _NAMES.sub(r"\\\1 ", text).replace("π", r"\pi ").replace("∞", r"\infty ")
    tokens, place = [], 0
    while place < len(text.rstrip()):
        found = _TOKEN.match(text, place)
        if found is None:
            raise Unreadable(f"'{text[place]}' is not known")
        tokens.append(found[1].replace(",", ""))
        place = found.end()
    reader = _Reader(tokens)
    try:
        tree = reader.sum()
    except RecursionError:
        raise Unreadable("nested too deep") from None
    if reader.next is not None:
        raise Unreadable(f"'{reader.next}' is left over")
    return tree


def variables(tree: Tree) -> set[str]:
    """The names of the variables in a tree."""
    if tree[0] == "variable":
        return {tree[1]}
    return set().union(*(variables(part) for part in tree[1:] if isinstance(part, tuple)))


class _Reader:
    """Recursive descent over the tokens."""

    def __init__(self, tokens: list[str]) -> None:
        self._tokens, self._place = tokens, 0
        self._in_function = 0
        self._bars = 0

    @property
    def next(self) -> str | None:
        return self._tokens[self._place] if self._place < len(self._tokens) else None

    def take(self, expected: str | None = None) -> str:
        token = self.next
        if token is None or (expected is not None and token != expected):
            raise Unreadable(f"{expected or 'more'} is missing")
        self._place += 1
        return token

    def sum(self) -> Tree:
        tree = self.product()
        while self.next in ("+", "-"):
            tree = (self.take(), tree, self.product())
        return tree

    def product(self) -> Tree:
        tree = self.signed()
        while True:
            if self.next in _TIMES:
                self.take()
                tree = ("*", tree, self.signed())
            elif self.next in _OVER:
                self.take()
                tree = ("/", tree, self.signed())
            elif self._at_factor():
                tree = self._joined(tree, self.power())
            else:
                return tree

    def _at_factor(self) -> bool:
        return self.next not in _ENDS or (self.next == "|" and not self._bars)

    def _joined(self, left: Tree, right: Tree) -> Tree:
        if right[0] == left[0] == "number":
            raise Unreadable("two numbers side by side")
        if left[0] == "number" and left[1].isdigit() and right[0] == "fraction":
            top, bottom = right[1:]
            if top[0] == bottom[0] == "number" and top[1].isdigit() and bottom[1].isdigit() and int(top[1]) < int(bottom[1]):
                return ("+", left, right)  # a mixed number
        return ("*", left, right)

    def signed(self) -> Tree:
        if self.next in ("+", "-"):
            sign = self.take()
            inner = self.signed()
            # -2\frac{1}{3} is -(2 + 1/3), so the sign reaches over what is joined to it
            while self._at_factor():
                inner = self._joined(inner, self.power())
            return ("negative", inner) if sign == "-" else inner
        return self.power()

    def power(self) -> Tree:
        base = self.atom()
        while self.next in ("!", "°"):
            mark = self.take()
            if mark == "!":
                base = ("factorial", base)
            elif self._in_function:
                base = ("degrees", base)
        if self.next in ("^", "**"):
            self.take()
            return ("^", base, self._script())
        return base

    def _script(self) -> Tree:
        """An exponent or argument: a group in braces, or one token."""
        if self.next == "{":
            return self._group("{", "}")
        if self.next == "-":
            self.take()
            return ("negative", self._script())
        token = self.next
        if token is not None and token[0].isdigit() and len(token) > 1 and self._tokens[self._place - 1] != "^":
            # \frac12 and \sqrt23 take one digit each
            self._tokens[self._place : self._place + 1] = list(token) if token.isdigit() else [token]
        return self.power() if self._tokens[self._place - 1] in ("^", "**") else self.atom()

    def _group(self, left: str, right: str) -> Tree:
        self.take(left)
        bars, self._bars = self._bars, 0
        tree = self.sum()
        self._bars = bars
        self.take(right)
        return tree

    def atom(self) -> Tree:
        token = self.next
        if token is None:
            raise Unreadable("more is missing")
        if token in "({[":
            return self._group(token, {"(": ")", "{": "}", "[": "]"}[token])
        self.take()
        if token[0].isdigit() or token[0] == ".":
            if self.next == "_":
                raise Unreadable("a number in another base")
            return ("number", token)
        if token == "|":
            self._bars += 1
            tree = self.sum()
            self._bars -= 1
            self.take("|")
            return ("abs", tree)
        return self._command(token.removeprefix("\\"), len(token) > 1) if token[0].isalpha() or len(token) > 1 else self._root(token)

    def _root(self, token: str) -> Tree:
        if token != "√":
            raise Unreadable(f"'{token}' begins nothing")
        return ("root", self._script(), ("number", "2"))

    def _command(self, name: str, is_command: bool) -> Tree:
        if not is_command or name in _GREEK:
            return self._variable(name)
        if name in ("pi", "infty"):
            return (name,)
        if name in ("frac", "binom"):
            return ("fraction" if name == "frac" else "binomial", self._script(), self._script())
        if name == "sqrt":
            degree = self._group("[", "]") if self.next == "[" else ("number", "2")
            return ("root", self._script() if self.next != "(" else self._group("(", ")"), degree)
        if name in _FUNCTIONS:
            return self._function(name)
        raise Unreadable(f"\\{name} is not known")

    def _variable(self, name: str) -> Tree:
        if self.next == "_":
            self.take()
            if self.next == "{":
                self.take()
                while self.next not in ("}", None):
                    name += self.take()
                self.take("}")
            else:
                name += self.take()
        return ("variable", name) if name not in ("e", "i") else (name,)

    def _function(self, name: str) -> Tree:
        base = None
        if self.next == "_":
            self.take()
            base = self._script()
        exponent = None
        if self.next == "^":
            self.take()
            exponent = self._script()
            if exponent[0] == "negative":
                raise Unreadable("an inverse or a power, who knows")
        self._in_function += 1
        argument = self.power()
        if self._tokens[self._place - 1] != ")":
            while self._at_factor() and self.next.removeprefix("\\") not in _FUNCTIONS:  # type: ignore[union-attr]
                argument = self._joined(argument, self.power())
        self._in_function -= 1
        tree: Tree = (name, argument) if base is None else ("log", argument, base)
        return tree if exponent is None else ("^", tree, exponent)


# --- values -----------------------------------------------------------------------------------------------------------


def value(tree: Tree, values: Mapping[str, Any]) -> Any:
    """The value (mpf or mpc, at mpmath's precision) where its variables have these values; Unreadable if it has none."""
    try:
        result = _value(tree, values)
    except (ZeroDivisionError, ValueError, OverflowError, TypeError, mpmath.libmp.NoConvergence) as error:
        raise Unreadable(f"has no value: {error}") from None
    if not mpmath.isfinite(result) and tree != ("infty",) and tree != ("negative", ("infty",)):
        raise Unreadable("not finite")
    return result


def _value(tree: Tree, values: Mapping[str, Any]) -> Any:
    kind, *parts = tree
    if kind == "number":
        return mpmath.mpf(parts[0])
    if kind == "variable":
        return values[parts[0]]
    if not parts:
        return {"pi": mpmath.pi, "e": mpmath.e, "i": mpmath.j, "infty": mpmath.inf}[kind] * 1
    inner = [_value(part, values) for part in parts]
    for one in inner:
        if mpmath.isfinite(one) and mpmath.mag(one) > LARGEST_MAGNITUDE:
            raise ValueError("too large")
    return _OPERATIONS[kind](*inner)


def _power(base: Any, exponent: Any) -> Any:
    if abs(exponent) > LARGEST_EXPONENT:
        raise ValueError("an exponent too large to compute")
    return mpmath.power(base, exponent)


def _bounded(function: Any) -> Any:
    def bounded(argument: Any) -> Any:
        if mpmath.mag(argument) > LARGEST_ARGUMENT:
            raise ValueError("an argument too large to compute")
        return function(argument)

    return bounded


def _factorial(number: Any) -> Any:
    if not mpmath.isint(number) or not 0 <= number <= LARGEST_EXPONENT:
        raise ValueError("a factorial of no small natural number")
    return mpmath.factorial(number)


def _binomial(top: Any, bottom: Any) -> Any:
    if not (mpmath.isint(top) and mpmath.isint(bottom) and 0 <= bottom <= top <= LARGEST_EXPONENT):
        raise ValueError("a binomial of no small natural numbers")
    return mpmath.binomial(top, bottom)


def _root(inner: Any, degree: Any) -> Any:
    if mpmath.im(inner) == 0 and mpmath.re(inner) < 0 and mpmath.isint(degree) and int(degree) % 2:
        return -mpmath.root(-inner, int(degree))  # the real cube root, not the principal one
    return mpmath.power(inner, 1 / mpmath.mpf(degree))


_OPERATIONS: dict[str, Any] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a / b,
    "fraction": lambda a, b: a / b,
    "binomial": _binomial,
    "negative": lambda a: -a,
    "^": _power,
    "factorial": _factorial,
    "degrees": lambda a: a * mpmath.pi / 180,
    "abs": abs,
    "root": _root,
    "log": lambda a, base=10: mpmath.log(a, base),
    "ln": mpmath.log,
    **{name: _bounded(getattr(mpmath, name)) for name in "sin cos tan cot sec csc sinh cosh tanh exp".split()},
    "arcsin": mpmath.asin,
    "arccos": mpmath.acos,
    "arctan": mpmath.atan,
}
