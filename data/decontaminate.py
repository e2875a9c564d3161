"""Decontamination: rows that hold a prompt of an evaluation file, whole, in part, or within a longer text.

A prompt of n words or more is looked for by its n-grams, and a row is a hit from a share of them on: one n-gram alone is most
often a turn of phrase (an 8-gram flags an eighth of MATH's training set). A shorter prompt has no n-gram; it is looked for whole, as
a prompt, or as sentences of a text, a label before them (`Question:`, `3.`) aside. Every hit is reported with what matched, and an
allow-list takes back what is no leak.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from data.clean_config import AgainstConfig
from data.recipe import InputError
from data.rows import COLUMNS, RowText, read_files, row_text
from data.text import grams, words

_SENTENCE_END = re.compile(r"(?<=[.?!。？！])\s+|(?<=[。？！])|\n+")
_LABEL = re.compile(
    r"[\s#*_>]*(?:(?:question|q|problem|task|user|human|prompt|exercise|input|instruction)[\s#]*(?:\d[\d.]*)?[\s*_]*:"
    r"|\(?\d+[.):](?=[\s*_]))",
    re.IGNORECASE,
)
"""`Question 3:` and `3)` before a sentence are no part of it."""


@dataclass(frozen=True)
class Hit:
    """What of an evaluation prompt stands in a row."""

    id: str
    """The row's."""
    part: str
    """prompt or completion."""
    evaluation: str
    """File and line of the evaluation prompt."""
    evaluation_text: str
    matched: str
    """The longest run of words that both have."""
    coverage: float
    """Share of the evaluation prompt's n-grams; 1.0 for a short one that was found whole."""
    allowed: bool
    """On the allow-list: reported, and the row stays."""


@dataclass(frozen=True)
class _Item:
    place: str
    text: str
    grams: int
    allowed: bool


class Decontaminator:
    """The n-grams of all evaluation prompts; memory grows with those alone."""

    def __init__(self, config: AgainstConfig, columns: Mapping[str, Sequence[str]] = COLUMNS):
        self._config = config
        self._items: list[_Item] = []
        self._long: dict[tuple[str, ...], list[int]] = defaultdict(list)
        self._short: dict[int, dict[tuple[str, ...], list[int]]] = defaultdict(lambda: defaultdict(list))
        places, phrases = _allow_list(config.allow)
        common = {gram for phrase in phrases for gram in grams(words(phrase), config.ngram)}
        for row in read_files(config.paths):
            text = row_text(row, columns)
            if text.prompt_words and tuple(text.prompt_words) not in {tuple(words(phrase)) for phrase in phrases}:
                self._add(row.place, text, common, any(row.place == place or row.place.endswith(f"/{place}") for place in places))
        if not self._items:
            raise InputError(f"{', '.join(config.paths)}: no evaluation prompts to decontaminate against; leave `against` out")

    def _add(self, place: str, text: RowText, common: set[tuple[str, ...]], allowed: bool) -> None:
        found = text.prompt_words
        n = self._config.ngram
        keys = set(grams(found, n)) - common
        number = len(self._items)
        for gram in keys:
            self._long[gram].append(number)
        if len(found) < n:
            self._short[len(found)][tuple(found)].append(number)
        self._items.append(_Item(place, text.prompt, len(keys), allowed))

    def hits(self, row: RowText) -> list[Hit]:
        """Every evaluation prompt that the row holds; the row goes if one of them is not allowed."""
        found = [hit for part in ("prompt", "completion") for hit in self._in_part(row, part)]
        return sorted(found, key=lambda hit: (hit.allowed, -hit.coverage))

    def _in_part(self, row: RowText, part: str) -> Iterator[Hit]:
        found, text = (row.prompt_words, row.prompt) if part == "prompt" else (row.completion_words, row.completion or "")
        in_order = grams(found, self._config.ngram)
        shared = set(filter(self._long.__contains__, in_order))
        counts = Counter(number for gram in shared for number in self._long[gram])
        for number, count in counts.items():
            item = self._items[number]
            if count >= self._config.coverage * item.grams:
                matched = self._longest_run(found, in_order, number)
                yield Hit(row.id, part, item.place, item.text, matched, count / item.grams, item.allowed)
        for length, items in self._short.items():
            for gram in set(filter(items.__contains__, grams(found, length))):
                if len(found) == length or _stands_alone(gram, text):
                    for number in items[gram]:
                        item = self._items[number]
                        yield Hit(row.id, part, item.place, item.text, " ".join(gram), 1.0, item.allowed)

    def _longest_run(self, found: Sequence[str], in_order: Sequence[tuple[str, ...]], number: int) -> str:
        best = (0, 0)
        start = None
        for index in range(len(in_order) + 1):
            if index < len(in_order) and number in self._long.get(in_order[index], ()):
                start = index if start is None else start
            elif start is not None:
                best = max(best, (index - start, start))
                start = None
        length, start_at = best
        return " ".join(found[start_at : start_at + length + self._config.ngram - 1])


def _stands_alone(gram: Sequence[str], text: str) -> bool:
    """Whether one or two sentences of a text are these words and no others, but for a label before them."""
    written = _SENTENCE_END.split(text)
    whole = [words(sentence) for sentence in written]
    bare = [words(sentence[found.end() :]) if (found := _LABEL.match(sentence)) else [] for sentence in written]
    wanted = list(gram)
    follow = [*whole[1:], []]
    return any(wanted in (one, one + two, other, other + two) for one, other, two in zip(whole, bare, follow, strict=True))


def _allow_list(path: str | None) -> tuple[list[str], list[str]]:
    """(places of evaluation rows, phrases)."""
    if path is None:
        return [], []
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"against.allow: cannot read '{path}': {error}") from None
    entries = [line for line in lines if line and not line.startswith("#")]
    places = [entry for entry in entries if re.fullmatch(r"\S+:\d+", entry)]
    return places, [entry for entry in entries if entry not in places]
