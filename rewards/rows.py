"""Rows to be scored: a JSONL or parquet file of `{prompt, completion, …columns}` as ScoreJobs, read twice and never held whole.

`prompt` is text or chat messages; `completion` is text, or messages whose last one it is. Rows that follow each other with the same
`group_id` are one group and are judged together; any other row, and one whose `group_id` is null, is a group of its own.
`prompt_text` (the rendered prompt) and `completion_ids` are handed on where they are there.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from data.files import json_line
from data.recipe import InputError
from rewards.config import RewardsConfig
from rewards.job import ScoreJob
from rewards.text import completion_text

_OURS = ("prompt", "completion", "prompt_text", "completion_ids", "group_id")
_SHARED = ("prompt", "answer", "solution")
"""What the rows of a group have in common, where they say it: the group is judged by the first one's."""


@dataclass(frozen=True)
class Rows:
    """Some rows that are judged together."""

    first: int
    """Place of the first one in the file, from 0."""
    rows: Sequence[dict[str, Any]]
    digest: str
    """Of their bytes: other rows at this place are other rows."""

    def job(self) -> ScoreJob:
        """As the reward functions are asked; all but the completions is the first row's."""
        row = self.rows[0]
        return ScoreJob(
            group_id=f"row-{self.first}" if row.get("group_id") is None else str(row["group_id"]),
            prompt=row["prompt"],
            prompt_text=row.get("prompt_text") or (row["prompt"] if isinstance(row["prompt"], str) else ""),
            completions=[completion_text(row["completion"]) for row in self.rows],
            completion_ids=[row.get("completion_ids") for row in self.rows],  # type: ignore[misc]
            columns={name: value for name, value in row.items() if name not in _OURS},
        )


def read_rows(path: Path) -> Iterator[Rows]:
    """The rows of a checked file, in order."""
    parsed = ((place, line, json.loads(line)) for place, (_, line) in enumerate(_lines(path)))
    for _, group in groupby(parsed, key=lambda item: _group_key(item[2], item[0])):
        members = list(group)
        digest = hashlib.blake2b(b"".join(line.strip() for _, line, _ in members), digest_size=8).hexdigest()
        yield Rows(members[0][0], [row for _, _, row in members], digest)


def check_rows(path: Path, config: RewardsConfig) -> int:
    """How many rows a file has; InputError, with the line, for one that cannot be scored."""
    if not path.is_file():
        raise InputError(f"--in: no file '{path}'")
    count = 0
    first: dict[str, Any] = {}
    for place, line in _lines(path):
        row = _check_row(place, line, config)
        key = _group_key(row, None)
        if key is None or key != _group_key(first, None):
            first = row
        if row is not first:
            _check_sibling(place, row, first)
        count += 1
    if not count:
        raise InputError(f"--in: '{path}' has no rows")
    return count


def _lines(path: Path) -> Iterator[tuple[str, bytes]]:
    """Place and JSON of each row; a parquet file's rows are written as such."""
    if path.suffix == ".parquet":
        from data.parquet import read_rows as parquet_rows  # loads pyarrow

        for number, row in enumerate(parquet_rows(path), start=1):
            yield f"{path}: row {number}", json_line(row).encode()
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield f"{path}:{number}", line


def _group_key(row: dict[str, Any], alone: Any) -> Any:
    """What the rows of one group share; `alone` for a row without a group."""
    return alone if row.get("group_id") is None else ("group", row["group_id"])


def _check_sibling(place: str, row: dict[str, Any], first: dict[str, Any]) -> None:
    for name in _SHARED:
        if name in row and row[name] != first.get(name) and json.dumps(row[name]) != json.dumps(first.get(name)):  # NaN is not NaN
            raise InputError(
                f"{place}: '{name}' is not that of the first row of group {row['group_id']!r:.60}; "
                "rows of one group answer one prompt: give other rows another group_id"
            )


def _check_row(place: str, line: bytes, config: RewardsConfig) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise InputError(f"{place}: not JSON: {error}") from None
    if not isinstance(row, dict):
        raise InputError(f"{place}: a row is an object, this is {type(row).__name__}")
    for name in ("prompt", "completion"):
        if not isinstance(row.get(name), str | list) or row[name] == []:
            raise InputError(f"{place}: '{name}' has to be text or chat messages, it is {row.get(name)!r:.60}")
    if "completion_ids" not in row and any(part.name == "length" for part in [*config.parts, *config.shadow]):
        raise InputError(f"{place}: 'length' counts tokens, and the row has no 'completion_ids'")
    try:
        config.parts_for(row)
    except ValueError as error:
        raise InputError(f"{place}: {error}") from None
    return row
