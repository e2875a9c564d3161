"""Arrays on disk: what dedup must remember of every row, so that memory does not grow with the text.

Shingles are appended row by row and read back by row or in order. The file has no name in the folder: it is gone with the process.
"""

import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType

import numpy as np


class ArraySpool:
    """Arrays of uint64, one a row; memory is eight bytes a row."""

    def __init__(self, folder: Path):
        self._file = tempfile.TemporaryFile(dir=folder)
        self._ends: list[np.ndarray] = [np.zeros(1, np.int64)]
        self._offsets: np.ndarray | None = None

    def __enter__(self) -> "ArraySpool":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()

    def extend(self, values: np.ndarray, sizes: np.ndarray | Sequence[int]) -> None:
        """Appends some rows: the values of all of them, and how many are each row's."""
        self._file.write(values.astype(np.uint64, copy=False).tobytes())
        self._ends.append(self._ends[-1][-1] + np.cumsum(sizes))
        self._offsets = None

    @property
    def offsets(self) -> np.ndarray:
        """int64 [rows + 1]: row i is values offsets[i] to offsets[i + 1]."""
        if self._offsets is None:
            self._ends = [np.concatenate(self._ends)]
            self._offsets = self._ends[0]
            self._file.flush()
        return self._offsets

    def row(self, index: int) -> np.ndarray:
        """uint64 [n] of one row."""
        start, end = self.offsets[index : index + 2]
        return self._read(int(start), int(end))

    def chunks(self, rows: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """(first row, its rows' values in one array, uint64 offsets within it), so many rows at a time, in order."""
        for first in range(0, len(self.offsets) - 1, rows):
            offsets = self.offsets[first : first + rows + 1]
            yield first, self._read(int(offsets[0]), int(offsets[-1])), (offsets - offsets[0]).astype(np.uint64)

    def _read(self, start: int, end: int) -> np.ndarray:
        # pread, not a map: pages of a map count as memory of this process.
        return np.frombuffer(os.pread(self._file.fileno(), 8 * (end - start), 8 * start), np.uint64)
