"""Mixes data sets: python -m data.mix reasoning.parquet=3 general.jsonl=1 --out OUT [--total N] [--unit tokens --tokenizer T]

A number after a source is its weight, or with --counts how many rows (or tokens) are taken. Without --total, weights take as much
as there is without using a row twice. Which rows are taken, and how sources alternate, depends on the seed and the rows alone; within
a source the order stays. Rows are counted in a first pass and streamed in a second one, and are written as they are."""

import argparse
import json
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from data.files import check_output, progress, run_command, write_file, write_lines
from data.prompt_stream import permutation
from data.recipe import InputError
from data.rows import SourceRow, parse_columns, read_files, row_text

BATCH = 1_000
"""Rows tokenised in one call."""


@dataclass(frozen=True)
class MixSource:
    path: str
    """Its file, or another name that tells it from the others."""
    share: float
    """Its weight, or how much is taken of it."""


@dataclass(frozen=True)
class Plan:
    """What is taken of one source."""

    source: MixSource
    rounds: list[np.ndarray]
    """bool [rows] for each time the source is read, at least once: which rows are taken. One round, unless rows are repeated."""
    units: int
    """Rows or tokens that this makes."""

    @property
    def rows(self) -> int:
        return int(sum(taken.sum() for taken in self.rounds))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m data.mix", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="+", metavar="FILE=NUMBER", help="a JSONL, JSON or parquet file and its weight or count")
    parser.add_argument("--out", required=True, type=Path, metavar="OUT", help="the mixture, .jsonl or .parquet")
    parser.add_argument("--counts", action="store_true", help="numbers are counts in units, not weights")
    parser.add_argument("--total", type=int, metavar="N", help="with weights: units of the mixture")
    parser.add_argument("--unit", choices=["rows", "tokens"], default="rows", help="what weights and counts count")
    parser.add_argument("--tokenizer", metavar="T", help="with --unit tokens: a tokenizer.json, or the folder that holds it")
    parser.add_argument("--repeat", action="store_true", help="uses rows again where a source is too small, as seldom as can be")
    parser.add_argument("--seed", type=int, default=0, help="which rows are taken, and in which order")
    parser.add_argument("--columns", action="append", default=[], metavar="prompt=a,b", help="which column is prompt or completion")
    given = parser.parse_intermixed_args(arguments)
    return run_command(lambda: mix_command(given))


def mix_command(given: argparse.Namespace) -> None:
    sources = [parse_source(text) for text in given.sources]
    check_output("--out", given.out, [source.path for source in sources])
    if (given.unit == "tokens") != (given.tokenizer is not None):
        raise InputError("--unit tokens and --tokenizer go together: tokens are those of a tokenizer")
    if given.counts and given.total is not None:
        raise InputError("--total goes with weights; counts make their own total")
    if given.total is not None and given.total < 1:
        raise InputError(f"--total {given.total}: a mixture has one row or more")
    if given.counts and any(not source.share.is_integer() for source in sources):
        raise InputError("--counts: counts are whole numbers; leave --counts out, and numbers are weights")
    if given.seed < 0:
        raise InputError(f"--seed {given.seed}: a seed is 0 or more")
    columns = parse_columns(given.columns)
    with progress() as count:
        sizes = [_sizes(count(f"counting {source.path}", read_files([source.path])), given.tokenizer, columns) for source in sources]
        plans = plan_mix(sources, sizes, counts=given.counts, total=given.total, repeat=given.repeat, seed=given.seed)

        def rows() -> Iterator[SourceRow]:
            return count("mixing", mixed(plans, given.seed, lambda path: read_files([path])))

        write_file(given.out, lambda: (row.values for row in rows()))
    report = mix_report(plans, given.unit, given.seed)
    write_lines(given.out.with_name(f"{given.out.stem}.mix.json"), [json.dumps(report, indent=2, ensure_ascii=False)])
    for part in report["sources"]:
        print(f"{part['rows']:>10,} rows {part['units']:>12,} {given.unit} {part['share']:>6.1%}  {part['path']}")


def parse_source(text: str) -> MixSource:
    """`FILE=NUMBER`."""
    path, equals, number = text.rpartition("=")
    try:
        share = float(number)
    except ValueError:
        share = -1.0
    if not equals or not path or not 0 < share < float("inf"):
        raise InputError(f"'{text}': write a source as FILE=NUMBER, with its weight or count above 0")
    return MixSource(path, share)


