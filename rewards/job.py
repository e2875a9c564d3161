"""What is asked of the reward functions: the completions of one prompt, as trl's contract will show them to a function."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, time
from typing import Any

import numpy as np

from data.values import Messages, Prompt

_OURS = ("prompt", "completion", "completion_ids")
"""Columns that trl does not hand over either: the arguments stand for them."""


@dataclass(frozen=True)
class ScoreJob:
    """One group to be scored."""

    group_id: str
    prompt: str | Messages
    """As the user wrote it: text, or chat messages."""
    prompt_text: str
    """As the policy read it."""
    completions: Sequence[str]
    """The text of each, without the token that ended it."""
    completion_ids: Sequence[Sequence[int] | np.ndarray]
    """Token ids of each."""
    columns: Mapping[str, Any]
    """The row's other columns."""
    global_step: int = 0
    completion_masks: Sequence[Sequence[int] | np.ndarray] | None = None
    """Of each, 1 where the policy wrote the token and 0 where a tool did; None: it wrote all of them."""

    @classmethod
    def of(
        cls, prompt: Prompt, group_id: str, completions: Sequence[str], completion_ids: Sequence[Any], step: int,
        completion_masks: Sequence[Any] | None = None,
    ) -> "ScoreJob":  # fmt: skip
        """A group of a prompt's completions."""
        return cls(group_id, prompt.prompt, prompt.text, completions, completion_ids, prompt.columns, step, completion_masks)


def request_line(job: ScoreJob, call_id: int, function: str, indices: Sequence[int], named: Sequence[str] | None) -> bytes:
    """A call of a function on some of a job's completions, as a line for the worker.

    `named`: the arguments that the function has a use for, or None for all. ValueError if a column is nothing that JSON can carry.
    """
    columns = {name: value for name, value in job.columns.items() if name not in _OURS and (named is None or name in named)}
    ids = [job.completion_ids[i] for i in indices] if named is None or "completion_ids" in named else None
    request = {
        "id": call_id,
        "function": function,
        "prompt": job.prompt,
        "prompt_text": job.prompt_text,
        "completions": [job.completions[i] for i in indices],
        "completion_ids": ids,
        "columns": columns,
        "group_id": job.group_id,
        "global_step": job.global_step,
    }
    if job.completion_masks is not None and (named is None or "completion_masks" in named):
        request["completion_masks"] = [job.completion_masks[i] for i in indices]
    return json.dumps(request, default=_as_json).encode() + b"\n"


def _as_json(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, date | time):
        return value.isoformat()
    raise ValueError(
        f"a reward function cannot be given the {type(value).__name__} {value!r:.60}: columns hold text, "
        "numbers, lists and mappings; leave this column out of the prompt file"
    )
