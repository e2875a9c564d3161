"""Near duplicates: MinHash proposes pairs, and the exact Jaccard similarity of their shingles decides (arXiv:2107.06499, section 4).

A shingle is a pair of neighbouring words, counted. Similar words alone do not make a duplicate: problems that are written from one
template are as alike as copies with a few words changed. So two rows are one only if

- their shingles are similar, and so are those that are no boilerplate (a shingle of more than sqrt(rows) rows is boilerplate);
- so are their prompts, and their completions: other answers to one long prompt are no copies;
- not all that differs stands in other rows too, as what fills the places of a template does, and where some does it counts twice;
- neither has been given other numbers: not each holds a number that the other lacks;
- their gold answers do not differ. Prompts that have the same one, a number or formula rare in the data, need less similarity;
- the same shingles stand in the same order, without such an answer: a > b > c > d has all those of a > c > b > d.

Everything that is kept of a row's text is its shingles' hashes, in a file. Time is near linear in the rows, as no shingle that
counts is in many of them. Hashes have 64 bits and depend on the text alone, so that the result depends on the rows alone.
"""

import hashlib
import zlib
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from types import TracebackType

import numpy as np
from rensa import RMinHash

from data.clean_config import NearConfig
from data.spool import ArraySpool

BANDS, BAND_ROWS = 80, 3
"""A pair of similarity s becomes a candidate with probability 1 - (1 - s^3)^80: .08 at s = .1, .89 at .3, .99998 at .5."""
SEED = 20_240
CHUNK = 2_000
"""Rows that are hashed at once."""
RARE = 0.05
"""An answer of more than this share of the rows says nothing about them, if they are more than 20."""
FEW = 20
"""A shingle of so few rows is never boilerplate."""
BINS = 1 << 21
"""Counters of shingles; a collision counts one too often and matters only beside sqrt(rows)."""
LEADERS = 64
"""Rows of one bucket that another is compared with, at most."""
BOILERPLATE_SHARE = PART_SHARE = 0.6
"""Part of the threshold that must be reached by what is no boilerplate alone, by the prompts alone, by the completions alone."""
CACHED = 10_000
"""Rows whose shingles are kept in memory."""


@dataclass(frozen=True)
class Copy:
    """A row that says what another, better one says."""

    of: int
    """Index of the row that stays."""
    similarity: float