def plan_mix(
    sources: Sequence[MixSource], sizes: Sequence[np.ndarray], *, counts: bool, total: int | None, repeat: bool, seed: int
) -> list[Plan]:
    """What is taken of each source; `sizes` are int64 [rows] of each, the units (1, or tokens) of each row.

    InputError where a source is empty or, without `repeat`, holds less than is wanted.
    """
    held = [int(size.sum()) for size in sizes]
    for source, units in zip(sources, held, strict=True):
        if not units:
            raise InputError(f"{source.path}: holds nothing to mix")
    if counts:
        wanted = [source.share for source in sources]
    else:
        weights = sum(source.share for source in sources)
        whole = total if total is not None else min(units / source.share for source, units in zip(sources, held, strict=True)) * weights
        wanted = [whole * source.share / weights for source in sources]
    plans = []
    for number, (source, size) in enumerate(zip(sources, sizes, strict=True)):
        if wanted[number] > held[number] + 1e-6 and not repeat:
            raise InputError(f"{source.path}: holds {held[number]:,} and {wanted[number]:,.0f} are wanted; take less, or set repeat")
        plans.append(_take(source, size, wanted[number], seed + number))
    if not any(plan.units for plan in plans):
        raise InputError(f"{sum(wanted):g} of {len(sources)} sources are no whole row of any; take more")
    return plans


def _take(source: MixSource, size: np.ndarray, wanted: float, seed: int) -> Plan:
    """Rows in a random order until they make what is wanted, to the nearest row; whole rounds first where that is more than all."""
    whole_rounds = int(wanted / size.sum() + 1e-9)
    rest = wanted - whole_rounds * int(size.sum())
    rounds = [np.ones(len(size), bool) for _ in range(whole_rounds)]
    order = permutation(len(size), seed, whole_rounds)
    reached = np.concatenate([[0], np.cumsum(size[order])])
    taken = np.zeros(len(size), bool)
    taken[order[: int(np.abs(reached - rest).argmin())]] = True
    if taken.any() or not rounds:
        rounds.append(taken)
    return Plan(source, rounds, int(sum(size[chosen].sum() for chosen in rounds)))


def mixed(plans: Sequence[Plan], seed: int, read: Callable[[str], Iterator[SourceRow]]) -> Iterator[SourceRow]:
    """The rows of a mixture, as a stream; `read` gives the rows of a source by its path. Each next row is of a source with the
    probability of its share of what is left."""
    rng = random.Random(f"mix {seed}")
    left = [plan.rows for plan in plans]
    streams = [_taken_rows(plan, read) for plan in plans]
    while any(left):
        place = rng.randrange(sum(left))
        number = 0
        while place >= left[number]:
            place -= left[number]
            number += 1
        left[number] -= 1
        yield next(streams[number])


def _taken_rows(plan: Plan, read: Callable[[str], Iterator[SourceRow]]) -> Iterator[SourceRow]:
    for taken in plan.rounds:
        for is_taken, row in zip(taken, read(plan.source.path), strict=True):
            if is_taken:
                yield row


def _sizes(rows: Iterator[SourceRow], tokenizer: str | None, columns: Mapping[str, Sequence[str]]) -> np.ndarray:
    """int64 [rows]: 1 for each row, or the tokens of its prompt and completion."""
    if tokenizer is None:
        return np.ones(sum(1 for _ in rows), np.int64)
    count = token_counter(tokenizer)
    sizes: list[int] = []
    while batch := list(islice(rows, BATCH)):
        texts = [row_text(row, columns) for row in batch]
        sizes += count([f"{text.prompt}\n{text.completion or ''}" for text in texts])
    return np.array(sizes, np.int64)


def token_counter(path: str) -> Callable[[list[str]], list[int]]:
    """A function that counts the tokens of texts; InputError if there is no tokenizer."""
    from tokenizers import Tokenizer  # only where tokens are counted

    file = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise InputError(f"--tokenizer: no file '{file}'")
    tokenizer: Any = Tokenizer.from_file(str(file))
    return lambda texts: [len(encoding.ids) for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


def mix_report(plans: Sequence[Plan], unit: str, seed: int) -> dict[str, Any]:
    """What was taken of each source."""
    units = sum(plan.units for plan in plans)
    parts = [{"path": plan.source.path, "rows": plan.rows, "units": plan.units, "share": plan.units / units} for plan in plans]
    return {"unit": unit, "seed": seed, "units": units, "rows": sum(plan.rows for plan in plans), "sources": parts}


if __name__ == "__main__":
    sys.exit(main())
