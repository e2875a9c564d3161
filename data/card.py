"""A data set's card: python -m data.card FOLDER [--licence SOURCE=LICENCE…] [--recipe FILE]

FOLDER holds `train.parquet` or `train.jsonl`, and, where curation or cleaning wrote them, `rejected.parquet` and `report.json`. The
card is `README.md` as `datasets` and hubs read it (counts by stage, pass rates, tokens, licences of the sources, recipe), with
`pass_rates.svg`; and `index.html`, one page with the funnel and a sample of kept and rejected rows, for any browser."""

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data.files import run_command, write_lines
from data.page import page
from data.recipe import InputError
from data.rows import read_files
from data.statistics import BINS, Statistics, count_kept, sample_rejected
from data.text import visible

CARD_FILES = ("report.json", "recipe.yaml", "licences.json", "contamination.jsonl")
"""What a card is made of, beside the rows."""
HEAD = "---\nconfigs:\n"
"""How a card begins."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m data.card", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="the data set's folder; the card is written into it")
    parser.add_argument("--licence", action="append", default=[], metavar="SOURCE=LICENCE", help="a source and its licence")
    parser.add_argument("--recipe", type=Path, metavar="FILE", help="the recipe that made it; kept as recipe.yaml in the folder")
    given = parser.parse_args(arguments)
    return run_command(lambda: card_command(given))


def card_command(given: argparse.Namespace) -> None:
    licences = dict(_parse_licence(text) for text in given.licence)
    train_file(given.folder)
    if given.recipe is not None:
        try:
            text = given.recipe.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--recipe: cannot read '{given.recipe}': {error}") from None
        write_lines(given.folder / "recipe.yaml", text.splitlines())
    write_card(given.folder, licences)
    print(f"{given.folder / 'README.md'} and {given.folder / 'index.html'}")


def write_card(folder: Path, licences: Mapping[str, str] | None = None) -> None:
    """Writes README.md, pass_rates.svg and index.html into a data set's folder.

    `licences`, source -> licence, are added to those in `licences.json`, where they are kept. InputError for a folder without rows
    or with a report that is none.
    """
    train = train_file(folder)
    if (folder / "README.md").is_file() and not (folder / "README.md").read_text(encoding="utf-8", errors="replace").startswith(HEAD):
        raise InputError(f"{folder / 'README.md'}: is no card of this command, and would be lost; move it to another name")
    known = _read_json(folder / "licences.json") | dict(licences or {})
    report = _read_json(folder / "report.json")
    kept = count_kept(read_files([train]))
    rejected = folder / "rejected.parquet"
    reasons: Counter[str] = Counter()
    shown: list[Mapping[str, Any]] = []
    if rejected.is_file():
        reasons, shown = sample_rejected(row.values for row in read_files([rejected]))
    stages = [(str(stage), int(rows)) for stage, rows in report.get("stages", [])] or [("kept", kept.rows)]
    name = folder.resolve().name
    write_lines(folder / "licences.json", [json.dumps(known, indent=2, ensure_ascii=False)])
    if sum(kept.pass_rates):
        write_lines(folder / "pass_rates.svg", [histogram(kept.pass_rates)])
    write_lines(folder / "index.html", [page(name, stages, reasons, kept.shown, shown)])
    recipe = folder / "recipe.yaml"
    recipe_text = recipe.read_text(encoding="utf-8") if recipe.is_file() else ""
    write_lines(folder / "README.md", [readme(name, train.name, stages, reasons, kept, known, recipe_text, report.get("mix"))])


def train_file(folder: Path) -> Path:
    """The rows of a data set's folder."""
    for name in ("train.parquet", "train.jsonl"):
        if (folder / name).is_file():
            return folder / name
    raise InputError(f"{folder}: no data set; there is neither train.parquet nor train.jsonl in it")


