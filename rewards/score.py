"""Scores the rows of a file: python -m rewards.score --recipe R | --reward NAME [--plugin P] --in rows.jsonl --out scored.jsonl

Every row comes out in its order with `reward` (a number or null), `status`, `detail` and `parts`. What was scored stands in a
journal beside the output, so that a run that was killed goes on where it was: no row that the journal holds is scored again. The
output is written anew from the journal, row by row, while scoring goes on. Exit code 1 if more than `rewards.max_error_rate` of
the scores failed."""

import argparse
import hashlib
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import IO, Any

import pydantic

from data.files import check_not_input, json_line
from data.journal import Journal, Slot
from data.recipe import InputError, Section, parse, read_recipe, resolved_yaml
from data.values import Score
from rewards.config import RewardsConfig
from rewards.rows import Rows, check_rows, read_rows
from rewards.scorer import Scorer
from rewards.versions import META, changed_reward, reward_versions

AHEAD = 256
"""Groups submitted before the first of them is written."""
CHUNK = 64
"""Groups that are begun in one transaction."""
SAY_S = 5.0
"""Seconds between two lines of progress where nobody watches; on a terminal the line changes ten times a second."""


class ScoreRecipe(Section):
    """Of a recipe for anything, the `rewards` section alone."""

    model_config = pydantic.ConfigDict(extra="ignore")
    rewards: RewardsConfig


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m rewards.score", description="Scores rows {prompt, completion, …columns}.")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--recipe", help="a recipe; only its rewards section is read")
    source.add_argument("--reward", action="append", help="a reward function by name; may stand several times")
    parser.add_argument("--plugin", action="append", default=[], help="./file.py:function, package.module:function, or an entry point")
    parser.add_argument("--in", dest="rows", required=True, type=Path, metavar="ROWS", help="a JSONL or parquet file")
    parser.add_argument("--out", required=True, type=Path, metavar="SCORED.jsonl")
    parser.add_argument("overrides", nargs="*", metavar="rewards.key=value")
    given = parser.parse_args(arguments)
    try:
        config = read_config(given.recipe, given.reward, given.plugin, given.overrides)
        return score_file(config, given.rows, given.out, sys.stderr)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2


def read_config(recipe: str | None, rewards: Sequence[str] | None, plugins: Sequence[str], overrides: Sequence[str]) -> RewardsConfig:
    """The rewards section, of a recipe or of the names on the command line."""
    if recipe is not None:
        if plugins:
            raise InputError("--plugin goes with --reward; a recipe names its own in rewards.plugins")
        return read_recipe(recipe, overrides, ScoreRecipe).rewards
    if overrides:
        raise InputError(f"'{overrides[0]}': overrides go with --recipe")
    section = {"plugins": list(plugins), "parts": [{"name": name} for name in rewards or ()]}
    return parse({"rewards": section}, ScoreRecipe, "command line").rewards


def score_file(config: RewardsConfig, rows_path: Path, out_path: Path, log: IO[str]) -> int:
    """Scores a file; the exit code."""
    total = check_rows(rows_path, config)
    check_not_input("--out", out_path, [rows_path])
    if out_path.suffix == ".parquet":
        raise InputError(f"--out: '{out_path}': scores are written row by row, as JSONL; name a .jsonl file")
    out_path.parent.mkdir(parents=True, exist_ok=True)
    with Journal(out_path.with_name(out_path.name + ".journal.sqlite")) as journal:
        _same_rewards(journal, config, out_path)
        with Scorer(config) as scorer, out_path.open("w", encoding="utf-8") as out:
            run = ScoreRun(journal, scorer, rows_path, out, total, log)
            run.go()
            journal.flush()
            if run.written != total:
                raise InputError(
                    f"--in: '{rows_path}' changed while it was scored: it had {total} rows, and {run.written} were written; start again"
                )
            return run.finish(config.max_error_rate)


def _same_rewards(journal: Journal, config: RewardsConfig, out_path: Path) -> None:
    digest = hashlib.sha256(resolved_yaml(config).encode()).hexdigest()
    held = journal.meta("rewards")
    if held not in (None, digest):
        raise InputError(
            f"--out: '{out_path}' was begun with other rewards; remove {journal.path.name} to score anew, or choose another file"
        )
    versions = reward_versions(config)
    changed = changed_reward(journal, versions)
    if changed is not None:
        raise InputError(
            f"--out: the reward '{changed}' has changed since '{out_path}' was begun; restore it, "
            f"or remove {journal.path.name} to score anew"
        )
    journal.set_meta(**{"rewards": digest, META: versions})


