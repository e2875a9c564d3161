"""`sql_result`: 1 if the completion's query gives the rows that the gold query gives, 0 otherwise.

The query is the last fenced block after the reasoning, else the answer itself. It runs on an SQLite database made by the row's
`setup` (SQL), in memory; or on the file `database`, opened read-only. An authorizer lets it read and compute, nothing else: no
write, no attach, no pragma. Steps, memory and rows are limited. The order of rows counts only where the gold query orders them.
"""

import math
import re
import sqlite3
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from data.values import Messages
from rewards.answers import marked_answer
from rewards.text import answer_text, completion_text, last_block, per_completion

MOST_ROWS = 100_000
MOST_BYTES = 1 << 26
"""Of all rows together."""
LONGEST_VALUE_BYTES = 1 << 20
_ALLOWED = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE}
_FORBIDDEN_FUNCTIONS = {"load_extension", "fts3_tokenizer", "writefile", "readfile", "edit"}


def sql_result(
    prompts: list[str | Messages],
    completions: list[str | Messages],
    answer: list[Any],
    setup: list[str] | None = None,
    database: list[str] | None = None,
    prompt_texts: list[str] | None = None,
    limit_s: float = 2.0,
    **_: Any,
) -> list[float | None]:
    """Rewards 1.0 or 0.0. Gold, the column `answer`, is a query or a list of rows; a gold query that fails is an error of the
    row.
    """
    rewards: list[float | None] = []
    for index, prompt_text in enumerate(per_completion(prompt_texts, len(prompts))):
        after = answer_text(completion_text(completions[index]), prompt_text)
        with closing(open_database(setup[index] if setup else None, database[index] if database else None)) as opened:
            gold = answer[index]
            wanted = rows_of(opened, gold, limit_s) if isinstance(gold, str) else [tuple(row) for row in gold]
            ordered = isinstance(gold, str) and orders(gold)
            try:
                got = rows_of(opened, query_in(after or ""), limit_s)
            except (sqlite3.Error, sqlite3.Warning, ValueError, MemoryError):
                rewards.append(0.0)
                continue
            rewards.append(float(same_rows(got, wanted, ordered)))
    return rewards


def open_database(setup: str | None, path: str | None) -> sqlite3.Connection:
    """The row's database, locked to reading."""
    if (setup is None) == (path is None):
        raise ValueError("sql_result needs the column 'setup' (SQL) or 'database' (a file), and not both")
    if path is not None:
        opened = sqlite3.connect(f"{Path(path).absolute().as_uri()}?mode=ro", uri=True)
    else:
        opened = sqlite3.connect(":memory:")
        opened.executescript(setup or "")
        opened.commit()
    opened.execute("PRAGMA trusted_schema = OFF")
    opened.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, LONGEST_VALUE_BYTES)
    opened.set_authorizer(_authorize)
    return opened


def _authorize(action: int, first: str | None, second: str | None, *_: Any) -> int:
    if action == sqlite3.SQLITE_FUNCTION and (second or "").lower() in _FORBIDDEN_FUNCTIONS:
        return sqlite3.SQLITE_DENY
    return sqlite3.SQLITE_OK if action in _ALLOWED else sqlite3.SQLITE_DENY


def query_in(text: str) -> str:
    """The query of an answer."""
    block = last_block(text)
    if block is not None:
        return block
    is_marked, marked = marked_answer(text)
    return (marked or "") if is_marked and "<answer>" in text else text


def rows_of(opened: sqlite3.Connection, query: str, limit_s: float) -> list[tuple[Any, ...]]:
    """The rows of one query; sqlite3.Error if it fails or takes too long, ValueError if it gives no rows at all or too many."""
    deadline = time.monotonic() + limit_s
    opened.set_progress_handler(lambda: int(time.monotonic() > deadline), 1000)
    cursor = opened.execute(query.strip())
    if cursor.description is None:
        raise ValueError("no query")
    rows, size = [], 0
    for row in cursor:
        rows.append(row)
        size += sum(len(value) if isinstance(value, str | bytes) else 8 for value in row)
        if len(rows) > MOST_ROWS or size > MOST_BYTES:
            raise ValueError("too many rows")
    return rows


def orders(query: str) -> bool:
    """Whether a query orders its rows; what a subquery or a window orders does not count."""
    text, inner = re.sub(r"'[^']*'", "''", query), 1
    while inner:
        text, inner = re.subn(r"\([^()]*\)", " ", text)
    return "order by" in " ".join(text.lower().split())


def same_rows(got: Sequence[Sequence[Any]], wanted: Sequence[Sequence[Any]], ordered: bool) -> bool:
    """Whether two results hold the same rows, as often; numbers to ten digits."""
    left, right = [tuple(map(_even, row)) for row in got], [tuple(map(_even, row)) for row in wanted]
    return left == right if ordered else Counter(left) == Counter(right)


def _even(value: Any) -> Any:
    return float(f"{value:.10g}") if isinstance(value, float) and math.isfinite(value) else value
