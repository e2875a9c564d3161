"""What a finished run says at its end: accuracy before and after, what it took, and how to load the policy."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def report(folder: Path, result: dict[str, Any], again: bool) -> str:
    """Lines to print; `again` where the run was finished before."""
    console = Console(width=100, highlight=False, soft_wrap=True)
    with console.capture() as captured:
        if result["after"]:
            console.print(_table(result["before"], result["after"]))
        trained, groups = result["groups_trained"], result["groups"]
        if trained == 0:
            console.print(f"nothing was learned: none of {groups:.0f} groups had rewards that differ, so every advantage is 0")
        else:
            console.print(f"{trained:.0f} of {groups:.0f} groups taught something")
        finished = (
            "finished before; this is its result again" if again else f"finished: {result['steps']} steps in {result['seconds']:.0f} s"
        )
        console.print(f"{folder}: {finished}")
        console.print(f"  the policy: {folder / 'final'}   metrics: {folder / 'metrics.jsonl'}   completions: {folder / 'completions'}")
        console.print(f"  load it: AutoModelForCausalLM.from_pretrained('{folder / 'final'}'), or  vllm serve {folder / 'final'}")
    return captured.get().rstrip()


def _table(before: dict[str, float], after: dict[str, float]) -> Table:
    table = Table("held-out prompts", "before", "after", title_justify="left")
    for name in after:
        if name.endswith("_ci95") or (name.endswith("/unscored") and not after[name] and not before.get(name)):
            continue
        label = name.removeprefix("eval/")
        table.add_row(label, _cell(name, before), _cell(name, after))
    return table


def _cell(name: str, numbers: dict[str, float]) -> str:
    value = numbers.get(name)
    if value is None:
        return "-"
    if "pass@" in name or "maj@" in name:
        half = numbers.get(f"{name}_ci95")
        return f"{100 * value:.1f} %" + (f" ± {100 * half:.1f}" if half is not None else "")
    return f"{value:.3f}" if "entropy" in name or "turns" in name else f"{value:g}" if value == int(value) else f"{value:.1f}"
