"""Takes back a reward or an expert: python -m data.retract DATASET --reward NAME@VERSION | --expert NAME --out OUT

DATASET is a folder as curation writes it, or a file of records; OUT is one of the same kind, without the rows that rest on what is
taken back. In a folder, those rows stand in `rejected.parquet` with their reason, and the card is written anew."""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from data.card import CARD_FILES, train_file, write_card
from data.clean import REJECTED_COLUMNS, rejected_row
from data.cleaning import Rejection
from data.files import check_output, progress, run_command, write_file, write_lines
from data.recipe import InputError
from data.rows import SourceRow, read_files, row_text


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m data.retract", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dataset", type=Path, metavar="DATASET", help="a folder with train.parquet or train.jsonl, or a file of records")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--reward", metavar="NAME@VERSION", help="rows that were judged by this version of a reward function")
    what.add_argument("--expert", metavar="NAME", help="rows that this expert wrote")
    parser.add_argument("--out", required=True, type=Path, metavar="OUT", help="another folder, or another .jsonl or .parquet file")
    given = parser.parse_args(arguments)
    return run_command(lambda: retract_command(given))


def retract_command(given: argparse.Namespace) -> None:
    if given.reward is not None and not all(given.reward.rpartition("@")):
        raise InputError(f"--reward {given.reward}: name the version too, as in math_answer@1")
    is_folder = given.dataset.is_dir()
    file = train_file(given.dataset) if is_folder else given.dataset
    if is_folder:
        if given.out.suffix or (given.out.exists() and given.out.samefile(given.dataset)):
            raise InputError(f"--out: '{given.out}' has to be another folder, as the data set is one")
    else:
        check_output("--out", given.out, [file])
    what = f"reward {given.reward}" if given.reward is not None else f"expert {given.expert}"

    with progress() as count:
        _check_some(count("looking", read_files([file])), given.reward, given.expert)

        def staying() -> Iterator[dict[str, Any]]:
            return (row.values for row in count("writing", read_files([file])) if not rests_on(row, given.reward, given.expert))

        if is_folder:
            _retract_folder(given.dataset, given.out, file, staying, given, what)
        else:
            write_file(given.out, staying, like=file)
    print(f"{given.out}: without what rests on {what}")


def rests_on(row: SourceRow, reward: str | None, expert: str | None) -> bool:
    """Whether a record rests on `NAME@VERSION` of a reward, or was written by an expert; InputError if it is no record."""
    if reward is not None:
        return reward in _rewards(row)
    return _expert(row) == expert


def _rewards(row: SourceRow) -> list[str]:
    held = row.values.get("rewards")
    try:
        versions = json.loads(held) if isinstance(held, str) else held
    except json.JSONDecodeError:
        versions = None
    if not isinstance(versions, dict):
        raise InputError(f"{row.place}: no record: `rewards` is no object of names and versions; only records can be retracted from")
    return [f"{name}@{version}" for name, version in versions.items() if version is not None]


def _expert(row: SourceRow) -> str:
    held = row.values.get("expert")
    if not isinstance(held, str):
        raise InputError(f"{row.place}: no record: it has no `expert`; only records can be retracted from")
    return held


def _check_some(rows: Iterator[SourceRow], reward: str | None, expert: str | None) -> None:
    """InputError, with what there is, if nothing rests on what is taken back."""
    held: Counter[str] = Counter()
    for row in rows:
        held.update(_rewards(row) if reward is not None else [_expert(row)])
    wanted = reward if reward is not None else expert
    if wanted not in held:
        there = ", ".join(f"{name} ({rows})" for name, rows in sorted(held.items())) or "nothing"
        raise InputError(f"no row rests on '{wanted}'; the data set has {there}")


def _retract_folder(folder: Path, out: Path, file: Path, staying: Any, given: argparse.Namespace, what: str) -> None:
    from data.parquet import write_rows  # loads pyarrow

    out.mkdir(parents=True, exist_ok=True)

    def rejected() -> Iterator[dict[str, Any]]:
        old = folder / "rejected.parquet"
        if old.is_file():
            yield from (row.values for row in read_files([old]))
        for row in read_files([file]):
            if rests_on(row, given.reward, given.expert):
                yield rejected_row(Rejection(row, row_text(row).id, "retracted", what))

    write_rows(out / "rejected.parquet", rejected(), REJECTED_COLUMNS)
    for name in ("train.parquet", "train.jsonl"):
        if (folder / name).is_file():
            write_file(out / name, staying, like=file)
    for name in CARD_FILES:
        if (folder / name).is_file():
            write_lines(out / name, (folder / name).read_bytes().decode().removesuffix("\n").split("\n"))
    report_path = out / "report.json"
    report = json.loads(report_path.read_text(encoding="utf-8")) if report_path.is_file() else {"stages": []}
    report.pop("mix", None)  # its shares are no longer these rows'
    left = sum(1 for _ in staying())
    report["stages"] = [*report["stages"], [f"without {what}", left]]
    write_lines(report_path, [json.dumps(report, indent=2, ensure_ascii=False)])
    write_card(out)


if __name__ == "__main__":
    sys.exit(main())
