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
    prepares: bool = False
    """Its module's `prepare` is called with the options when a worker starts; it may return a line for the user."""
    one_process: bool = False
    """It has one worker process, as each would load its model."""
    timeout_s: float = 30.0
    """The part's `timeout_s`, where a recipe gives none."""
    told_timeout: bool = False
    """Its function gets the part's `timeout_s`, and returns what it has before then."""
    gold: tuple[str, ...] = ()
    """Columns of which a row has to have one; without, it cannot be judged."""


GOLD = ("answer", "solution")
JUDGE_REQUEST_S = 60.0
"""Default of the judge's `request_s`; here, as a recipe is checked against it."""
JUDGE_TIMEOUT_S = 600.0
"""Six requests of a minute each, and five waits of half a minute between them, are 510 s."""
JUDGE = (
    "url", "model", "mode", "rubric", "low", "high", "votes", "opponents", "reasoning", "temperature", "max_tokens", "key_env",
    "requests_at_once", "per_second", "retries", "request_s", "cache",
)  # fmt: skip
REWARD_MODEL = (
    "model", "engine", "revision", "device", "dtype", "max_length", "batch_tokens", "gpu_memory_utilization",
)  # fmt: skip

COMMAND = ("command", "file", "append", "then", "keep", "reject", "paths", "limits", "backend")

BUILTINS = {
    "choice_letter": Builtin("rewards.choice_letter", ("letters",), gold=GOLD),
    "code_tests": Builtin("rewards.code_tests", ("reward", "limits", "total_s", "backend"), alone=True, prepares=True),
    "command_check": Builtin("rewards.command_check", COMMAND, required=("command",), alone=True, prepares=True),
    "countdown": Builtin("rewards.countdown", ("use_all",)),
    "exact_text": Builtin("rewards.exact_text", ("ignore_case",), gold=GOLD),
    "instruction_constraints": Builtin("rewards.instruction_constraints", ("all_or_nothing",)),
    "judge": Builtin("rewards.judge", JUDGE, required=("url", "model"), alone=True, timeout_s=JUDGE_TIMEOUT_S, told_timeout=True),
    "json_schema": Builtin("rewards.json_schema", ("schema",)),
    "language_consistency": Builtin("rewards.language_consistency", ("language", "answer_too")),
    "length": Builtin("rewards.length", ("kind", "max_tokens", "buffer", "right", "wrong", "judge")),
    "math_answer": Builtin("rewards.math_answer", gold=GOLD),
    "reward_model": Builtin("rewards.reward_model", REWARD_MODEL, required=("model",), alone=True, prepares=True, one_process=True),
    "regex": Builtin("rewards.pattern", ("pattern", "reasoning", "full", "limit_s"), required=("pattern",)),
    "repetition": Builtin("rewards.repetition", ("ngram", "penalty")),
    "self_consistency": Builtin("rewards.self_consistency", ("min_votes",)),
    "sql_result": Builtin("rewards.sql_result", ("limit_s",)),
    "tag_count": Builtin("rewards.tag_count", ("tags",)),
    "think_format": Builtin("rewards.think_format"),
}
