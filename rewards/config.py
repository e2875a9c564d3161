"""The `rewards` section of a recipe. Every name in it is checked when the recipe is read, before anything heavy is imported.

A part is a reward function with its weight; a gate (`requires`) is one that must pass for a part to count. Functions come from the
registry or from plugins; one function may stand twice, with different options, under an `alias`.
"""

import difflib
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator
from pydantic_core import InitErrorDetails

from data.recipe import Place, Section, nearest
from rewards.plugins import Plugin, find_plugin
from rewards.registry import BUILTINS, JUDGE_REQUEST_S

Bound = float | None
PLUGIN_TIMEOUT_S = 30.0


class PartConfig(Section):
    name: str
    """A reward function: one that comes with Cohort, or one that `plugins` brings."""
    weight: float = Field(1.0, allow_inf_nan=False)
    """Factor in the weighted sum; 0 scores and logs the part and leaves it out."""
    requires: str | None = None
    """A gate: the reward function that must give 1 or more for this part to count; below, the part counts 0."""
    timeout_s: float | None = Field(None, gt=0.0, allow_inf_nan=False)
    """Seconds that one call, of one group, may take; then its process is killed and its completions get a failed Score. null: 30, and
    600 for `judge`, which stops in time by itself and fails only the completions that still have no verdict."""
    options: dict[str, Any] = {}
    """Keyword arguments for the function, beside the columns; they win over a column of the same name."""
    env: list[str] = []
    """Environment variables that the function may see (an API key, say), by name. It sees no others but PATH, HOME and the like,
    CUDA_VISIBLE_DEVICES and CUDA_DEVICE_ORDER, HF_HOME, HF_HUB_CACHE and HF_HUB_OFFLINE, SSL_CERT_FILE, NO_PROXY, and HTTP_PROXY
    and HTTPS_PROXY if they have no user and password: one that has is to be named here."""
    alias: str | None = None
    """What the part is called in logs, gates and routes, where its function stands more than once; null: the function's name."""
    at_once: int = Field(8, ge=1)
    """Calls of an async function, each of one group, that run at once; a function that is not async has its worker alone."""
    clip: tuple[Bound, Bound] | None = None
    """Lower and upper bound of the part's value in the sum, either may be null; what is logged is the value itself."""

    @property
    def key(self) -> str:
        """What the part is called."""
        return self.alias or self.name

    @property
    def limit_s(self) -> float:
        """Seconds that one call may take."""
        if self.timeout_s is not None:
            return self.timeout_s
        return BUILTINS[self.name].timeout_s if self.name in BUILTINS else PLUGIN_TIMEOUT_S

    @property
    def variables(self) -> list[str]:
        """The environment variables that its function may see: those of `env`, and a judge's key."""
        key = self.options.get("key_env") if self.name == "judge" else None
        return [*self.env, *([key] if isinstance(key, str) else [])]


class ShadowConfig(PartConfig):
    weight: Literal[0] = 0
    """A shadow is never trained on."""
    requires: None = None
    """A shadow stands for itself."""


class RouteConfig(Section):
    column: str
    """The column of a row that chooses its parts."""
    parts: dict[str, list[str]] = Field(min_length=1)
    """By value of the column: the parts (by alias or name) that judge such a row. A part that stands in no list judges all rows."""

    def routed(self) -> set[str]:
        """The parts that judge some rows only."""
        return {name for names in self.parts.values() for name in names}


