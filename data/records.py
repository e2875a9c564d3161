"""Records as rows of a file: `messages`, as trl and `datasets` read them, and a column for each thing that provenance says.

What has other names in other rows (sampling settings, rewards, parts) is a JSON object in a text column, so that all rows of a
file, and of two files that are mixed, have the same columns and types.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from data.files import write_lines
from data.values import Provenance, Record

RECORD_COLUMNS = {
    "messages": "messages",
    "prompt_id": "string",
    "group_id": "string",
    "index": "int64",
    "expert": "string",
    "expert_hash": "string",
    "seed": "int64",
    "sampling": "string",
    "rewards": "string",
    "parts": "string",
    "reward": "float64",
    "pass_rate": "float64",
    "filters": "string",
    "recipe_hash": "string",
    "tokens": "int64",
    "source": "string",
    "finish_reason": "string",
}
"""Column -> type, for `data.parquet.write_rows`."""
_JSON = ("sampling", "rewards", "parts", "filters")


def record_row(record: Record) -> dict[str, Any]:
    """A Record as a row of RECORD_COLUMNS."""
    row = {"messages": record.messages} | asdict(record.provenance)
    return row | {name: json.dumps(row[name], ensure_ascii=False, sort_keys=True) for name in _JSON}


def record_from_row(row: Mapping[str, Any]) -> Record:
    """The Record that a row was made of; ValueError where it is none."""
    missing = [name for name in RECORD_COLUMNS if name not in row]
    if missing:
        raise ValueError(f"no record: the row has no {', '.join(missing)}")
    values = {field.name: row[field.name] for field in fields(Provenance)}
    values |= {name: json.loads(values[name]) for name in _JSON}
    messages = [{"role": message["role"], "content": message["content"]} for message in row["messages"]]
    return Record(messages, Provenance(**values | {"filters": tuple(values["filters"])}))


def write_records(folder: Path, read: Callable[[], Iterable[Record]]) -> tuple[Path, Path]:
    """`train.parquet` and `train.jsonl` of the same rows, each whole or not at all; `read` is called for each."""
    from data.parquet import write_rows  # loads pyarrow

    folder.mkdir(parents=True, exist_ok=True)
    parquet, lines = folder / "train.parquet", folder / "train.jsonl"
    write_rows(parquet, map(record_row, read()), RECORD_COLUMNS)
    write_lines(lines, (json.dumps(record_row(record), ensure_ascii=False) for record in read()))
    return parquet, lines
