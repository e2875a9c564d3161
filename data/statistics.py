"""What a data set's card counts: rows by expert and source, pass rates, tokens, and a few rows to look at. One pass, little memory."""

import random
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from data.rows import SourceRow, row_text

BINS = 10
"""Bars of the pass-rate histogram."""
SHOWN = 20
"""Rows of each kind that the page shows."""


@dataclass
class Statistics:
    """Of the rows that were kept."""

    rows: int = 0
    lengths: array = field(default_factory=lambda: array("q"))
    """Tokens of each row's completion where every row says so, else words of what it teaches."""
    unit: str = "tokens"
    pass_rates: list[int] = field(default_factory=lambda: [0] * BINS)
    experts: Counter[str] = field(default_factory=Counter)
    sources: Counter[str] = field(default_factory=Counter)
    rewards: Counter[str] = field(default_factory=Counter)
    """`rewards` columns as they stand: each holds names and versions."""
    shown: list[SourceRow] = field(default_factory=list)

    @property
    def spread(self) -> dict[str, float]:
        """mean, median, 95th percentile, largest and sum of the lengths."""
        ordered = sorted(self.lengths) or [0]
        at = lambda share: float(ordered[min(len(ordered) - 1, int(share * len(ordered)))])  # noqa: E731
        return {"mean": sum(ordered) / len(ordered), "median": at(0.5), "95 %": at(0.95), "largest": at(1.0), "sum": float(sum(ordered))}


def count_kept(rows: Iterable[SourceRow], seed: int = 0) -> Statistics:
    """The statistics of a data set's rows, with a random sample of them."""
    found = Statistics()
    rng = random.Random(seed)
    words = array("q")
    for row in rows:
        text = row_text(row)
        values = row.values
        words.append(len(text.taught.split()))
        if isinstance(values.get("tokens"), int):
            found.lengths.append(values["tokens"])
        for column, counter in (("expert", found.experts), ("source", found.sources), ("rewards", found.rewards)):
            if isinstance(values.get(column), str):
                counter[values[column]] += 1
        rate = values.get("pass_rate")
        if isinstance(rate, int | float) and 0.0 <= rate <= 1.0:
            found.pass_rates[min(BINS - 1, int(rate * BINS))] += 1
        _sample(found.shown, row, found.rows, SHOWN, rng)
        found.rows += 1
    if len(found.lengths) != found.rows:
        found.lengths, found.unit = words, "words"
    return found


def sample_rejected(rows: Iterable[Mapping[str, Any]], seed: int = 0) -> tuple[Counter[str], list[Mapping[str, Any]]]:
    """(rows by reason, a sample of them in which each reason has its part) of `rejected.parquet`."""
    rng = random.Random(seed)
    counts: Counter[str] = Counter()
    by_reason: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        reason = str(row["reason"])
        _sample(by_reason[reason], row, counts[reason], SHOWN, rng)
        counts[reason] += 1
    shown: list[Mapping[str, Any]] = []
    while len(shown) < SHOWN and any(by_reason.values()):
        shown += [rows_of.pop(0) for rows_of in by_reason.values() if rows_of]
    return counts, shown[:SHOWN]


def _sample(shown: list[Any], row: Any, seen: int, size: int, rng: random.Random) -> None:
    """Reservoir sampling: each of the rows so far is shown with the same probability."""
    if len(shown) < size:
        shown.append(row)
    elif (place := rng.randrange(seen + 1)) < size:
        shown[place] = row
