"""The names of reward functions that come with Cohort, and where each one lives.

A builtin is a function with trl's signature in a short module of its own, which names every column it uses: only those are sent to
it. It is imported in the worker process alone, so a recipe is checked without importing any. To add one, write the module and
give it a line here.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Builtin:
    """One reward function that comes with Cohort."""

    module: str
    """Import path; the function in it has the reward's name."""
    options: tuple[str, ...] = ()
    """Keyword arguments that `parts[i].options` may set."""
    required: tuple[str, ...] = ()
    """Options without which it cannot be called."""
    alone: bool = False
    """It has worker processes of its own: it loads a model, waits for a server, or starts programs."""


BUILTINS = {
    "math_answer": Builtin("rewards.math_answer"),
    "think_format": Builtin("rewards.think_format"),
}

LATER = (
    "choice_letter",
    "code_tests",
    "command_check",
    "countdown",
    "exact_text",
    "instruction_constraints",
    "json_schema",
    "judge",
    "language_consistency",
    "length",
    "regex",
    "repetition",
    "reward_model",
    "self_consistency",
    "sql_result",
    "tag_count",
)
"""Names of the recipe format that this version does not have yet; they are refused, not ignored."""