class RewardsConfig(Section):
    plugins: list[str] = []
    """Reward functions from outside: `./file.py:function`, `package.module:function`, or an entry point of `cohort.rewards`."""
    parts: list[PartConfig] = Field(min_length=1)
    """What a Score is the weighted sum of."""
    max_error_rate: float = Field(0.2, ge=0.0, le=1.0)
    """A run stops with a message when a larger share of a step's scores failed."""
    workers: int | None = Field(None, ge=1)
    """Processes for the functions that come with Cohort, and as many for each plugin source; null: the CPUs, at most 4. Where all
    functions of a source are async, as the judge is, it has one process."""
    memory_mb: int = Field(4096, ge=0)
    """Memory that a worker process may take, in MiB, beyond which it gets a MemoryError (Linux); 0: no limit."""
    normalize: Literal["none", "group"] = "none"
    """`group`: each part, after clip and gate, becomes (value - mean) / (std + 1e-4) within its group before the weighted sum, so
    that no part drowns another (GDPO, arXiv:2601.05242); the Score then compares siblings and says nothing by itself."""
    route: RouteConfig | None = None
    """Parts chosen by a column, as DeepSeek-V3 judges different domains by different rewards; null: all parts judge all rows."""
    shadow: list[ShadowConfig] = []
    """Rewards that are scored and logged, and never trained on; where one parts ways with the reward, the reward is being gamed.
    A shadow that fails fails no Score."""

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
        """Where each reward function of the recipe lives, by key: parts first, then shadows, then gates that are neither."""
        known = {name: Plugin(name, builtin.module, name) for name, builtin in BUILTINS.items()}
        known |= {plugin.name: plugin for plugin in map(find_plugin, self.plugins)}
        keys = {part.key: part.name for part in [*self.parts, *self.shadow]}
        return {key: known[name] for key, name in (keys | {gate: keys.get(gate, gate) for gate in self._gates()}).items()}

    def part(self, key: str) -> PartConfig:
        """How a function is called; a gate that is no part is called with the defaults."""
        return next((part for part in [*self.parts, *self.shadow] if part.key == key), PartConfig(name=key))

    def parts_for(self, columns: Mapping[str, Any]) -> list[PartConfig]:
        """The parts that judge a row; ValueError if its route is none of the recipe's."""
        if self.route is None:
            return self.parts
        value = columns.get(self.route.column)
        chosen = self.route.parts.get(str(value))
        if value is None or chosen is None:
            known = ", ".join(self.route.parts)
            raise ValueError(f"rewards.route: a row has {self.route.column} = {value!r:.60}, and routes are known for {known}")
        others = self.route.routed() - set(chosen)
        return [part for part in self.parts if part.key not in others]

    def _gates(self) -> list[str]:
        return [part.requires for part in self.parts if part.requires]

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
        keys = {part.key for part in self.parts}
        for place, part in self._places():
            if part.name not in known:
                yield (*place, "name"), part.name, _unknown(part.name, known)
            if part.requires is not None and part.requires not in known | keys:
                yield (*place, "requires"), part.requires, _unknown(part.requires, known | keys)
            if part.key in seen:
                message = f"'{part.key}' stands twice; a part is scored once, or give one an alias"
                yield (*place, "name"), part.name, message
            if part.alias in known:
                yield (*place, "alias"), part.alias, f"'{part.alias}' is a reward function; choose another alias"
            seen.add(part.key)
            if part.requires == part.key:
                yield (*place, "requires"), part.requires, f"'{part.key}' cannot be its own gate"
            if part.clip and None not in part.clip and part.clip[0] > part.clip[1]:  # type: ignore[operator]
                yield (*place, "clip"), part.clip, f"the lower bound {part.clip[0]:g} is above the upper bound {part.clip[1]:g}"
            yield from _options(place, part)
        yield from self._route_mistakes(keys)
        if not any(part.weight for part in self.parts):
            yield ("parts",), 0, "every part has weight 0, so nothing would be judged"

    def _places(self) -> Iterator[tuple[Place, PartConfig]]:
        for index, part in enumerate(self.parts):
            yield ("parts", index), part
        for index, shadow in enumerate(self.shadow):
            yield ("shadow", index), shadow

    def _route_mistakes(self, keys: set[str]) -> Iterator[tuple[Place, Any, str]]:
        for value, names in self.route.parts.items() if self.route else ():
            for index, name in enumerate(names):
                if name not in keys:
                    message = f"no part is called '{name}'{nearest(name, sorted(keys))}"
                    yield ("route", "parts", value, index), name, message
            row = {self.route.column: value}  # type: ignore[union-attr]
            if not any(part.weight for part in self.parts_for(row)):
                yield ("route", "parts", value), names, "no part with a weight would judge these rows"


def _options(place: Place, part: PartConfig) -> Iterator[tuple[Place, Any, str]]:
    if part.name not in BUILTINS:
        return
    builtin = BUILTINS[part.name]
    for option in sorted(set(part.options) - set(builtin.options)):
        yield (*place, "options", option), option, f"{part.name} has no option '{option}'{nearest(option, builtin.options)}"
    for option in sorted(set(builtin.required) - set(part.options)):
        yield (*place, "options"), part.options, f"{part.name} needs the option '{option}'"
    request_s = part.options.get("request_s", JUDGE_REQUEST_S)
    if part.name == "judge" and isinstance(request_s, int | float) and part.limit_s < request_s:
        message = f"timeout_s {part.limit_s:g} is less than one request may take (request_s {request_s:g}); raise it, or lower request_s"
        yield (*place, "timeout_s"), part.timeout_s, message


def _unknown(name: str, known: set[str]) -> str:
    # 'mth' is nearer to 'math' than to 'math_answer'.
    first_words = {full.partition("_")[0]: full for full in sorted(known, reverse=True)}
    near = difflib.get_close_matches(name, [*known, *first_words], n=1, cutoff=0.55)
    meant = f"; did you mean '{first_words.get(near[0], near[0])}'?" if near else nearest(name, sorted(known))
    return f"no reward named '{name}'{meant}"
