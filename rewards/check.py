"""Tries a reward function before it is trained on: python -m rewards.check PLUGIN [rows.jsonl]

It is loaded as the trainer would, in a worker process with a cleaned environment, and asked about gold answers, which must score
1, and about the gold answers of other rows, which should score less. Gold is the column `answer`, then `solution`; it is shown in
each of the forms in which a policy may answer, and the best one counts. A row's own `completion`, if it has one, is shown
instead. Exit code 0 if every gold answer scored 1 and not every wrong one; 1 if not, with the rows; 2 if the function cannot be used at
all. A function that shapes, and does not say whether an answer is right, has to give a number to each with `--shaping`, and no more."""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from data.recipe import InputError, nearest, parse
from data.values import Score
from rewards.answers import find_golds
from rewards.config import RewardsConfig
from rewards.job import ScoreJob
from rewards.plugins import ENTRY_POINTS
from rewards.registry import BUILTINS
from rewards.scorer import Scorer

SAMPLE = [{"prompt": "2+2=", "answer": "4"}, {"prompt": "6*7=", "answer": "42"}]
FORMS = ("{}", "<think>hm</think><answer>{}</answer>", "\\boxed{{{}}}", "so\n#### {}")
MOST_SHOWN = 10


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m rewards.check", description="Loads a reward function and tries it.")
    parser.add_argument("plugin", help="./file.py:function, package.module:function, an entry point, or a builtin's name")
    parser.add_argument("rows", nargs="?", type=Path, help="rows with gold answers, JSONL; without, two sums")
    parser.add_argument("--shaping", action="store_true", help="it does not judge whether an answer is right: any number will do")
    parser.add_argument("--options", default="{}", help="options of the function, as JSON")
    given = parser.parse_args(arguments)
    try:
        config = config_for(given.plugin, _options(given.options))
        rows = _read(given.rows) if given.rows else SAMPLE
        return check(config, rows, given.shaping)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2


def config_for(plugin: str, options: dict[str, Any]) -> RewardsConfig:
    """A rewards section with this function alone."""
    close = nearest(plugin, list(BUILTINS))
    if (
        plugin not in BUILTINS
        and ":" not in plugin
        and "did you mean" in close
        and plugin not in {p.name for p in entry_points(group=ENTRY_POINTS)}
    ):
        raise InputError(f"rewards.check: no reward named '{plugin}'{close}")
    name = plugin.rpartition(":")[2]
    plugins = [] if plugin in BUILTINS else [plugin]
    return parse({"plugins": plugins, "parts": [{"name": name, "options": options}]}, RewardsConfig, "rewards.check")


def check(config: RewardsConfig, rows: Sequence[dict[str, Any]], shaping: bool = False) -> int:
    """Tries the function on rows and prints what came of it; the exit code."""
    golds = [find_golds(row) for row in rows]
    usable = [index for index, gold in enumerate(golds) if gold or rows[index].get("completion")]
    if not usable:
        raise InputError("rewards.check: no row has a gold answer (column 'answer' or 'solution') or a 'completion'")
    with Scorer(config) as scorer:
        began = time.perf_counter()
        right = scorer.score([_job(rows[i], i, _shown(rows[i], golds[i])) for i in usable])
        others = [
            next((golds[j] for j in [*usable[n + 1 :], *usable[:n]] if golds[j] and golds[j] != golds[i]), []) for n, i in enumerate(usable)
        ]
        wrong = scorer.score([_job(rows[i], i, _shown({}, other)) for i, other in zip(usable, others, strict=True) if other])
        seconds = time.perf_counter() - began
        failed = [score for scores in [*right, *wrong] for score in scores if score.status in ("timeout", "error")]
        if failed:
            print(scorer.explain(failed))
    if shaping:
        return _shapes([score for scores in [*right, *wrong] for score in scores])
    missed = [(i, scores) for i, scores in zip(usable, right, strict=True) if best(scores) is None or (best(scores) or 0.0) < 1.0]
    generous = sum((best(scores) or 0.0) >= 1.0 for scores in wrong)
    print(f"{len(usable)} gold answers: {len(usable) - len(missed)} score 1, {len(missed)} do not")
    for index, scores in missed[:MOST_SHOWN]:
        print(f"  row {index + 1}: gold {golds[index] or rows[index]['completion']!r:.80}: {_said(scores)}")
    print(f"{len(wrong)} answers of other rows: {generous} score 1{', which a wrong answer should not' if generous else ''}")
    print(f"{sum(map(len, [*right, *wrong])) / seconds:.0f} completions a second; {len(rows) - len(usable)} rows have no gold answer")
    accepts_all = bool(wrong) and generous == len(wrong)
    if (len(missed) == len(usable) or accepts_all) and not failed:
        print("if it does not judge whether an answer is right, say so: --shaping")
    return 1 if missed or failed or accepts_all else 0


def _shapes(scores: Sequence[Score]) -> int:
    """Says what numbers a function gave that does not judge; the exit code."""
    values = [score.value for score in scores if score.value is not None]
    spread = f", from {min(values):g} to {max(values):g}" if values else ""
    print(f"{len(scores)} completions: {len(values)} have a number{spread}")
    return 0 if len(values) == len(scores) else 1


def _options(given: str) -> dict[str, Any]:
    try:
        options = json.loads(given)
    except json.JSONDecodeError as error:
        raise InputError(f"""--options: {given!r} is not JSON ({error.msg}); write for instance '{{"reward": "fraction"}}'""") from None
    if not isinstance(options, dict):
        raise InputError(f"""--options: {given!r} is no object; write for instance '{{"reward": "fraction"}}'""")
    return options


def best(scores: Sequence[Score]) -> float | None:
    """The largest value; None if none has one."""
    return max((score.value for score in scores if score.value is not None), default=None)


def _shown(row: dict[str, Any], golds: Sequence[str]) -> list[str]:
    if isinstance(row.get("completion"), str):
        return [row["completion"]]
    return [form.format(golds[0].strip()) for form in FORMS]


def _job(row: dict[str, Any], index: int, completions: Sequence[str]) -> ScoreJob:
    columns = {name: value for name, value in row.items() if name not in ("prompt", "completion")}
    prompt = row.get("prompt", "")
    text = prompt if isinstance(prompt, str) else ""
    return ScoreJob(f"row-{index}", prompt, text, completions, [list(c.encode()) for c in completions], columns)


def _said(scores: Sequence[Score]) -> str:
    return "; ".join(dict.fromkeys(score.detail or f"{score.value}" for score in scores))


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise InputError(f"rewards.check: no file '{path}'")
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise InputError(f"{path}:{number}: not JSON: {error}") from None
    return rows


if __name__ == "__main__":
    sys.exit(main())