class ScoreRun:
    """Rows in, Scores out, in the order of the rows."""

    def __init__(self, journal: Journal, scorer: Scorer, rows_path: Path, out: IO[str], total: int, log: IO[str]) -> None:
        self._journal, self._scorer, self._rows_path, self._out, self._total, self._log = (
            journal,
            scorer,
            rows_path,
            out,
            total,
            log,
        )
        self._waiting: dict[int, Rows] = {}
        """Groups that are not written, by place of their first row; in order."""
        self._names: dict[int, str] = {}
        """Their ids in the journal."""
        self._scores: dict[int, Sequence[Score]] = {}
        """Of groups that wait for one before them."""
        self._failed: list[Score] = []
        self._statuses: Counter[str] = Counter()
        self._values: dict[str, list[float]] = defaultdict(list)
        self._seconds: dict[str, float] = defaultdict(float)
        self.written = self._held = 0
        self._began = self._said = time.monotonic()

    def go(self) -> None:
        groups = read_rows(self._rows_path)
        while chunk := list(islice(groups, CHUNK)):
            with self._journal.transaction():
                for group in chunk:
                    self._begin(group)
            while len(self._waiting) >= AHEAD:
                self._take()
        while self._waiting:
            self._take()

    def _begin(self, group: Rows) -> None:
        try:
            name = self._journal.begin([Slot("score", group.first, group.digest)], len(group.rows))[0].group_id
        except InputError:
            path = self._journal.path.name
            raise InputError(f"--in: row {group.first + 1} is not the one that was scored; remove {path} to score anew") from None
        held = self._journal.scores(name)
        self._waiting[group.first], self._names[group.first] = group, name
        if len(held) == len(group.rows):
            self._scores[group.first] = [held[index] for index in range(len(group.rows))]
            self._held += len(group.rows)
        else:
            self._scorer.submit(group.first, group.job())

    def _take(self) -> None:
        """Keeps what has been scored, then writes every group whose turn it is."""
        first = next(iter(self._waiting))
        done = self._scorer.poll(0.0 if first in self._scores else 0.1)
        with self._journal.transaction():
            for key, scores in done:
                assert isinstance(key, int)
                self._journal.put_scores(self._names[key], dict(enumerate(scores)))
                self._scores[key] = scores
        for first in list(self._waiting):
            if first not in self._scores:
                break
            for row, score in zip(self._waiting.pop(first).rows, self._scores.pop(first), strict=True):
                self._write(row, score)
            del self._names[first]
        self._say()

    def _write(self, row: dict[str, Any], score: Score) -> None:
        scored = {**row, "reward": score.value, "status": score.status, "detail": score.detail, "parts": dict(score.parts)}
        self._out.write(json_line(scored) + "\n")
        self.written += 1
        self._statuses[score.status] += 1
        for name, value in {"reward": score.value, **score.parts}.items():
            if value is not None:
                self._values[name].append(value)
        if score.status in ("timeout", "error"):
            self._failed.append(score)

    def _say(self) -> None:
        now = time.monotonic()
        is_terminal = self._log.isatty()
        if now - self._said < (0.1 if is_terminal else SAY_S):
            return
        self._said = now
        rate = (self.written - self._held) / (now - self._began)
        left = f", {(self._total - self.written) / rate:.0f} s left" if rate > 0 else ""
        line = f"{self.written} of {self._total} rows, {rate:.0f}/s{left}, {len(self._failed)} failed"
        print(f"\r{line}\x1b[K" if is_terminal else line, end="" if is_terminal else "\n", file=self._log, flush=True)

    def finish(self, max_error_rate: float) -> int:
        """Reports what was scored; the exit code."""
        seconds = time.monotonic() - self._began
        for name, taken in self._scorer.metrics().items():
            if name.startswith("time/reward/"):
                self._seconds[name.removeprefix("time/reward/").removesuffix("_s")] += taken
        counts = ", ".join(f"{count} {status}" for status, count in sorted(self._statuses.items()))
        held = f" ({self._held} of them from the journal)" if self._held else ""
        end = "\r\x1b[K" if self._log.isatty() else ""
        print(f"{end}{self.written} rows{held} in {seconds:.1f} s: {counts}", file=self._log)
        for name, values in self._values.items():
            spent = f", {self._seconds[name]:.2f} s in its processes" if name in self._seconds else ""
            print(f"  {name}: mean {fmean(values):.4f} over {len(values)}{spent}", file=self._log)
        if len(self._failed) > max_error_rate * self.written:
            print(f"more than rewards.max_error_rate {max_error_rate:g} failed: {self._scorer.explain(self._failed)}", file=self._log)
            return 1
        return 0


if __name__ == "__main__":
    sys.exit(main())
