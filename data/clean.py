"""Cleans data sets: python -m data.clean IN… --out OUT [--against EVAL…] [--recipe R] [clean.key=value…]

Rows of prompts, of prompts and completions, or of messages, from JSONL, JSON or parquet files, come out as they are, without those
that a filter rejects, that hold an evaluation prompt, or that say what a better one says. Beside OUT stand `rejected.parquet`
(every removed row with its reason), `contamination.jsonl` (every hit with the text that matched) and `report.json` (the counts).
The keys are those of CleanConfig, in data/clean_config.py."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pydantic

from data.clean_config import AgainstConfig, CleanConfig
from data.cleaning import Cleaning, Rejection
from data.files import check_output, json_line, progress, run_command, write_file, write_lines
from data.recipe import InputError, Section, from_overrides, read_recipe
from data.rows import SourceRow, parse_columns, read_files
from data.text import visible

REJECTED_COLUMNS = {"file": "string", "row": "int64", "id": "string", "reason": "string", "detail": "string", "content": "string"}
"""`row` is the line or row in its file, `content` the whole row as JSON."""


class CleanRecipe(Section):
    """Of a recipe for anything, the `clean` section alone."""

    model_config = pydantic.ConfigDict(extra="ignore")
    clean: CleanConfig = CleanConfig()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m data.clean", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("given", nargs="+", metavar="IN", help="JSONL, JSON or parquet files; then clean.key=value as in a recipe")
    parser.add_argument("--out", required=True, type=Path, metavar="OUT", help="what stays, .jsonl or .parquet")
    parser.add_argument("--against", action="append", default=[], metavar="EVAL", help="an evaluation file; may stand several times")
    parser.add_argument("--allow", metavar="FILE", help="evaluation rows (FILE:LINE) and phrases that are no leak, one a line")
    parser.add_argument(
        "--columns", action="append", default=[], metavar="prompt=a,b", help="which column is prompt, completion, answer or id"
    )
    parser.add_argument("--recipe", metavar="R", help="a recipe; only its clean section is read")
    given = parser.parse_intermixed_args(arguments)
    return run_command(lambda: clean_command(given))


def clean_command(given: argparse.Namespace) -> None:
    inputs, overrides = split_given(given.given)
    config = read_config(given.recipe, overrides, given.against, given.allow)
    columns = parse_columns(given.columns)
    against = config.against.paths if config.against else []
    beside = given.out.parent
    rejected_path, hits_path, report_path = beside / "rejected.parquet", beside / "contamination.jsonl", beside / "report.json"
    check_output("--out", given.out, [*inputs, *against])
    for path in (rejected_path, hits_path):
        check_output(f"--out: beside it '{path.name}' is written", path, [*inputs, *against, given.out])
    _check_records(report_path, given.out)
    given.out.parent.mkdir(parents=True, exist_ok=True)

    with progress() as count:

        def source() -> Iterator[SourceRow]:
            return count("cleaning", read_files(inputs))

        cleaning = Cleaning(config, source, beside, columns)
        write_rejected(rejected_path, cleaning.rejections())
        write_lines(hits_path, (json_line(dataclasses.asdict(hit)) for hit in cleaning.hits))
        like = Path(inputs[0]) if len(inputs) == 1 and config.fim is None else None
        write_file(given.out, lambda: (row.values for row in cleaning.kept()), like)
    report = {"out": given.out.name} | clean_report(cleaning, inputs)
    write_lines(report_path, [json.dumps(report, indent=2, ensure_ascii=False)])
    for name, rows in report["counts"].items():
        print(f"{rows:>10,} {name}")


def _check_records(report: Path, out: Path) -> None:
    """InputError where the records beside `out` are those of another data set: they would be lost."""
    if not report.is_file():
        return
    try:
        there = json.loads(report.read_text(encoding="utf-8"))
        of = there.get("out", "another command's output")
        if "out" not in there and {"inputs", "clean"} <= there.keys() and out.is_file():
            of = out.name  # of a version that did not say
    except (ValueError, AttributeError):
        of = "no data set that this command knows"
    if of != out.name:
        raise InputError(f"--out: beside '{out}' are the records (report.json, …) of {of}; name a file in another folder, or move them")


def read_config(recipe: str | None, overrides: Sequence[str], against: Sequence[str], allow: str | None) -> CleanConfig:
    """The clean section of a recipe or of overrides, with what `--against` and `--allow` add."""
    whole = read_recipe(recipe, overrides, CleanRecipe) if recipe else from_overrides(overrides, CleanRecipe)
    if recipe and "clean" not in whole.model_fields_set:
        raise InputError(f"--recipe: '{recipe}' has no section clean; add it, or leave --recipe out")
    config = whole.clean
    if not against and not allow:
        return config
    paths = [*(config.against.paths if config.against else []), *against]
    if not paths:
        raise InputError("--allow goes with --against")
    update: dict[str, Any] = {"paths": paths} | ({"allow": allow} if allow else {})
    return config.model_copy(update={"against": (config.against or AgainstConfig(paths=paths)).model_copy(update=update)})


def split_given(given: Sequence[str]) -> tuple[list[str], list[str]]:
    """(files, overrides) of the arguments of a command; what is a file is one, whatever its name."""
    overrides = [word for word in given if "=" in word and not Path(word).exists()]
    files = [word for word in given if word not in overrides]
    if not files:
        raise InputError("name the files to read before the overrides")
    return files, overrides


def write_rejected(path: Path, rejections: Iterator[Rejection]) -> None:
    """`rejected.parquet`, as a stream."""
    from data.parquet import write_rows  # loads pyarrow

    write_rows(path, map(rejected_row, rejections), REJECTED_COLUMNS)


def rejected_row(rejection: Rejection) -> dict[str, Any]:
    """A row of `rejected.parquet`."""
    row = rejection.row
    detail = visible(rejection.detail)
    row_id, content = visible(rejection.id), json_line(row.values)
    return {"file": row.file, "row": row.number, "id": row_id, "reason": rejection.reason, "detail": detail, "content": content}


def clean_report(cleaning: Cleaning, inputs: Sequence[str]) -> dict[str, Any]:
    """What `report.json` holds: counts by stage and reason, the config, the inputs."""
    counts = cleaning.counts
    reasons = {reason: counts[reason] for reason in cleaning.stages if counts[reason]}
    return {
        "stages": [["read", counts["read"]], ["kept", counts["kept"]]],
        "counts": {"read": counts["read"], **reasons, "kept": counts["kept"]},
        "rejected": reasons,
        "inputs": list(inputs),
        "clean": cleaning.config.model_dump(mode="json"),
    }


if __name__ == "__main__":
    sys.exit(main())