class NearDuplicates:
    """Takes rows one by one, then says which are copies. A context manager: its files lie in `folder` as long as it is open."""

    def __init__(self, config: NearConfig, folder: Path):
        self._config = config
        self._shingles = ArraySpool(folder)
        self._numbers = ArraySpool(folder)
        self._bands = ArraySpool(folder)
        self._waiting: list[list[str]] = []
        """Shingles of prompts and completions, in turns."""
        self._waiting_numbers: list[np.ndarray] = []
        self._splits = array("l")
        """How many of a row's shingles are its prompt's."""
        self._answers = array("Q")
        self._orders = array("Q")
        """A hash of all words in their order."""
        self._has_completion = bytearray()
        self._has_number = bytearray()
        """Whether the answer holds a digit; a name or `yes` is one of a few that there can be."""
        self._counts = np.zeros(BINS, np.uint32)
        self._cache: OrderedDict[int, list[np.ndarray]] = OrderedDict()

    def __enter__(self) -> "NearDuplicates":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for spool in (self._shingles, self._numbers, self._bands):
            spool.__exit__(kind, error, trace)

    def add(self, prompt: Sequence[str], completion: Sequence[str] | None, answer: str | None) -> None:
        """A row by the words of its prompt and of its completion, if any, and its gold answer; its index is the number of rows before."""
        for found in (prompt, completion or ()):
            self._waiting.append(_shingles(found))
        self._waiting_numbers.append(_numbers([*prompt, *(completion or ())]))
        self._has_completion.append(completion is not None)
        self._answers.append(_digest(answer) if answer is not None else 0)
        self._orders.append(_digest("\n".join((*prompt, "", *(completion or ())))))
        self._has_number.append(answer is not None and any(character.isdigit() for character in answer))
        if len(self._waiting) >= 2 * CHUNK:
            self._flush()

    def _flush(self) -> None:
        if self._waiting:
            sizes = np.array([len(part) for part in self._waiting])
            (flat,) = RMinHash.hash_token_sets([list(chain.from_iterable(self._waiting))])
            values = np.array(flat, np.uint64)
            np.add.at(self._counts, (values % BINS).astype(np.intp), np.uint32(1))
            self._splits.extend(sizes[::2].tolist())
            self._shingles.extend(values, sizes[::2] + sizes[1::2])
            self._numbers.extend(np.concatenate(self._waiting_numbers), [len(found) for found in self._waiting_numbers])
            self._waiting, self._waiting_numbers = [], []

    def copies(self, quality: Sequence[float]) -> dict[int, Copy]:
        """Index -> the row of which it is a copy. Of a cluster the row of highest `quality` stays, then the first; and a row goes
        only if it is similar to one that stays, not by way of a third.
        """
        self._flush()
        rows = len(self._answers)
        assert len(quality) == rows, f"{len(quality)} qualities for {rows} rows"
        if not rows:
            return {}
        self._usual = max(FEW, int(rows**0.5))
        self._rare = self._rare_answers()
        clusters = _Clusters(rows)
        self._sketch()
        for band in range(BANDS + 1):
            for bucket in self._buckets(band):
                self._link(bucket, clusters)
        found: dict[int, Copy] = {}
        for cluster in clusters.groups():
            found.update(self._best_stay(sorted(cluster, key=lambda index: (-quality[index], index))))
        return found

    def _rare_answers(self) -> np.ndarray:
        """uint64 [rows]: the answer's hash, 0 where there is none or it is no evidence for being a copy."""
        self._gold = np.array(self._answers, np.uint64)
        is_evidence = np.frombuffer(self._has_number, np.uint8) > np.frombuffer(self._has_completion, np.uint8)
        _, places, counts = np.unique(self._gold, return_inverse=True, return_counts=True)
        says_nothing = (counts > max(FEW, RARE * len(self._gold)))[places] | ~is_evidence
        return np.where(says_nothing, np.uint64(0), self._gold)

    # --- candidates -----------------------------------------------------------------------------------------------------

    def _sketch(self) -> None:
        """Band keys of every row into a file, chunk by chunk, band by band; the last one is that of all shingles."""
        for first, values, offsets in self._shingles.chunks(CHUNK):
            telling = self._telling(values)
            kept = np.concatenate([[0], np.cumsum(telling)])[offsets.astype(np.int64)].astype(np.uint64)
            matrix = RMinHash.digest_matrix_from_flat_token_hashes(values[telling], kept, BANDS * BAND_ROWS, SEED)
            sketch = np.array(matrix.to_rows(), np.uint64).reshape(-1, BANDS, BAND_ROWS)
            keys = (sketch * _MIX[:BAND_ROWS]).sum(axis=2, dtype=np.uint64)
            keys = (keys ^ self._gold[first : first + len(keys), None]) * _MIX[3]
            keys[np.diff(kept.astype(np.int64)) == 0] = 0
            with np.errstate(over="ignore"):
                whole = np.add.reduceat(np.append(values * _MIX[3] ^ values >> np.uint64(7), np.uint64(0)), offsets[:-1].astype(np.int64))
            whole[np.diff(offsets.astype(np.int64)) == 0] = 0
            self._bands.extend(np.concatenate([*keys.T, whole]), [len(whole)] * (BANDS + 1))

    def _buckets(self, band: int) -> Iterator[np.ndarray]:
        """Rows that agree in a band, two or more, in ascending order."""
        per_chunk = BANDS + 1
        chunks = range(band, len(self._bands.offsets) - 1, per_chunk)
        keys = np.concatenate([self._bands.row(index) for index in chunks])
        order = np.argsort(keys, kind="stable")
        ends = np.flatnonzero(np.diff(keys[order], append=keys[order[-1:]] + np.uint64(1)))
        starts = np.concatenate([[0], ends[:-1] + 1])
        shared = np.flatnonzero((ends > starts) & (keys[order[starts]] != 0))
        for start, end in zip(starts[shared].tolist(), ends[shared].tolist(), strict=True):
            yield order[start : end + 1]

    def _link(self, bucket: np.ndarray, clusters: "_Clusters") -> None:
        leaders: list[int] = []
        for index in map(int, bucket):
            root = clusters.root(index)
            if any(clusters.root(leader) == root for leader in leaders):
                continue
            for leader in leaders:
                if not clusters.refused(leader, index):
                    if self.similarity(leader, index) is not None:
                        clusters.join(leader, index)
                        break
                    clusters.refuse(leader, index)
            else:
                if len(leaders) < LEADERS:
                    leaders.append(index)

    # --- the decision ---------------------------------------------------------------------------------------------------

    def similarity(self, a: int, b: int) -> float | None:
        """The exact Jaccard similarity of two rows' shingles if they are one, else None."""
        if self._gold[a] != self._gold[b]:
            return None
        threshold = self._config.same_answer if self._rare[a] else self._config.threshold
        ours, theirs = self._row(a), self._row(b)
        similarity = _jaccard(np.concatenate(ours), np.concatenate(theirs))
        if similarity < threshold or _exchanged(self._numbers.row(a), self._numbers.row(b)):
            return None
        if not self._rare[a] and self._varied(ours, theirs) < threshold:
            return None
        if similarity == 1.0 and not self._rare[a] and self._orders[a] != self._orders[b]:
            return None
        if similarity < 1.0:
            telling = [np.concatenate(row)[self._telling(np.concatenate(row))] for row in (ours, theirs)]
            if _jaccard(*telling) < BOILERPLATE_SHARE * threshold:
                return None
            if any(_jaccard(x, y) < PART_SHARE * threshold for x, y in zip(ours, theirs, strict=True) if len(x) or len(y)):
                return None
        return similarity

    def _varied(self, ours: list[np.ndarray], theirs: list[np.ndarray]) -> float:
        """Their similarity if a difference counts twice that stands in other rows too; 0 if every one of them does."""
        one, other = np.concatenate(ours), np.concatenate(theirs)
        differences = np.setxor1d(one, other)
        common = len(np.intersect1d(one, other))
        twice = int((self._counts[differences % BINS] > self._usual // 4).sum())
        if 0 < len(differences) == twice:
            return 0.0
        return common / max(1, common + len(differences) + twice)

    def _telling(self, shingles: np.ndarray) -> np.ndarray:
        """Which are no boilerplate."""
        return self._counts[shingles % BINS] <= self._usual

    def _row(self, index: int) -> list[np.ndarray]:
        """Shingles of the prompt, and of the completion."""
        if index not in self._cache:
            self._cache[index] = np.split(self._shingles.row(index), [self._splits[index]])
            if len(self._cache) > CACHED:
                self._cache.popitem(last=False)
        return self._cache[index]

    def _best_stay(self, cluster: list[int]) -> Iterator[tuple[int, Copy]]:
        kept: list[int] = []
        for index in cluster:
            for better in kept:
                similarity = self.similarity(better, index)
                if similarity is not None:
                    yield index, Copy(better, similarity)
                    break
            else:
                kept.append(index)


class _Clusters:
    """Union-find over the rows, and the pairs that were looked at in vain."""

    def __init__(self, rows: int):
        self._parent = np.arange(rows, dtype=np.int64)
        self._refused: set[tuple[int, int]] = set()

    def root(self, index: int) -> int:
        while self._parent[index] != index:
            self._parent[index] = self._parent[self._parent[index]]
            index = int(self._parent[index])
        return index

    def join(self, a: int, b: int) -> None:
        a, b = self.root(a), self.root(b)
        self._parent[max(a, b)] = min(a, b)

    def refuse(self, a: int, b: int) -> None:
        if len(self._refused) > 1_000_000:
            self._refused.clear()
        self._refused.add((a, b))

    def refused(self, a: int, b: int) -> bool:
        return (a, b) in self._refused

    def groups(self) -> Iterator[list[int]]:
        members: dict[int, list[int]] = {}
        for index in np.flatnonzero(self._parent != np.arange(len(self._parent))):
            members.setdefault(self.root(int(index)), []).append(int(index))
        for root, others in sorted(members.items()):
            yield [root, *others]


_MIX = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0xD6E8FEB86659FD93], np.uint64)


