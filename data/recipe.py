"""Recipes: one YAML file, typed and strict, with `section.key=value` overrides from the command line.

There is no inheritance and no interpolation: what the file says is what runs. YAML is read by its 1.2 rules, so that `no` is a
word, `1e-4` is a number and a key that stands twice is a mistake. The reader is generic; each package owns the models of its
sections (`rl/config.py`, `rewards/config.py`, …) and gives this module the model of the whole recipe.

Every mistake becomes one line with file, line, place, value and the nearest name, before anything heavy is imported:

    recipes/x.yaml:14: rewards.parts[0].name: no reward named 'mth'; did you mean 'math_answer'?
"""

import difflib
import json
import re
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import pydantic
import yaml


class InputError(ValueError):
    """What a user wrote or gave is wrong. The message is one line that names the thing, the value and the way out."""


class Section(pydantic.BaseModel):
    """A section of a recipe: unknown keys and wrong types are errors; the string under a field is its help text."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True)


RecipeT = TypeVar("RecipeT", bound=Section)
Place = tuple[str | int, ...]


def read_recipe(path: str | Path, overrides: Sequence[str], model: type[RecipeT]) -> RecipeT:
    """Reads, overrides and validates a recipe; raises InputError with a line for each mistake."""
    root, lines = _read_yaml(Path(path))
    origin = {place: f"{path}:{line}" for place, line in lines.items()}
    for override in overrides:
        _apply(root, override, origin)
    _check_read(overrides, model)
    return parse(root, model, str(path), origin)


def from_overrides(overrides: Sequence[str], model: type[RecipeT]) -> RecipeT:
    """The same of overrides alone, for a command that needs no file."""
    root: dict[str, Any] = {}
    origin: dict[Place, str] = {}
    for override in overrides:
        _apply(root, override, origin)
    _check_read(overrides, model)
    return parse(root, model, "command line", origin)


def parse(values: Any, model: type[RecipeT], source: str, origin: dict[Place, str] | None = None) -> RecipeT:
    """Validates plain values against a model; `source` (or `origin`, by place) stands at the head of each mistake's line."""
    try:
        # The JSON mode of strictness takes a list for a tuple and a string for a path, and still no "60" for 60.
        return model.model_validate_json(json.dumps(values), strict=True)
    except pydantic.ValidationError as error:
        raise InputError("\n".join(_describe(error, values, model, source, origin or {}))) from None


def _check_read(overrides: Sequence[str], model: type[Section]) -> None:
    """InputError for an override of a section that a command which reads some of a recipe does not read."""
    sections = list(model.model_fields)
    for override in overrides:
        section = re.split(r"[.=\[]", override, maxsplit=1)[0]
        if model.model_config.get("extra") == "ignore" and section not in sections:
            raise InputError(f"override '{override}': this command reads {' and '.join(sections)} alone; write {sections[0]}.key=value")


def resolved_yaml(recipe: Section) -> str:
    """The recipe with every default filled in, as YAML that reads back as the same recipe."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, width=120, allow_unicode=True)


def nearest(word: str, names: Sequence[str]) -> str:
    """`; did you mean 'x'?` for the nearest name, or the list of names if none is near."""
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.55)
    if close:
        return f"; did you mean '{close[0]}'?"
    return f"; known: {', '.join(sorted(names))}" if names else ""


# --- YAML -------------------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """SafeLoader by the rules of YAML 1.2's core schema."""

    yaml_implicit_resolvers: dict = {}


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", list("-+.0123456789")),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))
_Loader.add_constructor("tag:yaml.org,2002:float", lambda loader, node: float(node.value))


def _read_yaml(path: Path) -> tuple[dict[str, Any], dict[Place, int]]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot read this recipe: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text: {error.reason} at byte {error.start}") from None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        lines: dict[Place, int] = {}
        _walk(node, (), lines, path)
        values = loader.construct_document(node) if node is not None else None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 0
        raise InputError(f"{path}:{line}: not valid YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: a recipe is a mapping of sections, this file holds {type(values).__name__}")
    return values, lines


def _walk(node: yaml.Node | None, place: Place, lines: dict[Place, int], path: Path, around: tuple[yaml.Node, ...] = ()) -> None:
    """Notes the line of every place; refuses a key that stands twice or is no text, and an alias of what is around it."""
    if node is None:
        return
    lines.setdefault(place, node.start_mark.line + 1)
    if any(node is outer for outer in around):
        raise InputError(f"{path}:{node.start_mark.line + 1}: {_name(place)}: holds itself; write out what is meant")
    around = (*around, node)
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            where = f"{path}:{key.start_mark.line + 1}"
            if key.tag != "tag:yaml.org,2002:str":
                shown = key.value if isinstance(key, yaml.ScalarNode) else "a list or mapping"
                raise InputError(f"{where}: {_name(place)}{': ' if place else ''}a key is text, not {shown}; quote it if it is meant")
            inner = (*place, key.value)
            if inner in lines:
                raise InputError(f"{where}: {_name(inner)}: stands twice, first in line {lines[inner]}")
            lines[inner] = key.start_mark.line + 1
            _walk(value, inner, lines, path, around)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            _walk(value, (*place, index), lines, path, around)


