"""The `prompts` section of a recipe: where prompts come from and how their columns are called."""

from typing import Any, Self

from pydantic import Field, field_validator, model_validator

from data.recipe import Section, nearest
from data.tasks import TASKS


class PromptsConfig(Section):
    """Exactly one of `path` and `task`."""

    path: str | None = None
    """A JSONL or parquet file, or a hub id read through `datasets`: `org/name`, or `org/name:configuration`."""
    task: str | None = None
    """A built-in task, generated: `arithmetic`."""
    options: dict[str, Any] = {}
    """What the task is told; its module says which names it knows."""
    split: str = "train"
    """Split of a hub data set or a task; a file is one split."""
    columns: dict[str, str] = {}
    """Our name -> the file's, as in `{prompt: question}`; columns not named here keep their names."""
    system: str | None = None
    """Makes a text prompt a chat of a system and a user message; a chat that brings a system message of its own keeps that one."""
    chat: bool = False
    """Makes a text prompt a chat of one user message, for the chat template of the policy, also without `system`."""
    skip_bad: bool = False
    """Leaves out and counts bad rows instead of stopping at the first one."""
    limit: int | None = Field(None, ge=1)
    """Reads this many good prompts, from the start; null is all."""

    @field_validator("task")
    @classmethod
    def _known_task(cls, task: str | None) -> str | None:
        if task is not None and task not in TASKS:
            raise ValueError(f"no task named '{task}'{nearest(task, list(TASKS))}")
        return task

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.path is None) == (self.task is None):
            raise ValueError("give either a path (file or hub id) or a task")
        if self.task is None and self.options:
            raise ValueError(f"options belong to a task, and '{self.path}' is a path; leave them out")
        return self

    @property
    def source(self) -> str:
        """The path or the task, as messages name it."""
        return self.path or f"task {self.task}"
