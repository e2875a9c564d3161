"""Rows of any data set file, and the text in them: what filters, dedup and decontamination look at.

A file is JSONL, a JSON array or parquet. A row is a prompt (`prompt`, `question`, …), a prompt with its completion, or a record
with `messages`; which column is which is found by its name or told. Rows are read one by one and never held.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from data.prompt_config import PromptsConfig
from data.prompt_files import BadRow, read_rows
from data.recipe import InputError
from data.text import split_reasoning, words

COLUMNS: Mapping[str, Sequence[str]] = {
    "prompt": ("messages", "prompt", "question", "problem", "instruction"),
    "completion": ("completion", "response"),
    "answer": ("answer", "solution"),
    "id": ("id", "prompt_id"),
}
"""Our name -> the columns it may have in a file; the first that a row has is taken."""


class SourceRow(NamedTuple):
    """A row and where it stands."""

    file: str
    number: int
    """Line of a JSONL file, else row; from 1."""
    values: dict[str, Any]

    @property
    def place(self) -> str:
        return f"{self.file}:{self.number}"


@dataclass(frozen=True)
class RowText:
    """What a row says. A text is None where the row has none; `problem` says what keeps it from being a row at all."""

    id: str
    prompt: str
    """What the user wrote, all turns, without system messages: those are shared by whole sources."""
    completion: str | None
    gold: str | None
    """The gold answer; text with `####` counts from there."""
    finish_reason: str | None = None
    problem: str = ""

    @cached_property
    def prompt_words(self) -> list[str]:
        return words(self.prompt)

    @cached_property
    def completion_words(self) -> list[str]:
        return words(self.completion or "")

    @property
    def taught(self) -> str:
        """What training on the row teaches: its completion, or the prompt of a row that is no more."""
        return self.prompt if self.completion is None else self.completion

    @property
    def taught_words(self) -> list[str]:
        return self.prompt_words if self.completion is None else self.completion_words

    @cached_property
    def parts(self) -> tuple[str | None, str]:
        """(reasoning or None, answer) of the completion."""
        return (None, "") if self.completion is None else split_reasoning(self.completion)


def read_files(paths: Sequence[str | Path]) -> Iterator[SourceRow]:
    """All rows of some files, one file after the other; InputError, one line with file and line, for what is no row."""
    for path in paths:
        for row in read_rows(PromptsConfig(path=str(path))):
            if isinstance(row.values, BadRow):
                raise InputError(str(row.values).removesuffix(", or set skip_bad: true"))
            yield SourceRow(str(path), row.number, row.values)


def parse_columns(given: Sequence[str]) -> dict[str, Sequence[str]]:
    """`prompt=question,problem` on the command line -> which columns are meant; the others keep their usual names."""
    named: dict[str, Sequence[str]] = dict(COLUMNS)
    for item in given:
        ours, equals, theirs = item.partition("=")
        if not equals or ours not in COLUMNS or not all(theirs.split(",")):
            raise InputError(f"--columns {item}: say which of {', '.join(COLUMNS)} is which column, as in prompt=question")
        named[ours] = theirs.split(",")
    return named


def row_text(row: SourceRow, columns: Mapping[str, Sequence[str]] = COLUMNS) -> RowText:
    """The text of a row. A row without a prompt's column is an InputError; one whose prompt is no text has a `problem`."""
    values = row.values
    name = next((name for name in columns["prompt"] if name in values), None)
    if name is None:
        there = ", ".join(values) or "(none)"
        raise InputError(f"{row.place}: no prompt: the row has the columns {there}; say which is the prompt, as in --columns prompt=NAME")
    found_id = next((values[name] for name in columns["id"] if values.get(name) not in (None, "")), None)
    row_id = f"{_stem(row.file)}-{row.number}" if found_id is None else str(found_id)
    completion_name = next((name for name in columns["completion"] if name in values), None)
    prompt, problem = _as_text(values[name], name)
    completion: str | None = None
    if completion_name is not None:
        completion, problem = _second(problem, *_as_text(values[completion_name], completion_name))
    elif _is_chat(values[name]) and values[name][-1]["role"] == "assistant":
        prompt, problem = _second(problem, *_as_text(values[name][:-1], name))
        completion = values[name][-1]["content"]
    elif name == "messages":
        problem = problem or "messages: the last one is not the assistant's"
    if not problem and (completion is not None and not completion.strip()):
        problem = "the completion is empty"
    finish_reason = values.get("finish_reason")
    gold = _gold(values, columns["answer"])
    return RowText(row_id, prompt, completion, gold, finish_reason if isinstance(finish_reason, str) else None, problem)


@lru_cache(maxsize=64)
def _stem(file: str) -> str:
    return Path(file).stem


def _second(first_problem: str, text: str, problem: str) -> tuple[str, str]:
    return text, first_problem or problem


def _as_text(value: Any, name: str) -> tuple[str, str]:
    """(text, what is wrong with it)."""
    if isinstance(value, str):
        text = value
    elif _is_chat(value):
        text = "\n\n".join(message["content"] for message in value if message["role"] != "system")
    else:
        return "", f"{name}: neither text nor a list of {{role, content}} but {str(value)[:40]!r}"
    if not text.strip():
        return "", f"{name}: empty"
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        return "", f"{name}: half a surrogate pair, which is no text"
    return text, ""


def _is_chat(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in value)
    )


def _gold(values: Mapping[str, Any], names: Sequence[str]) -> str | None:
    for name in names:
        value = values.get(name)
        if isinstance(value, str | int | float) and not isinstance(value, bool) and str(value).strip():
            return " ".join(str(value).rpartition("####")[2].split())
    return None