def readme(
    name: str,
    train: str,
    stages: Sequence[tuple[str, int]],
    reasons: Mapping[str, int],
    kept: Statistics,
    licences: Mapping[str, str],
    recipe: str,
    mix: Mapping[str, Any] | None = None,
) -> str:
    """The card as text, with the mixture if the report has one. Its head tells `datasets` which file is which, so that rejected rows are
    not taken for training rows."""
    configs = [f"- config_name: default\n  data_files:\n  - split: train\n    path: {train}"]
    if reasons:
        configs.append("- config_name: rejected\n  data_files:\n  - split: train\n    path: rejected.parquet")
    parts = [f"{HEAD}{chr(10).join(configs)}\n---\n\n# {_cell(name)}\n\n{kept.rows:,} rows. See index.html for some of them."]
    parts.append("## Counts by stage\n\n" + _table(("stage", "rows"), [(stage, f"{rows:,}") for stage, rows in stages]))
    if reasons:
        parts.append("## Rejected, by reason\n\n" + _table(("reason", "rows"), [(why, f"{n:,}") for why, n in sorted(reasons.items())]))
    if mix:
        parts.append(_mixture(mix))
    if kept.experts:
        parts.append("## Experts\n\n" + _table(("expert", "rows"), [(who, f"{n:,}") for who, n in sorted(kept.experts.items())]))
    if sum(kept.pass_rates):
        parts.append("## Pass rates\n\nOf the group that a row was chosen from.\n\n![rows by pass rate](pass_rates.svg)")
    spread = [(what, f"{value:,.1f}" if what == "mean" else f"{value:,.0f}") for what, value in kept.spread.items()]
    parts.append(f"## {kept.unit.capitalize()} of a completion\n\n" + _table((kept.unit, ""), spread))
    sources = sorted({*kept.sources, *licences})
    rows = [(source, f"{kept.sources[source]:,}" if kept.sources else "", licences.get(source, "not stated")) for source in sources]
    parts.append("## Sources and licences\n\n" + (_table(("source", "rows", "licence"), rows) if rows else "Not stated."))
    if recipe:
        fence = "`" * (3 + max([0, *map(len, re.findall("`{3,}", recipe))]))
        parts.append(f"## Recipe\n\n{fence}yaml\n{recipe.rstrip()}\n{fence}")
    return "\n\n".join(parts)


def _mixture(mix: Mapping[str, Any]) -> str:
    """What data/mix.py's report says: how much of each source was taken."""
    head = ["source", "rows", "share"] if mix["unit"] == "rows" else ["source", "rows", mix["unit"], "share"]
    rows = []
    for part in mix["sources"]:
        units = [] if mix["unit"] == "rows" else [f"{part['units']:,}"]
        rows.append([part["path"], f"{part['rows']:,}", *units, f"{part['share']:.1%}"])
    return f"## Mixture\n\nBy {mix['unit']}, seed {mix['seed']}.\n\n{_table(head, rows)}"


def histogram(counts: Sequence[int]) -> str:
    """Bars of rows by pass rate, from 0 to 1, as SVG."""
    width, height, gap, base = 480, 200, 4, 170
    step = (width - 20) / BINS
    most = max(*counts, 1)
    bars = []
    for number, rows in enumerate(counts):
        tall = 140 * rows / most
        x = 10 + number * step
        bars.append(f'<rect x="{x + gap / 2:.1f}" y="{base - tall:.1f}" width="{step - gap:.1f}" height="{tall:.1f}" fill="#3d6fb5"/>')
        bars.append(f'<text x="{x + step / 2:.1f}" y="{base - tall - 4:.1f}" text-anchor="middle">{rows:,}</text>')
        bars.append(f'<text x="{x:.1f}" y="{base + 16}" text-anchor="middle">{number / BINS:g}</text>')
    bars.append(f'<text x="{width - 10}" y="{base + 16}" text-anchor="middle">1</text>')
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" font-size="10"'
    ground = '<title>rows by pass rate</title><rect width="100%" height="100%" fill="#fff"/>'
    return f'{head} font-family="sans-serif">{ground}{"".join(bars)}</svg>'


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(_cell(cell) for cell in line)} |" for line in lines)


def _cell(text: str) -> str:
    """Text in a table of Markdown: one line, no markup."""
    return re.sub(r"([\\|`*_<>\[\]#!~])", r"\\\1", " ".join(visible(text).split()))


def _parse_licence(text: str) -> tuple[str, str]:
    source, equals, licence = text.partition("=")
    if not equals or not source or not licence:
        raise InputError(f"--licence {text}: write it as SOURCE=LICENCE")
    return source, licence


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error}); remove it, or correct it") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: holds no JSON object; remove it, or correct it")
    return values


if __name__ == "__main__":
    sys.exit(main())
