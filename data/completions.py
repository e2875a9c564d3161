"""What was sampled, for people: `completions/step-<N>.parquet`, one row a completion, one file a step.

The files are derived: the journal is the truth, and a run that resumes from the checkpoint of step s cuts the files from s on and
writes them again. All have the same columns and types, so that a folder of them reads as one table.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data.values import Completion, Group, Score

COLUMNS = {
    "step": "int64",
    "prompt_id": "string",
    "group_id": "string",
    "index": "int64",
    "attempt": "int64",
    "seed": "int64",
    "prompt": "string",
    "completion": "string",
    "tokens": "int64",
    "finish_reason": "string",
    "engine": "string",
    "version_min": "int64",
    "version_max": "int64",
    "reward": "float64",
    "status": "string",
    "detail": "string",
    "parts": "string",
    "advantage": "float64",
    "outcome": "string",
    "extras": "string",
}
"""Column -> type. `prompt` is the text the policy read, `parts` a JSON object, `reward` null where the status is not ok, `outcome` the
reason under which the account has its tokens, `extras` a JSON object of what reward functions logged by `log_extra` (empty for a group
that was scored before the run went on)."""


def write_completions(
    folder: Path,
    step: int,
    groups: Sequence[Group],
    texts: Sequence[Sequence[str]],
    advantages: Sequence[Sequence[float | None]],
    outcomes: Sequence[Sequence[str]],
    extras: Sequence[Mapping[str, Sequence[Any]]] = (),
) -> Path:
    """Writes the groups of one step, whole or not at all, and returns the file.

    `texts`, `advantages` and `outcomes` are aligned with the groups and their completions; one that has no advantage has None.
    `extras`: by group, columns with a value for each completion; none for no group.
    """
    from data.parquet import write_rows  # loads pyarrow

    rows = [
        _row(step, group, completion, score) | {"completion": text, "advantage": advantage, "outcome": outcome, "extras": extra}
        for group, columns, *of_group in zip(groups, extras or [{}] * len(groups), texts, advantages, outcomes, strict=True)
        for completion, score, extra, text, advantage, outcome in zip(
            group.completions, group.scores, _by_completion(columns, len(group.completions)), *of_group, strict=True
        )
    ]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step}.parquet"
    write_rows(path, rows, COLUMNS)
    return path


def cut_completions(folder: Path, step: int) -> list[Path]:
    """Removes the files of this step and later ones, which a run that resumes there writes again; returns what was removed."""
    files = [(int(match[1]), path) for path in folder.glob("step-*.parquet") if (match := re.fullmatch(r"step-(\d+)", path.stem))]
    late = [path for number, path in sorted(files) if number >= step]
    for path in late:
        path.unlink()
    return late


def _by_completion(columns: Mapping[str, Sequence[Any]], count: int) -> list[str]:
    """What was logged of each completion, in JSON."""
    return [json.dumps({name: values[i] for name, values in columns.items() if values[i] is not None}) for i in range(count)]


def _row(step: int, group: Group, completion: Completion, score: Score) -> dict[str, Any]:
    versions = completion.policy_version
    return {
        "step": step,
        "prompt_id": group.prompt.id,
        "group_id": group.id,
        "index": completion.index,
        "attempt": completion.attempt,
        "seed": completion.seed,
        "prompt": group.prompt.text,
        "tokens": len(completion.token_ids),
        "finish_reason": completion.finish_reason,
        "engine": completion.engine,
        "version_min": int(versions.min()) if versions.size else None,
        "version_max": int(versions.max()) if versions.size else None,
        "reward": score.value,
        "status": score.status,
        "detail": score.detail,
        "parts": json.dumps(dict(score.parts)),
    }
