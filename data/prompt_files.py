"""Rows of a prompt source, each with the place that an error can name: a file (JSONL, a JSON array, parquet), a hub data set, a task."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.json_array import is_json_array, json_array
from data.prompt_config import PromptsConfig
from data.recipe import InputError, nearest
from data.tasks import task_rows

FILE_SUFFIXES = (".jsonl", ".json", ".ndjson", ".parquet", ".txt", ".csv")


class BadRow(InputError):
    """A row that cannot become a prompt. `reason` is what it is counted under if bad rows are skipped."""

    def __init__(self, place: str, reason: str, problem: str, way_out: str = "correct it"):
        super().__init__(f"{place}: {problem}; {way_out}, or set skip_bad: true")
        self.reason = reason


@dataclass(frozen=True)
class Row:
    number: int
    """Line of a JSONL file, else row; from 1."""
    place: str
    values: dict[str, Any] | BadRow
    """A row that could not be parsed is a value too, so that reading can go on behind it."""


def read_rows(config: PromptsConfig) -> Iterator[Row]:
    """All rows, in the source's order; InputError if the source itself cannot be read."""
    if config.task is not None:
        return _numbered(config.source, iter(task_rows(config.task, config.options, config.split)))
    assert config.path is not None
    path = Path(config.path)
    if is_hub_id(config.path):
        from data.hub import hub_rows  # loads datasets

        return _numbered(f"{config.path} [{config.split}]", hub_rows(config.path, config.split))
    if not path.is_file():
        raise InputError(f"{path}: {_why_no_file(path)}")
    if path.suffix == ".parquet":
        from data.parquet import read_rows as parquet_rows  # loads pyarrow

        return _numbered(str(path), parquet_rows(path))
    if is_json_array(path):
        return _numbered(str(path), json_array(path))
    return _json_lines(path)


def is_hub_id(path: str) -> bool:
    """Whether a path is no file and looks like `org/name` or `org/name:configuration`."""
    if Path(path).is_file() or path.endswith(FILE_SUFFIXES):
        return False
    return re.fullmatch(r"\w[\w.-]*/[\w.-]+(:[\w.-]+)?", path) is not None


def source_stem(config: PromptsConfig) -> str:
    """What a row without an id is named after: file stem, data set or task name."""
    return config.task or Path(str(config.path).partition(":")[0]).stem


def _numbered(source: str, rows: Iterator[dict[str, Any]]) -> Iterator[Row]:
    for number, values in enumerate(rows, start=1):
        yield Row(number, f"{source}: row {number}", values)


def _json_lines(path: Path) -> Iterator[Row]:
    # Bytes, since text mode would also break lines at characters that JSON allows within a string.
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                place = f"{path}:{number}"
                yield Row(number, place, _parse(line, place))


def _parse(line: bytes, place: str) -> dict[str, Any] | BadRow:
    try:
        values = json.loads(line.decode("utf-8").rstrip())
    except UnicodeDecodeError as error:
        problem = f"not UTF-8 text ({error.reason} at byte {error.start} of the line)"
        return BadRow(place, "broken_json", problem, "save the file as UTF-8")
    except json.JSONDecodeError as error:
        return BadRow(place, "broken_json", f"not valid JSON ({error.msg} at column {error.colno})", "write one JSON object a line")
    if not isinstance(values, dict):
        problem = f"holds a JSON {type(values).__name__} where a row is an object"
        return BadRow(place, "broken_json", problem, 'write one JSON object a line, as in {"prompt": ...}')
    return values


def _why_no_file(path: Path) -> str:
    if path.is_dir():
        return "is a folder; name the prompt file in it"
    if not path.parent.is_dir():
        return f"no such file: there is no folder '{path.parent}' in {Path.cwd()}; paths are relative to the working folder"
    names = [file.name for file in path.parent.iterdir() if file.suffix in FILE_SUFFIXES]
    return f"no such file{nearest(path.name, names)}; paths are relative to the working folder, {Path.cwd()}"
