"""How the cost of a step of ours grows with prompt length, group size and vocabulary.

    python tests/bench/growth.py [--case prompt --case group --case vocab] [--repeats 3]

Prompt lengths are fitted by  seconds = a * forwarded tokens + b * attention pairs,  the other two as well, with a third term
c * predicted tokens * V  for the output head. A pair is a token and one it attends to. Fits are least squares of relative errors on
CPU seconds, the minimum of the repeats; `residual` is the relative error of a point. A pass holds a group. All three take about five
minutes of a core; what is measured goes to stderr at once.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from harness import Case, Clock, learner_step, line, make_groups, make_learner, make_policy, table

from data.values import Group

CASES: dict[str, dict[str, Case]] = {
    "prompt": {f"prompt {n}": Case(prompt=n, groups=2) for n in (128, 256, 512, 1024, 2048, 4096)},
    "group": {f"G {n}": Case(group_size=n, groups=2) for n in (4, 8, 16, 32, 64)},
    "vocab": {f"V {n}": Case(vocab=n, groups=2) for n in (4096, 16_384, 32_768, 65_536, 151_936)},
}


def sizes(groups: list[Group], vocab: int) -> tuple[float, float, float]:
    """Forwarded tokens, attention pairs, logits."""
    tokens = pairs = predicted = 0
    for group in groups:
        prompt = len(group.prompt.token_ids)
        own = [len(c.token_ids) - 1 for c in group.completions]
        tokens += prompt + sum(own)
        pairs += prompt * (prompt + 1) // 2 + sum(n * prompt + n * (n + 1) // 2 for n in own)
        predicted += sum(n + 1 for n in own)
    return float(tokens), float(pairs), float(predicted) * vocab


def measure(case: Case, repeats: int) -> tuple[tuple[float, float, float], Clock]:
    with tempfile.TemporaryDirectory() as folder:
        learner = make_learner(make_policy(case, Path(folder)), micro_tokens=1)
        groups = make_groups(case)
        learner_step(learner, groups)
        clock = Clock()
        for _ in range(repeats):
            with clock.running():
                learner_step(learner, groups)
    return sizes(groups, case.vocab), clock


def fit(terms: np.ndarray, seconds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Coefficients that make the relative errors small, and these errors."""
    scaled = terms / seconds[:, None]
    columns = scaled.max(0)
    coefficients = np.linalg.lstsq(scaled / columns, np.ones(len(seconds)), rcond=None)[0] / columns
    return coefficients, terms @ coefficients / seconds - 1


def main() -> None:
    parser = argparse.ArgumentParser(description="How the cost of a step grows.")
    parser.add_argument("--case", action="append", choices=CASES, help="may be given several times; all if left out")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name in arguments.case or list(CASES):
        found = []
        for label, case in CASES[name].items():
            size, clock = measure(case, arguments.repeats)
            found.append({"case": label, "tokens": int(size[0]), "pairs": int(size[1]), "logits": int(size[2])} | clock.numbers())
            print(found[-1], file=sys.stderr, flush=True)
        used = ["tokens", "pairs"] if name == "prompt" else ["tokens", "pairs", "logits"]
        terms = np.array([[float(row[u]) for u in used] for row in found])
        coefficients, residuals = fit(terms, np.array([row["cpu_min_s"] for row in found]))
        for row, residual in zip(found, residuals, strict=True):
            row["residual"] = round(float(residual), 3)
            line(row)
        by_term = {f"{u}_ns": float(f"{1e9 * c:.3g}") for u, c in zip(used, coefficients, strict=True)}
        line({"case": f"fit {name}", "largest_residual": round(float(np.abs(residuals).max()), 3)} | by_term)
        rows += found
    table(rows, ("case", "tokens", "pairs", "logits", "cpu_min_s", "wall_min_s", "residual"))


if __name__ == "__main__":
    main()