def _digest(text: str) -> int:
    """A 64-bit hash, never 0."""
    return int.from_bytes(hashlib.blake2b(text.lower().encode(errors="surrogatepass"), digest_size=8).digest(), "big") or 1


def _shingles(found: Sequence[str]) -> list[str]:
    """Pairs of neighbouring words, the n-th of the same kind as a kind of its own: f(f(x)) is not f(f(f(x)))."""
    pairs = [f"{a} {b}" for a, b in zip(found, found[1:], strict=False)] or list(found[:1])
    if len(set(pairs)) == len(pairs):
        return pairs
    seen: dict[str, int] = {}
    for index, pair in enumerate(pairs):
        count = seen[pair] = seen.get(pair, 0) + 1
        if count > 1:
            pairs[index] = f"{pair} {count}"
    return pairs


def _numbers(found: Sequence[str]) -> np.ndarray:
    """uint64: hashes of the words that hold a digit, each once."""
    return np.array([zlib.crc32(word.encode()) for word in set(found) if not word.isalpha() and word not in "-+*/^=<>"], np.uint64)


def _exchanged(ours: np.ndarray, theirs: np.ndarray) -> bool:
    """Whether each has a number that the other lacks."""
    common = len(np.intersect1d(ours, theirs, assume_unique=True))
    return common < min(len(ours), len(theirs))


def _jaccard(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Shingles in both / shingles in either; 0 for none."""
    ours, theirs = np.unique(ours), np.unique(theirs)
    common = len(np.intersect1d(ours, theirs, assume_unique=True))
    return common / max(1, len(ours) + len(theirs) - common)
