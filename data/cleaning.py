"""Cleaning: filters, decontamination and dedup over a stream of rows, and a reason for every row that goes.

The source is read more than once. The first pass asks every filter and remembers of each row one byte (and, for dedup, some hashes in a
file); later ones give the copies of better rows, and the rows that stay. So a data set of any size passes, and the
result depends on the rows and the config alone.
"""

import tempfile
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.clean_config import CleanConfig
from data.decontaminate import Decontaminator, Hit
from data.dedup import Dedup, Duplicate
from data.filters import FILTERS, first_objection
from data.fim import fill_in_the_middle
from data.recipe import InputError
from data.rows import COLUMNS, SourceRow, row_text

Source = Callable[[], Iterator[SourceRow]]
"""Gives the same rows each time it is called."""


@dataclass(frozen=True)
class Rejection:
    row: SourceRow
    id: str
    reason: str
    detail: str


def reward_of(values: Mapping[str, Any]) -> float:
    """How good a row is, for which of a cluster stays: its reward, 0 where it has none."""
    reward = values.get("reward")
    return float(reward) if isinstance(reward, int | float) and not isinstance(reward, bool) else 0.0


class Cleaning:
    """One cleaning of one source: first all of `rejections()`, then `kept()` as often as wanted."""

    def __init__(
        self,
        config: CleanConfig,
        source: Source,
        work: Path,
        columns: Mapping[str, Sequence[str]] = COLUMNS,
        quality: Callable[[Mapping[str, Any]], float] = reward_of,
    ):
        """`work`: a folder with room for about a kilobyte a row, for the time of the first pass."""
        self.config = config
        self.counts: Counter[str] = Counter()
        """Rows by reason, `read` and `kept` among them."""
        self.hits: list[Hit] = []
        """What decontamination found, on allowed rows too."""
        self._source, self._work, self._columns, self._quality = source, work, columns, quality
        self._decontaminator = Decontaminator(config.against, columns) if config.against else None
        self._goes = bytearray()
        """1 for each row of the source that does not stay."""
        self._passed = array("q")
        """Which rows dedup was given."""
        self._lines = array("q")
        """Where they stand in their files."""
        self._in_file = array("H")
        """Which of `_files` that is."""
        self._files: dict[str, int] = {}

    @property
    def stages(self) -> list[str]:
        """What a row that stays has passed, in order; for its provenance."""
        config = self.config
        asked = {
            "cut_off": config.cut_off,
            "refusal": config.refusals,
            "mixed_language": config.max_foreign is not None,
            "language": config.language is not None,
            "code_in_reasoning": config.code_in_reasoning == "reject",
            "long_paragraph": config.max_paragraph_chars is not None,
        }
        filters = [name for name in FILTERS if asked.get(name, True)]
        others = {"contamination": config.against, "exact_duplicate": config.exact, "near_duplicate": config.near}
        return filters + [name for name, is_asked in others.items() if is_asked]

    def rejections(self) -> Iterator[Rejection]:
        """Every row that goes, each once: those that a filter rejects, in the source's order, then the copies."""
        with tempfile.TemporaryDirectory(dir=self._work, prefix=".cleaning-") as folder:
            with Dedup(self.config.exact, self.config.near, Path(folder)) as dedup:
                for row in self._source():
                    rejection = self._judge(row, dedup)
                    self._goes.append(rejection is not None)
                    if rejection is not None:
                        yield self._counted(rejection)
                duplicates = dedup.duplicates()
        self.counts["read"] = len(self._goes)
        yield from self._copies(duplicates)
        self.counts["kept"] = len(self._goes) - sum(self._goes)

    def _judge(self, row: SourceRow, dedup: Dedup) -> Rejection | None:
        text = row_text(row, self._columns)
        objection = first_objection(text, self.config)
        if objection is not None:
            return Rejection(row, text.id, *objection)
        hits = self._decontaminator.hits(text) if self._decontaminator else []
        self.hits += hits
        if hits and not hits[0].allowed:
            hit = hits[0]
            return Rejection(row, text.id, "contamination", f"{hit.coverage:.0%} of {hit.evaluation}: '{hit.matched}'")
        dedup.add(text, self._quality(row.values))
        self._passed.append(len(self._goes))
        self._lines.append(row.number)
        self._in_file.append(self._files.setdefault(row.file, len(self._files)))
        return None

    def _copies(self, duplicates: Mapping[int, Duplicate]) -> Iterator[Rejection]:
        """Rejections of copies, in the source's order; each says where the row stands that stays."""
        if not duplicates:
            return
        going = {self._passed[index]: duplicate for index, duplicate in duplicates.items()}
        files = list(self._files)
        for number, row in self._staying():
            if number in going:
                copy = going[number]
                alike = "" if copy.reason == "exact_duplicate" else f", Jaccard {copy.similarity:.2f}"
                detail = f"of {files[self._in_file[copy.of]]}:{self._lines[copy.of]}{alike}"
                yield self._counted(Rejection(row, row_text(row, self._columns).id, copy.reason, detail))
        for number in going:
            self._goes[number] = 1

    def _counted(self, rejection: Rejection) -> Rejection:
        self.counts[rejection.reason] += 1
        return rejection

    def _staying(self) -> Iterator[tuple[int, SourceRow]]:
        number = -1
        for number, row in enumerate(self._source()):
            if number >= len(self._goes):
                break
            if not self._goes[number]:
                yield number, row
        if number + 1 != len(self._goes):
            raise InputError("the input has changed while it was read; start again")

    def kept(self) -> Iterator[SourceRow]:
        """The rows that stay, in the source's order, code rows rewritten where the config says so."""
        for _, row in self._staying():
            if self.config.fim is None:
                yield row
            else:
                row_id = row_text(row, self._columns).id
                yield row._replace(values=fill_in_the_middle(row.values, self.config.fim, row_id))
