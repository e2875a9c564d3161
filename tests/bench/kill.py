"""Kills runs with -9 and starts them again: at every named point, at random moments, with vLLM, and on two ranks.

    python tests/bench/kill.py [--random 20] [--vllm 5] [--points REGEX] [--seed 0]

With the hf engine, on one rank and on two, every run has to end as one that was never killed, bit by bit: weights, metrics without
`time/*`, files of completions, and what became of every group. With vLLM every group has to have one end, and the sums have to be the
metrics'; whether the bits are the same is said.
"""

import argparse
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(CHECKOUT), str(CHECKOUT / "tests")]

from crash import POINTS  # noqa: E402
from killing import differences, forked, make_policy, make_recipe, moments, started, voided  # noqa: E402

TWO_RANKS = (
    "uses: in the middle of their transaction@0", "sync: weights written, no engine has them@0", "checkpoint: after the weights@0",
    "checkpoint: after the optimizer@1", "learning: between two updates of a step@1", "checkpoint: after the rename, before `contain`@0",
)  # fmt: skip
VLLM_POINTS = ("completions: after it, between sampling and scoring", "uses: before their transaction")


class Table:
    """Prints a row a kill and counts those that went wrong."""

    def __init__(self) -> None:
        self.bad = 0

    def row(self, what: str, ended: int, again: int, found: list[str], seconds: float, void: int) -> None:
        killed = "killed" if ended != 0 else "NOT REACHED"
        verdict = "same" if not found and again == 0 else "; ".join(found) or f"ended with {again}"
        self.bad += verdict != "same" or ended == 0
        print(f"{what:<66} {killed:<12} {void:>3} void  {seconds:>6.1f} s  {verdict}", flush=True)


def kill_and_go_on(
    table: Table, what: str, folder: Path, policy: Path, whole: Path, run: Callable[..., int], crash: str | None, after_s: float | None,
    bits: bool = True, **sections: dict[str, object],
) -> None:  # fmt: skip
    began = time.monotonic()
    recipe = make_recipe(folder, policy, **sections)
    ended = run(recipe, crash, kill_after_s=after_s)
    while ended == 0 and after_s is not None:  # it was quicker than the undisturbed run
        shutil.rmtree(folder)
        after_s *= 0.7
        ended = run(make_recipe(folder, policy, **sections), kill_after_s=after_s)
    again = run(recipe)
    found = differences(folder / "run", whole, bits) if again == 0 else []
    table.row(what, ended, again, found, time.monotonic() - began, voided(folder / "run"))
    if bits and not found:
        shutil.rmtree(folder)


def undisturbed(folder: Path, policy: Path, run: Callable[..., int], **sections: dict[str, object]) -> tuple[Path, float]:
    began = time.monotonic()
    assert run(make_recipe(folder, policy, **sections)) == 0, (folder / "output.log").read_text()[-3000:]
    return folder / "run", time.monotonic() - began


def with_hf(table: Table, folder: Path, policy: Path, arguments: argparse.Namespace) -> None:
    whole, seconds = undisturbed(folder / "whole", policy, forked)
    print(f"hf, one rank; undisturbed {seconds:.1f} s", flush=True)
    names = [name for name in POINTS if re.search(arguments.points, name)]
    for number, name in enumerate(names):
        kill_and_go_on(table, name, folder / f"point-{number}", policy, whole, forked, name, None)
    for number, moment in enumerate(moments(arguments.random, arguments.seed, 0.0, 0.95 * seconds)):
        kill_and_go_on(table, f"after {moment:.2f} s", folder / f"random-{number}", policy, whole, forked, None, moment)


def on_two_ranks(table: Table, folder: Path, policy: Path, arguments: argparse.Namespace) -> None:
    def run(recipe: Path, crash: str | None = None, kill_after_s: float | None = None) -> int:
        return started(recipe, crash, 2, kill_after_s)

    whole, seconds = undisturbed(folder / "whole", policy, run)
    print(f"hf, two ranks (gloo); undisturbed {seconds:.1f} s", flush=True)
    for number, name in enumerate(TWO_RANKS):
        kill_and_go_on(table, name, folder / f"point-{number}", policy, whole, run, name, None)


def with_vllm(table: Table, folder: Path, policy: Path, arguments: argparse.Namespace) -> None:
    sections = {"rollout": {"engine": "vllm", "slots": 16}}
    whole, seconds = undisturbed(folder / "whole", policy, started, **sections)
    print(f"vLLM; undisturbed {seconds:.1f} s", flush=True)
    crashes: list[tuple[str | None, float | None]] = [(name, None) for name in VLLM_POINTS[: arguments.vllm]]
    crashes += [(None, moment) for moment in moments(arguments.vllm - len(crashes), arguments.seed, 0.5 * seconds, 0.95 * seconds)]
    for number, (name, moment) in enumerate(crashes):
        place = folder / f"kill-{number}"
        kill_and_go_on(table, name or f"after {moment:.2f} s", place, policy, whole, started, name, moment, bits=False, **sections)
        print(f"    bits: {', '.join(differences(place / 'run', whole)) or 'the same'}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description="Kills runs and starts them again.")
    parser.add_argument("--points", default="", metavar="REGEX", help="named points to kill at; all if left out")
    parser.add_argument("--random", type=int, default=20, help="kills at random moments")
    parser.add_argument("--ranks", action=argparse.BooleanOptionalAction, default=True, help="also two ranks")
    parser.add_argument("--vllm", type=int, default=5, help="kills with vLLM")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    table = Table()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        policy = make_policy(folder / "policy")
        with_hf(table, folder / "hf", policy, arguments)
        if arguments.ranks:
            on_two_ranks(table, folder / "ranks", policy, arguments)
        if arguments.vllm:
            with_vllm(table, folder / "vllm", policy, arguments)
    print(f"{table.bad} went wrong" if table.bad else "none went wrong")
    return 1 if table.bad else 0


if __name__ == "__main__":
    sys.exit(main())
