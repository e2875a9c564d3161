"""Rows for supervised fine-tuning: {prompt, completion}, from a file or from a built-in task's demonstrator.

They are read and checked in full before a policy is loaded, so that a bad row is a line with its place and not a stack trace in
the middle of a run. Imports nothing heavy.
"""

from typing import Any

from data.arithmetic import demonstrations
from data.prompt_config import PromptsConfig
from data.prompt_files import BadRow, Row, read_rows
from data.recipe import InputError
from sft.config import SftRecipe


def load_rows(recipe: SftRecipe) -> list[dict[str, Any]]:
    """All rows of the recipe's `data`; raises InputError for a file or a row that cannot be trained on."""
    data = recipe.data
    if data.task is not None:
        count = data.rows or recipe.sft.steps * recipe.sft.batch_size
        return demonstrations(data.options, count, recipe.run.seed)
    rows = [_checked(row) for row in read_rows(PromptsConfig(path=data.path))]
    if not rows:
        raise InputError(f"{data.path}: holds no rows; each needs a prompt and a completion")
    if len({isinstance(row["prompt"], str) for row in rows}) > 1:
        raise InputError(f"{data.path}: some prompts are text and some are chats; give all rows one form")
    return rows


def _checked(row: Row) -> dict[str, Any]:
    if isinstance(row.values, BadRow):
        raise InputError(f"{row.place}: {row.values.reason}: not a JSON object in UTF-8; correct or remove it")
    for name in ("prompt", "completion"):
        value = row.values.get(name)
        if not value or not isinstance(value, str | list):
            shown = repr(value) if name in row.values else "missing"
            raise InputError(f"{row.place}: {name} is {shown}; it must be text or a list of chat messages")
    prompt, completion = row.values["prompt"], row.values["completion"]
    if isinstance(prompt, str) != isinstance(completion, str):
        raise InputError(f"{row.place}: prompt and completion must both be text or both lists of chat messages")
    return {"prompt": prompt, "completion": completion}
