"""The property test of GroupStream, pool and journal in its long form: a million transitions of random schedules.

python tests/bench/schedules.py [--transitions 1000000] [--seed 0] [--ahead]
"""

import argparse
import random
import sys
import time
from collections import Counter
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(CHECKOUT), str(CHECKOUT / "tests")]

from schedules import Shape, check  # noqa: E402


def shape_of(rng: random.Random, ahead: bool) -> Shape:
    staleness = rng.randint(1, 3) if ahead else 0
    return Shape(
        max_staleness=staleness, in_flight=ahead and rng.random() < 0.5, oversample=rng.choice([0.0, 0.5, 1.0]) if ahead else 0.0,
        steps=rng.randint(2, 8), per_step=rng.randint(2, 5), group_size=rng.randint(2, 6), engines=rng.randint(1, 4),
        whole_groups=rng.random() < 0.3, resample_zero_groups=rng.random() < 0.3, every=rng.randint(1, 3), keep=rng.randint(1, 2),
        run_deaths=rng.choice([0.005, 0.02, 0.05]),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="Random schedules; stops at the first that goes wrong and names its seed.")
    parser.add_argument("--transitions", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ahead", action="store_true", help="sampling ahead of the learner, by up to three versions")
    arguments = parser.parse_args()
    began = time.monotonic()
    seen: Counter[str] = Counter()
    runs = 0
    while seen.total() < arguments.transitions:
        rng = random.Random(f"{arguments.seed}-{runs}")
        try:
            seen += check(shape_of(rng, arguments.ahead), rng)
        except BaseException:
            print(f"run {runs} of --seed {arguments.seed} went wrong", flush=True)
            raise
        runs += 1
        if runs % 200 == 0:
            print(f"{seen.total():,} transitions in {runs} pairs of runs, {time.monotonic() - began:.0f} s", flush=True)
    for what, count in seen.most_common():
        print(f"{count:>12,}  {what}")
    print(f"{seen.total():,} transitions in {runs} pairs of runs, {time.monotonic() - began:.0f} s: none went wrong")


if __name__ == "__main__":
    main()
