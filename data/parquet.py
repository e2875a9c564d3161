"""Parquet files: read row by row, written whole or not at all. The one home of pyarrow in this package."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data.recipe import InputError

MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
"""A chat, as trl and chat templates read it."""
BATCH_ROWS = 5_000
"""Rows in memory at a time, and in a row group."""


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Rows as plain Python values, in the file's order, a batch in memory at a time; InputError if it is not a parquet file."""
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches():
                yield from batch.to_pylist()
    except pa.ArrowException as error:
        raise InputError(f"{path}: not a parquet file that can be read ({' '.join(str(error).split())})") from None


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]], columns: Mapping[str, str]) -> None:
    """Writes aside, syncs and renames: a reader, or a crash, sees the old file or the whole new one. The folder must exist.

    `columns` gives the type of each column by its name in Arrow (`int64`, `float64`, `string`), or `messages` for a chat.
    """
    _write(path, rows, pa.schema([(name, MESSAGES if kind == "messages" else pa.type_for_alias(kind)) for name, kind in columns.items()]))


def write_any_rows(path: Path, read: Callable[[], Iterable[Mapping[str, Any]]], like: Path | None = None) -> None:
    """The same for rows whose columns are not known before. `like`: a parquet file whose columns they have.

    Columns are those of the first rows. Should later ones have others, all are read for theirs, and `read` is called again.
    InputError if a column cannot have one type.
    """
    try:
        schema = pq.read_schema(like) if like is not None else _schema(islice(read(), BATCH_ROWS))
        try:
            _write(path, read(), schema, check=like is None)
        except _OtherColumnsError:
            _write(path, read(), _schema(read()))
    except (pa.ArrowException, UnicodeEncodeError) as error:
        raise InputError(f"{path}: these rows are no table ({' '.join(str(error).split())}); write a .jsonl file instead") from None


class _OtherColumnsError(Exception):
    """A row has what the schema does not."""


def _schema(rows: Iterable[Mapping[str, Any]]) -> pa.Schema:
    schema = pa.schema([])
    for batch in _batches(rows):
        schema = pa.unify_schemas([schema, pa.schema(list(pa.array(batch).type))], promote_options="permissive")
    # A column that is null in every row is text to readers that know no null type.
    return pa.schema([field if field.type != pa.null() else field.with_type(pa.string()) for field in schema])


def _write(path: Path, rows: Iterable[Mapping[str, Any]], schema: pa.Schema, check: bool = False) -> None:
    aside = path.with_name(f".{path.name}.tmp")
    try:
        with pq.ParquetWriter(aside, schema, compression="zstd") as writer:
            for batch in _batches(rows):
                if check and not _holds(schema, pa.schema(list(pa.array(batch).type))):
                    raise _OtherColumnsError
                writer.write_batch(pa.RecordBatch.from_struct_array(pa.array(batch, pa.struct(list(schema)))))
        _sync(aside)
        os.replace(aside, path)
        _sync(path.parent)
    finally:
        aside.unlink(missing_ok=True)


def _holds(schema: pa.Schema, other: pa.Schema) -> bool:
    """Whether rows of the other schema lose nothing in this one."""
    try:
        return set(other.names) <= set(schema.names) and pa.unify_schemas([schema, other], promote_options="permissive") == schema
    except pa.ArrowException:
        return False


def _batches(rows: Iterable[Mapping[str, Any]]) -> Iterator[list[Mapping[str, Any]]]:
    rows = iter(rows)
    while batch := list(islice(rows, BATCH_ROWS)):
        yield batch


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
