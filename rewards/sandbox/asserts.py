"""Trusted text of asserts, made ready to run about a program in another process.

It counts the asserts that passed, since text that asserts nothing proves nothing. `is`, `type(x)`, `x.__class__`, `isinstance` and
`issubclass`, which Python decides without asking the object, become calls of functions here, which ask the program where its objects
are meant.
"""

import ast
import types
from collections import deque
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

from rewards.sandbox.proxies import NotCarried, Program, Proxy, said
from rewards.sandbox.values import STANDARD

_PLAIN = (bool, int, float, complex, str, bytes, bytearray, list, tuple, dict, set, frozenset, types.NoneType, *STANDARD)
"""Their instances cross as plain values, so that no object which did not is one."""
_MUTABLE = (list, dict, set, bytearray, deque)
_PASSED, _SAME, _PREFIX = "__cohort_passed__", "__cohort_same__", "__cohort_{}__"
_ASKED = ("type", "isinstance", "issubclass")


def rewritten(text: str, declared: Collection[str]) -> Any:
    """The code of the asserts; `declared`: builtins that the program defines anew."""
    return compile(ast.fix_missing_locations(_Rewriter(set(_ASKED) - set(declared)).visit(ast.parse(text))), "asserts", "exec")


def helpers(passed: Callable[[], None], program: Program) -> dict[str, Any]:
    """The names that rewritten text needs."""
    asked = {"type": _type, "isinstance": partial(_isinstance, program), "issubclass": _issubclass}
    return {_PASSED: passed, _SAME: _same} | {_PREFIX.format(name): function for name, function in asked.items()}


def uncarried(error: Exception, program: Program) -> bool:
    """Whether what Python raised about the asserts comes of what a proxy or a plain value cannot be, and not of the program."""
    if any(error is raised for raised in program.raised):
        return False
    if isinstance(error, TypeError):
        # The second is `except` with a class of the program.
        text = said(error)
        return "Proxy" in text or ("catching classes" in text and any(error.__context__ is raised for raised in program.raised))
    return isinstance(error, AttributeError | KeyError) and program.flattened


class _Rewriter(ast.NodeTransformer):
    def __init__(self, asked: set[str]) -> None:
        self._asked = asked

    def visit_Assert(self, node: ast.Assert) -> list[ast.stmt]:
        self.generic_visit(node)
        return [node, ast.copy_location(ast.Expr(_call(_PASSED)), node)]

    def visit_Compare(self, node: ast.Compare) -> ast.expr:
        self.generic_visit(node)
        if len(node.ops) > 1 or not isinstance(node.ops[0], ast.Is | ast.IsNot):
            return node
        same = _call(_SAME, node.left, node.comparators[0])
        return ast.copy_location(same if isinstance(node.ops[0], ast.Is) else ast.UnaryOp(ast.Not(), same), node)

    def visit_Call(self, node: ast.Call) -> ast.expr:
        self.generic_visit(node)
        if isinstance(node.func, ast.Name) and node.func.id in self._asked:
            node.func = ast.copy_location(ast.Name(_PREFIX.format(node.func.id), ast.Load()), node.func)
        return node

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        self.generic_visit(node)
        if node.attr == "__class__" and isinstance(node.ctx, ast.Load):
            return ast.copy_location(_call(_PREFIX.format("type"), node.value), node)
        return node


def _call(name: str, *args: ast.expr) -> ast.Call:
    return ast.Call(ast.Name(name, ast.Load()), list(args), [])


def _same(left: Any, right: Any) -> bool:
    if isinstance(left, Proxy) and isinstance(right, Proxy):
        return left._cohort_number == right._cohort_number
    if left is not right and type(left) is type(right) and type(left) in _MUTABLE and left == right:
        raise NotCarried("the asserts ask whether two containers are one, and copies of both crossed")
    return left is right


def _type(*args: Any, **kwargs: Any) -> Any:
    if len(args) == 1 and isinstance(args[0], Proxy):
        return args[0]._cohort_program.do("type", args[0])
    return type(*args, **kwargs)


def _isinstance(program: Program, value: Any, kinds: Any) -> bool:
    for kind in _flat(kinds):
        if isinstance(kind, Proxy):
            found = kind._cohort_program.do("isinstance", value, kind) is True
        elif isinstance(value, Proxy) and kind is not object and kind not in _PLAIN:
            raise NotCarried(f"the asserts ask whether an object of its own is a '{kind}'")
        else:
            found = isinstance(value, kind)
        if found:
            return True
    if program.flattened and not isinstance(value, Proxy):
        raise NotCarried("the asserts ask for the class of a value of which the plain value alone crossed")
    return False


def _issubclass(value: Any, kinds: Any) -> bool:
    for kind in _flat(kinds):
        if isinstance(kind, Proxy):
            found = kind._cohort_program.do("issubclass", value, kind) is True
        elif isinstance(value, Proxy):
            raise NotCarried(f"the asserts ask whether a class of its own is a '{kind}'")
        else:
            found = issubclass(value, kind)
        if found:
            return True
    return False


def _flat(kinds: Any) -> list[Any]:
    return [kind for item in kinds for kind in _flat(item)] if isinstance(kinds, tuple) else [kinds]
