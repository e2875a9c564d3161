"""Dedup: rows that say the same, exactly or nearly; the best of them stays.

Exact is the same text but for white space. Near is what data/near.py says. Rows are given one by one, and what is kept of them is a
few numbers each (and their shingles, in a file), so that a data set never has to fit into memory.
"""

import hashlib
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np

from data.clean_config import NearConfig
from data.near import NearDuplicates
from data.rows import RowText


@dataclass(frozen=True)
class Duplicate:
    """Why a row goes."""

    reason: str
    """exact_duplicate or near_duplicate."""
    of: int
    """Index of the row that stays."""
    similarity: float


class Dedup:
    """A context manager; `folder` takes its files as long as it is open."""

    def __init__(self, exact: bool, near: NearConfig | None, folder: Path):
        self._exact = exact
        self._near = NearDuplicates(near, folder) if near is not None else None
        self._digests = bytearray()
        self._quality: list[float] = []

    def __enter__(self) -> "Dedup":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._near is not None:
            self._near.__exit__(kind, error, trace)

    def add(self, row: RowText, quality: float = 0.0) -> None:
        """A row; its index is the number of rows before it. Of a cluster the row of highest quality stays, then the first."""
        if self._exact:
            self._digests += _digest(row)
        if self._near is not None:
            self._near.add(row.prompt_words, None if row.completion is None else row.completion_words, row.gold)
        self._quality.append(quality)

    def duplicates(self) -> dict[int, Duplicate]:
        """Index -> why it goes, of all rows that were added."""
        copies = self._near.copies(self._quality) if self._near is not None else {}
        found = {index: Duplicate("near_duplicate", copy.of, copy.similarity) for index, copy in copies.items()}
        return found | {index: Duplicate("exact_duplicate", of, 1.0) for index, of in self._same_text().items()}

    def _same_text(self) -> dict[int, int]:
        if not self._digests:
            return {}
        keys = np.frombuffer(self._digests, dtype=np.dtype("V16"))
        order = np.lexsort((np.arange(len(keys)), -np.array(self._quality), *keys.view(np.uint64).reshape(-1, 2).T))
        found: dict[int, int] = {}
        first = -1
        for index in map(int, order):
            if first >= 0 and keys[index] == keys[first]:
                found[index] = first
            else:
                first = index
        return found


def best_of(rows: Sequence[RowText], exact: bool, near: NearConfig | None, folder: Path) -> dict[int, Duplicate]:
    """Duplicates among a few rows, the first of a cluster staying."""
    with Dedup(exact, near, folder) as dedup:
        for row in rows:
            dedup.add(row)
        return dedup.duplicates()


def _digest(row: RowText) -> bytes:
    texts = [" ".join(unicodedata.normalize("NFC", text).split()) for text in (row.prompt, row.completion) if text is not None]
    return hashlib.blake2b("\0".join(texts).encode(errors="surrogatepass"), digest_size=16).digest()
