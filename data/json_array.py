"""A file that is one JSON array of objects, read row by row: some data sets come so, and theirs may be large."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data.recipe import InputError

CHUNK = 1 << 20
"""Characters read at a time."""


def is_json_array(path: Path) -> bool:
    """Whether a file begins as an array of objects; a line of JSONL that is a list is a mistake of another kind."""
    with path.open("rb") as file:
        head = file.read(4096).removeprefix(b"\xef\xbb\xbf").split()
    return b"".join(head).startswith(b"[{")


def json_array(path: Path) -> Iterator[dict[str, Any]]:
    """The objects in their order; InputError with the row where the file is no array of objects."""
    decoder = json.JSONDecoder()
    with path.open(encoding="utf-8-sig") as file:
        try:
            rest, number = file.read(CHUNK).lstrip()[1:], 0
            while True:
                rest = rest.lstrip(" \t\r\n,") if number else rest.lstrip()
                if rest.startswith("]"):
                    return
                try:
                    row, end = decoder.raw_decode(rest)
                except json.JSONDecodeError as error:
                    more = file.read(max(CHUNK, len(rest)))
                    if not more:
                        raise InputError(f"{path}: row {number + 1}: not valid JSON ({error.msg}); one array of objects is read") from None
                    rest += more
                    continue
                if not isinstance(row, dict):
                    raise InputError(f"{path}: row {number + 1}: holds a JSON {type(row).__name__} where a row is an object")
                number += 1
                rest = rest[end:]
                yield row
        except UnicodeDecodeError as error:
            raise InputError(f"{path}: not UTF-8 text ({error.reason}); save the file as UTF-8") from None
