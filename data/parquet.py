"""Parquet files: read row by row, written whole or not at all. The one home of pyarrow in this package."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data.recipe import InputError


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Rows as plain Python values, in the file's order, a batch in memory at a time; InputError if it is not a parquet file."""
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches():
                yield from batch.to_pylist()
    except pa.ArrowException as error:
        raise InputError(f"{path}: not a parquet file that can be read ({' '.join(str(error).split())})") from None


def write_rows(path: Path, rows: list[dict[str, Any]], columns: Mapping[str, str]) -> None:
    """Writes aside, syncs and renames: a reader, or a crash, sees the old file or the whole new one. The folder must exist.

    `columns` gives the type of each column by its name in Arrow (`int64`, `float64`, `string`).
    """
    schema = pa.schema([(name, pa.type_for_alias(kind)) for name, kind in columns.items()])
    aside = path.with_name(f".{path.name}.tmp")
    try:
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), aside, compression="zstd")
        _sync(aside)
        os.replace(aside, path)
        _sync(path.parent)
    finally:
        aside.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
