"""Answers a second of `math_answer` and of trl's `accuracy_reward`, on real rows: python -m tests.bench.rewards [rows]

Both see the same completions in the same run, in turns of a few rows, in one process; caches are empty and every gold stands
once. The last line of the table scores through a Scorer with two worker processes instead, as a run does. Completions are the
worked solutions of the data sets, as they are (right) or those of another row (wrong). It is run by hand; nothing in it is
asserted."""

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from trl.rewards import accuracy_reward

from rewards.config import RewardsConfig
from rewards.forms import form
from rewards.job import ScoreJob
from rewards.math_answer import math_answer
from rewards.numbers import exact
from rewards.scorer import Scorer

TURN = 25
"""Rows of one turn."""
DATA = Path(os.environ.get("COHORT_TEST_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))


@dataclass
class Rows:
    """Rows of one kind."""

    name: str
    completions: Sequence[str]
    golds: Sequence[str]
    wanted: float
    """Times trl's rate."""


def main() -> None:
    most = int(sys.argv[1]) if len(sys.argv) > 1 else 500
    gsm = [json.loads(line) for line in (DATA / "gsm8k" / "test.jsonl").open()]
    gsm = list({row["answer"].rpartition("####")[2].strip(): row for row in gsm}.values())[:most]
    golds = [row["answer"].rpartition("####")[2].strip() for row in gsm]
    texts = [rf"{row['answer'].rpartition('####')[0]}The answer is \boxed{{{gold}}}." for row, gold in zip(gsm, golds, strict=True)]
    half = [text if i % 2 else texts[i - 1] for i, text in enumerate(texts)]
    math = [json.loads(line) for line in (DATA / "math500" / "test.jsonl").open()]
    math = list({row["answer"]: row for row in math}.values())[:most]
    answers = [row["answer"] for row in math]
    solutions = [row["solution"] for row in math]
    print(f"{'rows':>28} {'n':>5} {'trl /s':>9} {'ours /s':>9} {'times':>7} {'wanted':>7}  right by trl, by us")
    for rows in (Rows("GSM8K, half right", half, golds, 30.0), Rows("MATH-500, right", solutions, answers, 20.0)):
        measure(rows, ours_in_process)
    wrong = Rows("MATH-500, wrong", [*solutions[1:], solutions[0]], answers, 1.5)
    measure(wrong, ours_in_process)
    with Scorer(RewardsConfig.model_validate({"parts": [{"name": "math_answer"}], "workers": 2})) as scorer:
        warm(scorer)
        measure(Rows("MATH-500, wrong, 2 workers", wrong.completions, wrong.golds, 1.5), lambda c, g: ours_by_workers(scorer, c, g))


def measure(rows: Rows, ours: Callable[[Sequence[str], Sequence[str]], Sequence[float | None]]) -> None:
    exact.cache_clear()
    form.cache_clear()
    seconds, right = {"trl": 0.0, "ours": 0.0}, {"trl": 0, "ours": 0}
    for turn, start in enumerate(range(0, len(rows.golds), TURN)):
        completions, golds = rows.completions[start : start + TURN], rows.golds[start : start + TURN]
        sides = [("trl", by_trl), ("ours", ours)]
        for name, function in sides if turn % 2 else reversed(sides):
            began = time.perf_counter()
            rewards = function(completions, golds)
            seconds[name] += time.perf_counter() - began
            right[name] += sum(reward == 1.0 for reward in rewards)
    n = len(rows.golds)
    trl, us = n / seconds["trl"], n / seconds["ours"]
    said = f"{rows.name:>28} {n:>5} {trl:>9.0f} {us:>9.0f} {us / trl:>7.1f} {rows.wanted:>7}"
    print(f"{said}  {right['trl']}, {right['ours']}", flush=True)


def by_trl(completions: Sequence[str], golds: Sequence[str]) -> Sequence[float | None]:
    chats = [[{"role": "assistant", "content": text}] for text in completions]
    return accuracy_reward(chats, [f"${gold}$" for gold in golds])


def ours_in_process(completions: Sequence[str], golds: Sequence[str]) -> Sequence[float | None]:
    return math_answer([""] * len(golds), list(completions), answer=list(golds))


def ours_by_workers(scorer: Scorer, completions: Sequence[str], golds: Sequence[str]) -> Sequence[float | None]:
    jobs = [ScoreJob("g", "q", "q", [text], [[0]], {"answer": gold}) for text, gold in zip(completions, golds, strict=True)]
    return [scores[0].value for scores in scorer.score(jobs)]


def warm(scorer: Scorer) -> None:
    """Both workers started, and mpmath imported in them."""
    ours_by_workers(scorer, [r"\boxed{\sqrt{2}}"] * 64, [r"\sqrt{3}"] * 64)


if __name__ == "__main__":
    main()
