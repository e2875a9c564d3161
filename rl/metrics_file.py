"""`metrics.jsonl`: one JSON object a step, and the same numbers for accelerate's trackers.

Row 0 is the evaluation before the first step. On resume the rows after the checkpoint are cut, so the file is what a run that never
stopped would have written; without `time/*` it is what runs are compared by.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker


class MetricsFile:
    """Appends rows; `cut` goes back to a step."""

    def __init__(self, folder: Path, trackers: Sequence[str], run: str, recipe: Mapping[str, Any]):
        self.path = folder / "metrics.jsonl"
        self.trackers = _start(trackers, folder, run, recipe)

    def cut(self, step: int) -> None:
        """Keeps the rows up to `step` that a killed process wrote whole."""
        kept = [row for row in self.rows() if row["step"] <= step] if self.path.exists() else []
        aside = self.path.with_name(".metrics.jsonl.partial")
        aside.write_text("".join(json.dumps(row) + "\n" for row in kept))
        os.replace(aside, self.path)

    def write(self, row: Mapping[str, float]) -> None:
        # JSON has no NaN, and a reader should not have to know Python's.
        clean = {k: (None if isinstance(v, float) and not math.isfinite(v) else v) for k, v in row.items()}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(clean) + "\n")
        numbers = {k: v for k, v in clean.items() if v is not None and k != "step"}
        for tracker in self.trackers:
            tracker.log(numbers, step=int(row["step"]))

    def rows(self) -> list[dict[str, Any]]:
        """All whole rows; a last line that a kill cut short is none."""
        rows = []
        for line in self.path.read_text(encoding="utf-8").splitlines(keepends=True):
            if line.endswith("\n"):
                rows.append(json.loads(line))
        return rows

    def close(self) -> None:
        for tracker in self.trackers:
            tracker.finish()


def _start(names: Sequence[str], folder: Path, run: str, recipe: Mapping[str, Any]) -> list[GeneralTracker]:
    trackers = []
    for name in names:
        kind = LOGGER_TYPE_TO_CLASS[name]
        tracker = kind(run, logging_dir=str(folder / "trackers")) if kind.requires_logging_directory else kind(run)
        tracker.start()
        tracker.store_init_configuration({"recipe": json.dumps(recipe)})
        trackers.append(tracker)
    return trackers
