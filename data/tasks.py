"""Built-in tasks: prompts that are generated instead of read.

A task is a module with `rows(options, split)`, which gives rows `{id, prompt, answer}` and raises InputError for a wrong option or
split. It is named here, so that a recipe can be checked without importing it.
"""

import importlib
from typing import Any

TASKS = {"arithmetic": "data.arithmetic"}
"""Task name -> module."""


def task_rows(name: str, options: dict[str, Any], split: str) -> list[dict[str, Any]]:
    """All rows of one split of a task named in TASKS."""
    return importlib.import_module(TASKS[name]).rows(options, split)
