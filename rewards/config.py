"""The `rewards` section of a recipe. Every name in it is checked when the recipe is read, before anything heavy is imported.

A part is a reward function with its weight; a gate (`requires`) is one that must pass for a part to count. Functions come from the
registry or from plugins. What the format names and this version lacks is refused by name, never ignored.
"""

import difflib
from collections.abc import Iterator
from typing import Any

from pydantic import Field, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic_core import InitErrorDetails

from data.recipe import Place, Section, nearest
from rewards.plugins import Plugin, find_plugin
from rewards.registry import BUILTINS, LATER

_LATER = "is a name of the recipe format, but this version does not have it yet"


def refuse_later(value: Any, info: ValidationInfo) -> Any:
    """Refuses a key of the recipe format whose work this version does not have."""
    if value is not None:
        raise ValueError(f"'{info.field_name}' {_LATER}")
    return value


class PartConfig(Section):
    name: str
    """A reward function: one that comes with Cohort, or one that `plugins` brings."""
    weight: float = Field(1.0, allow_inf_nan=False)
    """Factor in the weighted sum; 0 scores and logs the part and leaves it out."""
    requires: str | None = None
    """A gate: the reward function that must give 1 or more for this part to count; below, the part counts 0."""
    timeout_s: float = Field(30.0, gt=0.0, allow_inf_nan=False)
    """Seconds that one call, of one group, may take; then its process is killed and its completions get a failed Score."""
    options: dict[str, Any] = {}
    """Keyword arguments for the function, beside the columns; they win over a column of the same name."""
    env: list[str] = []
    """Environment variables that the function may see (an API key, say), by name; it sees no others but PATH, HOME and the like."""
    clip: Any = None
    """Reserved: bounds of the part's value."""

    @field_validator("clip", mode="before")
    @classmethod
    def _reserved(cls, value: Any, info: ValidationInfo) -> Any:
        return refuse_later(value, info)


class RewardsConfig(Section):
    plugins: list[str] = []
    """Reward functions from outside: `./file.py:function`, `package.module:function`, or an entry point of `cohort.rewards`."""
    parts: list[PartConfig] = Field(min_length=1)
    """What a Score is the weighted sum of."""
    max_error_rate: float = Field(0.2, ge=0.0, le=1.0)
    """A run stops with a message when a larger share of a step's scores failed."""
    workers: int | None = Field(None, ge=1)
    """Processes for the functions that come with Cohort, and as many for each plugin source; null: the CPUs, at most 4."""
    memory_mb: int = Field(4096, ge=0)
    """Memory that a worker process may take, in MiB, beyond which it gets a MemoryError (Linux); 0: no limit."""
    normalize: Any = None
    """Reserved: normalisation of each part within its group before summing."""
    route: Any = None
    """Reserved: parts chosen by a column."""
    shadow: Any = None
    """Reserved: a reward that is scored and logged, never trained on."""

    @field_validator("normalize", "route", "shadow", mode="before")
    @classmethod
    def _reserved(cls, value: Any, info: ValidationInfo) -> Any:
        return refuse_later(value, info)

    @model_validator(mode="after")
    def _names(self) -> "RewardsConfig":
        mistakes = [
            InitErrorDetails(type="value_error", loc=place, input=value, ctx={"error": ValueError(message)})
            for place, value, message in self._mistakes()
        ]
        if mistakes:
            raise ValidationError.from_exception_data("RewardsConfig", mistakes)
        return self

    def functions(self) -> dict[str, Plugin]:
        """Where each reward function of the recipe lives, parts first, then gates, by name."""
        known = {name: Plugin(name, builtin.module, name) for name, builtin in BUILTINS.items()}
        known |= {plugin.name: plugin for plugin in map(find_plugin, self.plugins)}
        names = [part.name for part in self.parts] + [part.requires for part in self.parts if part.requires]
        return {name: known[name] for name in names}

    def part(self, name: str) -> PartConfig:
        """How a function is called; a gate that is no part is called with the defaults."""
        return next((part for part in self.parts if part.name == name), PartConfig(name=name))

    def _mistakes(self) -> Iterator[tuple[Place, Any, str]]:
        known = set(BUILTINS)
        for index, text in enumerate(self.plugins):
            try:
                name = find_plugin(text).name
            except ValueError as error:
                yield ("plugins", index), text, str(error)
                name = text.rpartition(":")[2]  # so that the parts that use it are not called unknown as well
            if name in known:
                taken = "comes with Cohort" if name in BUILTINS else "stands twice"
                yield ("plugins", index), text, f"the name '{name}' {taken}; give the function another"
            known.add(name)
        seen: set[str] = set()
        for index, part in enumerate(self.parts):
            for key, value in (("name", part.name), ("requires", part.requires)):
                if value is not None and value not in known:
                    yield ("parts", index, key), value, _unknown(value, known)
            if part.name in seen:
                yield ("parts", index, "name"), part.name, f"'{part.name}' stands twice; a part is scored once"
            seen.add(part.name)
            if part.requires == part.name:
                yield ("parts", index, "requires"), part.name, f"'{part.name}' cannot be its own gate"
            if part.name in BUILTINS:
                allowed = BUILTINS[part.name].options
                for option in sorted(set(part.options) - set(allowed)):
                    message = f"{part.name} has no option '{option}'{nearest(option, allowed)}"
                    yield ("parts", index, "options", option), option, message
        if not any(part.weight for part in self.parts):
            yield ("parts",), 0, "every part has weight 0, so nothing would be judged"


def _unknown(name: str, known: set[str]) -> str:
    if name in LATER:
        return f"'{name}' {_LATER}"
    # 'mth' is nearer to 'math' than to 'math_answer'.
    first_words = {full.partition("_")[0]: full for full in sorted(known, reverse=True)}
    near = difflib.get_close_matches(name, [*known, *first_words], n=1, cutoff=0.55)
    meant = f"; did you mean '{first_words.get(near[0], near[0])}'?" if near else nearest(name, sorted(known))
    return f"no reward named '{name}'{meant}"