def _apply(root: dict[str, Any], override: str, origin: dict[Place, str]) -> None:
    """Sets one `section.key=value` in place; the value is YAML, `parts[0].weight` reaches into a list."""
    source = f"override '{override}'"
    key, equals, text = override.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z_]\w*(\[\d+\])*(\.[A-Za-z_]\w*(\[\d+\])*)*", key):
        raise InputError(f"{source}: an override is section.key=value")
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise InputError(f"{source}: the value is not valid YAML: {' '.join(str(error).split())}") from None
    place: Place = tuple(int(part) if part.isdigit() else part for part in re.findall(r"\w+", key))
    here: Any = root
    for depth, (part, after) in enumerate(zip(place[:-1], place[1:], strict=True), start=1):
        here = _step(here, part, source, {} if isinstance(after, str) else None)
        origin.setdefault(place[:depth], source)  # a section that only the override has
    last = place[-1]
    _step(here, last, source, value)
    here[last] = value
    origin[place] = source
    for inner in [p for p in origin if p[: len(place)] == place and p != place]:
        del origin[inner]


def _step(here: Any, part: str | int, source: str, default: Any) -> Any:
    if isinstance(here, dict) and isinstance(part, str):
        if here.get(part) is None and default is not None:
            here[part] = default
        return here.get(part)
    if isinstance(here, list) and isinstance(part, int) and part < len(here):
        return here[part]
    what = f"a list of {len(here)}" if isinstance(here, list) else f"{here!r}"
    raise InputError(f"{source}: nothing to set at '{part}': the recipe has {what} there")


# --- mistakes ---------------------------------------------------------------------------------------------------------


def _describe(error: pydantic.ValidationError, values: Any, model: type[Section], source: str, origin: dict[Place, str]) -> list[str]:
    out: list[str] = []
    mistyped = set()
    items = sorted(error.errors(include_url=False), key=lambda item: item["type"] != "extra_forbidden")
    foreign = [str(item["loc"][0]) for item in items if item["type"] == "extra_forbidden" and len(item["loc"]) == 1]
    if len(foreign) > 1 and not any(difflib.get_close_matches(name, list(model.model_fields)) for name in foreign):
        sections = ", ".join(model.model_fields)
        return [f"{source}: has the sections {', '.join(foreign)}, and those here are {sections}: is it a recipe of another command?"]
    for item in items:
        place = _real_place(item["loc"], values, missing=item["type"] == "missing")
        if item["type"] == "extra_forbidden":
            mistyped.add(place[:-1])
        elif item["type"] == "missing" and place[:-1] in mistyped:
            continue  # the line of the mistyped key names this one
        where = next((origin[place[:n]] for n in range(len(place), -1, -1) if place[:n] in origin), source)
        name = f"{_name(place)}: " if place else ""
        line = f"{where}: {name}{_message(item, place, model)}"
        if line not in out:
            out.append(line)
    return out


def _message(item: Any, place: Place, model: type[Section]) -> str:
    kind, value = item["type"], item["input"]
    if kind == "extra_forbidden":
        siblings = _fields_at(model, place[:-1])
        return f"no such key{nearest(str(place[-1]), siblings)}"
    if kind == "missing":
        return "missing, and it has no default"
    if kind == "value_error":
        return str(item["ctx"]["error"])
    message = item["msg"].removeprefix("Input s")
    message = f"s{message}" if message != item["msg"] else message
    shown = json.dumps(value, ensure_ascii=False, default=str)
    near = ""
    if kind == "literal_error":
        near = nearest(str(value), re.findall(r"'([^']*)'", item["ctx"]["expected"]))
    return f"{shown if len(shown) <= 60 else shown[:57] + '…'} {message}{near if near.startswith('; did') else ''}"


def _real_place(loc: Place, values: Any, missing: bool) -> Place:
    """pydantic puts the names of union members into a place; keeps what the recipe really has."""
    place: list[str | int] = []
    here = values
    for index, part in enumerate(loc):
        inside = isinstance(here, dict) and part in here
        if inside or (isinstance(here, list) and isinstance(part, int) and part < len(here)):
            here = here[part]
            place.append(part)
        elif missing and index == len(loc) - 1:
            place.append(part)
    return tuple(place)


def _fields_at(model: Any, place: Place) -> list[str]:
    """The keys that a recipe may have at a place."""
    models = [model]
    for part in place:
        inner: list[Any] = []
        for candidate in models:
            if isinstance(part, int):
                inner.append(candidate)
            elif part in candidate.model_fields:
                inner += _models_in(candidate.model_fields[part].annotation)
        models = inner
    return sorted({name for candidate in models for name in candidate.model_fields})


def _models_in(annotation: Any) -> list[Any]:
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return [annotation] if issubclass(annotation, pydantic.BaseModel) else []
    return [model for argument in typing.get_args(annotation) for model in _models_in(argument)]


def _name(place: Place) -> str:
    name = ""
    for part in place:
        name += f"[{part}]" if isinstance(part, int) else f".{part}" if name else part
    return name
