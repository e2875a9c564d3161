"""The account of a run: `python -m rl.account RUN [--prompts N] [--json]`, RUN being its folder, such as `outputs/quickstart`.

Where every sampled token went, by what became of its group; what was used in vain, because the run went back behind it; and how often
each prompt was answered right, over time. It reads the journal beside a run that is going on as well as after its death, and writes
nothing. Steps are counted as in `metrics.jsonl`, from 1. Exit codes: 0, 1 if the sums do not close, 2 if there is no journal to read.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from data.journal import Journal
from data.journal_account import Account, Judged
from data.journal_sums import ABORTED, FAILED, OPEN, RESAMPLED, STALE, TRAINED, TRUNCATED, ZERO_ADVANTAGE
from data.recipe import InputError, read_recipe
from rl.command import mistake
from rl.config import TrainRecipe
from rl.inputs import judge_of

PERIODS = 5
"""Columns of time."""
MEANINGS = {
    TRAINED: "entered the loss",
    ZERO_ADVANTAGE: "all completions of the group scored alike",
    TRUNCATED: "cut off at max_tokens, kept out by loss.mask_truncated",
    FAILED: "without a score, or in a group with fewer than two",
    STALE: "older than rollout.max_staleness allows",
    ABORTED: "cut off, or come too late",
    RESAMPLED: "sampled again, for a run that went back behind arrays that were gone",
    OPEN: "not used yet",
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m rl.account", description="Where the tokens of a run went.")
    parser.add_argument("run", type=Path, metavar="RUN", help="a run's folder, such as outputs/quickstart")
    parser.add_argument("--prompts", type=int, default=20, metavar="N", help="prompts to list, those that are answered worst; default 20")
    parser.add_argument("--json", action="store_true", help="everything, all prompts included, as one JSON object")
    arguments = parser.parse_args()
    try:
        part, account = read_account(arguments.run)
    except InputError as error:
        return mistake(error)
    except AssertionError as error:
        print(f"{arguments.run}: {error}", file=sys.stderr)
        return 1
    if arguments.json:
        print(json.dumps(as_json(account, part)))
    else:
        print(as_text(arguments.run, account, part, arguments.prompts))
    return 0


def read_account(run: Path) -> tuple[str | None, Account]:
    """The part that says what is right, and the account; InputError, one line, if the folder has no journal that can be read."""
    if not run.is_dir():
        raise InputError(f"{run}: no such folder; name a run's, such as outputs/quickstart")
    part = None
    if (run / "recipe.yaml").is_file():
        part = judge_of(read_recipe(run / "recipe.yaml", [], TrainRecipe))
    with Journal(run / "journal.sqlite", read_only=True) as journal:
        return part, journal.account(part)


def as_json(account: Account, part: str | None) -> dict[str, Any]:
    """Plain values; a prompt's history is a list of objects in the order in which its groups were begun."""
    sums = account.sums
    history = {
        prompt: [
            {"step": j.step + 1, "outcome": j.outcome or OPEN, "judged": j.judged, "right": j.right, "reward": j.reward} for j in groups
        ]
        for prompt, groups in account.prompts.items()
    }
    return {
        "steps": account.steps,
        "steps_in_checkpoint": account.contained,
        "provisional_uses": account.provisional,
        "tokens": {"sampled": sums.sampled, "trained": sums.trained, "wasted": dict(sums.wasted), "open": sums.open},
        "groups": dict(sums.groups),
        "void": {reason: {"uses": uses, "tokens": tokens} for reason, (uses, tokens) in account.void.items()},
        "right_by": part or "reward",
        "prompts": history,
    }


def as_text(run: Path, account: Account, part: str | None, shown: int) -> str:
    console = Console(width=120, highlight=False, soft_wrap=True)
    with console.capture() as captured:
        behind = f", {account.provisional} uses are provisional" if account.provisional else ""
        console.print(escape(f"{run}: {account.steps} steps, a checkpoint contains {account.contained} of them{behind}"))
        console.print(_tokens(account))
        if account.void:
            uses, tokens = (sum(column) for column in zip(*account.void.values(), strict=True))
            console.print(f"void: {uses} uses of {tokens:,} tokens that the run went back behind; their groups were used again or are open")
        if account.prompts:
            _print_passes(console, account, f"{part} is 1 or more" if part else "the reward is 1 or more", shown)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


def _tokens(account: Account) -> Table:
    sums = account.sums
    table = Table("what became of it", "groups", "tokens", "share", "", box=None, pad_edge=False)
    for column in table.columns[1:4]:
        column.justify = "right"
    tokens = {TRAINED: sums.trained} | {reason: sums.wasted.get(reason, 0) for reason in MEANINGS if reason not in (TRAINED, OPEN)}
    tokens[OPEN] = sums.open
    for reason, meaning in MEANINGS.items():
        if tokens[reason] or sums.groups.get(reason) or reason in (TRAINED, ZERO_ADVANTAGE):
            groups = str(sums.groups.get(reason, 0)) if reason not in (ABORTED, RESAMPLED) else ""
            table.add_row(reason, groups, f"{tokens[reason]:,}", f"{_percent(tokens[reason], sums.sampled)} %", meaning)
    table.add_row("together", str(sum(sums.groups.values())), f"{sums.sampled:,}", "", "")
    return table


def _print_passes(console: Console, account: Account, right: str, shown: int) -> None:
    """How often each prompt was answered right, in each period of the run; prompts that are answered worst come first."""
    last = max(judged.step for groups in account.prompts.values() for judged in groups)
    count = min(PERIODS, last + 1)
    edges = [i * (last + 1) // count for i in range(count + 1)]
    periods = [range(begin, end) for begin, end in zip(edges, edges[1:], strict=False)]
    rates = {prompt: [_rate(groups, period) for period in periods] for prompt, groups in account.prompts.items()}
    labels = [f"{p[0] + 1}" if len(p) == 1 else f"{p[0] + 1}-{p[-1] + 1}" for p in periods]
    table = Table("pass rate in steps", *labels, box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    columns = [[rate for rate in column if rate is not None] for column in zip(*rates.values(), strict=True)]
    table.add_row("mean over prompts", *(f"{100 * fmean(column):.0f} %" if column else "-" for column in columns))
    table.add_row("prompts seen", *(str(len(column)) for column in columns))
    table.add_row("never right", *(str(sum(rate == 0 for rate in column)) for column in columns))
    table.add_row("always right", *(str(sum(rate == 1 for rate in column)) for column in columns))
    order = sorted(rates, key=lambda prompt: (_last(rates[prompt]), prompt))
    for prompt in order[:shown]:
        table.add_row(f"  {escape(prompt)}", *("-" if rate is None else f"{100 * rate:.0f} %" for rate in rates[prompt]))
    console.print(f"\nright: {escape(right)}")
    console.print(table)
    if len(order) > shown:
        console.print(f"  and {len(order) - shown} prompts more (--prompts N, --json)")


def _rate(groups: Sequence[Judged], period: range) -> float | None:
    inside = [judged for judged in groups if judged.step in period]
    judged = sum(group.judged for group in inside)
    return sum(group.right for group in inside) / judged if judged else None


def _last(rates: Sequence[float | None]) -> float:
    """The latest that is known; what was never judged comes last."""
    known = [rate for rate in rates if rate is not None]
    return known[-1] if known else 2.0


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f}" if whole else "0.0"


if __name__ == "__main__":
    sys.exit(main())
