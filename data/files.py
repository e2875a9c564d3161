"""What the data set commands share: outputs that are whole or not there, inputs that stay as they are, progress on stderr."""

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import Progress, TextColumn, TimeElapsedColumn

from data.recipe import InputError

T = TypeVar("T")
SUFFIXES = (".jsonl", ".parquet")
EVERY = 1_000
"""Rows between two movements of the progress line."""


def check_output(option: str, path: Path, inputs: Sequence[str | Path]) -> None:
    """InputError for an output that is of no known kind, is a folder, or would replace an input."""
    if path.suffix not in SUFFIXES:
        raise InputError(f"{option}: '{path}' has to end in {' or '.join(SUFFIXES)}")
    check_not_input(option, path, inputs)


def check_not_input(option: str, path: Path, inputs: Sequence[str | Path]) -> None:
    """InputError for an output that is a folder, or would replace an input, by a link too."""
    if path.is_dir():
        raise InputError(f"{option}: '{path}' is a folder; name the file in it")
    for given in inputs:
        if path.exists() and Path(given).exists() and path.samefile(given):
            raise InputError(f"{option}: '{path}' is an input, and inputs are never written to; choose another file")


def write_file(path: Path, read: Callable[[], Iterable[Mapping[str, Any]]], like: Path | None = None) -> None:
    """Rows as JSONL or parquet, by the ending; aside, then renamed. `read` gives the same rows each time it is called, and `like`
    is the file that they come from, if it is one and they have its columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        from data.parquet import write_any_rows  # loads pyarrow

        write_any_rows(path, read, like if like is not None and like.suffix == ".parquet" else None)
    else:
        write_lines(path, map(json_line, read()))


def json_line(row: Mapping[str, Any]) -> str:
    """A row as JSON that UTF-8 can hold: half a surrogate pair, which JSON can write, stays escaped."""
    line = json.dumps(row, ensure_ascii=False, default=str)
    if line.isascii() or not any("\ud800" <= character <= "\udfff" for character in line):
        return line
    return json.dumps(row, default=str)


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """A text file, a line each; aside, synced, renamed."""
    aside = path.with_name(f".{path.name}.tmp")
    try:
        with aside.open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(f"{line}\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def progress() -> Iterator[Callable[[str, Iterable[T]], Iterator[T]]]:
    """Gives a function that counts rows as they pass; where nobody watches it shows nothing."""
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), TextColumn("{task.completed:,.0f} rows"), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:

        def count(label: str, rows: Iterable[T]) -> Iterator[T]:
            task = bar.add_task(label, total=None)
            seen = 0
            for seen, row in enumerate(rows, start=1):
                if seen % EVERY == 0:
                    bar.update(task, completed=seen)
                yield row
            bar.update(task, completed=seen, total=seen)

        yield count


def run_command(main: Callable[[], None]) -> int:
    """Exit code of a command: 2 and one line for what a user gave wrong."""
    try:
        main()
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    return 0
