"""Reward functions from outside: a file (`./my_rewards.py:brevity`), an import path (`pkg.mod:brevity`), or an installed entry
point of the group `cohort.rewards` (its name alone).

A recipe is checked without running any of its code: the source is found and parsed, and must bind the function's name. The true
import happens in the worker process, where a plugin that raises or hangs costs nothing but itself.
"""

import ast
from dataclasses import dataclass
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import entry_points
from pathlib import Path

from data.recipe import nearest

ENTRY_POINTS = "cohort.rewards"
CONVERSATIONS = "cohort.conversations"
"""Entry points of the functions that `rollout.conversation` may name, which are found in the same way."""


@dataclass(frozen=True)
class Plugin:
    """Where a reward function from outside lives."""

    name: str
    """What the recipe's parts call it: the function's name, or the entry point's."""
    source: str
    """A path that ends in .py, or an import path."""
    function: str
    """Its name in the source."""


class ModuleMissing(ValueError):
    """A module that is not there."""


def find_plugin(text: str, group: str = ENTRY_POINTS) -> Plugin:
    """The plugin that a recipe names; raises ValueError with one line if it is not there or does not bind that function."""
    source, colon, function = text.rpartition(":")
    if colon:
        plugin = Plugin(function, source, function)
    else:
        found = {point.name: point for point in entry_points(group=group)}
        if text not in found:
            if text.endswith(".py"):
                raise ValueError(f"'{text}' names a file; name the function in it as well, {text}:FUNCTION")
            way_out = "a plugin is ./file.py:function, package.module:function, or an installed entry point"
            raise ValueError(f"no entry point '{text}' in the group {group}{nearest(text, list(found))} ({way_out})")
        source, _, function = found[text].value.partition(":")
        plugin = Plugin(text, source, function)
    tree = _parsed(find_source(plugin.source))
    names = _names_bound(tree)
    if plugin.function not in names and "*" not in names:
        raise ValueError(f"{plugin.source} has no function '{plugin.function}'{nearest(plugin.function, names)}")
    written = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == plugin.function]
    is_final = len(written) == 1 and names.count(plugin.function) == 1 and not written[0].decorator_list
    if group == ENTRY_POINTS and is_final and written[0].args.kwarg is None:
        contract = f"{plugin.function}(prompts, completions, completion_ids, **columns)"
        raise ValueError(f"{plugin.source}:{written[0].lineno}: {plugin.function} takes no **kwargs; the contract is {contract}")
    return plugin


def find_source(source: str) -> Path:
    """The file of a plugin's module; parent packages are found, not imported."""
    if source.endswith(".py"):
        if not Path(source).is_file():
            raise ValueError(f"no file '{source}' (paths are relative to the working folder, {Path.cwd()})")
        return Path(source)
    spec: ModuleSpec | None = None
    where: list[str] | None = None
    for name in source.split("."):
        spec = PathFinder.find_spec(name, where)
        if spec is None:
            raise ModuleMissing(f"no module '{source}' ('{name}' is not found; is it installed, or missing from PYTHONPATH?)")
        where = list(spec.submodule_search_locations or [])
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        raise ValueError(f"module '{source}' has no Python source; a plugin is a .py module")
    return Path(spec.origin)


def _parsed(path: Path) -> ast.Module:
    try:
        return ast.parse(path.read_bytes(), filename=str(path))
    except SyntaxError as error:
        raise ValueError(f"{path}:{error.lineno}: not valid Python: {error.msg}") from None


def _names_bound(tree: ast.Module) -> list[str]:
    """The names that a module's top level binds; '*' if it imports everything from somewhere."""
    names = []
    for node in tree.body:
        for inner in [node] if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) else ast.walk(node):
            if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                names.append(inner.name)
            elif isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store):
                names.append(inner.id)
            elif isinstance(inner, ast.alias):
                names.append((inner.asname or inner.name).split(".")[0])
    return names
