"""Kills a process with -9 at a named point of a run, from outside: the product has no code for it.

    python tests/crash.py POINT[:NTH][@RANK] MODULE ARGUMENTS…

A point is just before or just after a function is called; the function is wrapped before the command begins, and the process kills
itself at the NTH call (1 is the first; each point has one of its own that lies in the middle of the run of `tests/killing.py`).
"""

import importlib
import itertools
import os
import runpy
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parents[1]


def any_call(*_: Any, **__: Any) -> bool:
    return True


def to(name: str) -> Callable[..., bool]:
    """Calls whose last argument is a path of this name."""
    return lambda *arguments, **_: Path(arguments[-1]).name == name


def half_a_line(metrics: Any, row: Any) -> None:
    with metrics.path.open("a") as file:
        file.write('{"step": 3, "rewa')


def half_a_folder(folder: Path, **_: Any) -> None:
    next(path for path in sorted(Path(folder).rglob("*")) if path.is_file()).unlink()


@dataclass(frozen=True)
class Point:
    """Where a process is killed."""

    function: str
    """`module:name` or `module:Class.name`."""
    when: str
    """`before` or `after` the call."""
    nth: int = 1
    """Which call, unless it is named."""
    only: Callable[..., bool] = any_call
    """Calls that count, by their arguments."""
    first: Callable[..., None] | None = None
    """What is done, with the call's arguments, just before the kill."""


POINTS = {
    # the folder and the journal come to be
    "claim: before the recipe is renamed into place": Point("os:replace", "before", 1, to("recipe.yaml")),
    "claim: after it": Point("os:replace", "after", 1, to("recipe.yaml")),
    "journal: a file without tables": Point("data.journal_file:_create", "before"),
    "journal: tables and nothing in them": Point("data.journal_file:_create", "after"),
    "resume: before its transaction": Point("data.journal:Journal.resume", "before"),
    "resume: after its transaction": Point("data.journal:Journal.resume", "after"),
    # a step
    "begin: before its transaction": Point("data.journal:Journal.begin", "before", 4),
    "begin: after its transaction": Point("data.journal:Journal.begin", "after", 4),
    "sampling: between two tokens": Point("rl.engines.hf:_Life._advance", "before", 110),
    "completions: before their transaction": Point("data.journal:Journal.put_completions", "before", 14),
    "completions: after it, between sampling and scoring": Point("data.journal:Journal.put_completions", "after", 14),
    "scores: asked for": Point("rewards.scorer:Scorer.submit", "after", 20),
    "scores: before their transaction": Point("data.journal:Journal.put_scores", "before", 15),
    "scores: after their transaction": Point("data.journal:Journal.put_scores", "after", 15),
    "learning: before the first update of a step": Point("rl.learner:Learner.step", "before", 7),
    "learning: between two updates of a step": Point("rl.learner:Learner.step", "after", 7),
    "learning: after the last": Point("rl.learner:Learner.step", "after", 8),
    "sync: before it": Point("rl.sync:WeightSync.push", "before", 3),
    "sync: weights written, no engine has them": Point("rl.engines.weights:WeightFile.write", "after", 3),
    "sync: weights in the engine, before its version": Point("rl.engines.hf:HfEngine.end_update", "before", 3),
    "sync: after it": Point("rl.sync:WeightSync.push", "after", 3),
    "uses: in the middle of their transaction": Point("data.journal:Journal.use", "after", 14),
    "uses: before their transaction": Point("rl.stream:GroupStream.end_step", "before", 3),
    "uses: after their transaction": Point("rl.stream:GroupStream.end_step", "after", 3),
    "completions file: before it is renamed into place": Point("os:replace", "before", 1, to("step-3.parquet")),
    "completions file: after it": Point("os:replace", "after", 1, to("step-3.parquet")),
    "evaluation: before it": Point("rl.run:Run.evaluate", "before", 2),
    "evaluation: after it": Point("rl.run:Run.evaluate", "after", 2),
    "metrics: before the row": Point("rl.metrics_file:MetricsFile.write", "before", 4),
    "metrics: half a row": Point("rl.metrics_file:MetricsFile.write", "before", 4, first=half_a_line),
    "metrics: after the row": Point("rl.metrics_file:MetricsFile.write", "after", 4),
    # a checkpoint
    "checkpoint: before it": Point("rl.checkpoint:Checkpoints.save", "before", 2),
    "checkpoint: after the weights": Point("rl.checkpoint:save_policy", "after", 2),
    "checkpoint: after the optimizer": Point("torch.distributed.checkpoint:save", "after", 2),
    "checkpoint: before its hashes": Point("rl.checkpoint:_hashes", "before", 2),
    "checkpoint: before the rename": Point("os:replace", "before", 1, to("step-4")),
    "checkpoint: after the rename, before `contain`": Point("data.journal:Journal.contain", "before", 2),
    "checkpoint: in the transaction of `contain`": Point("data.journal:Journal._contain", "after", 3),
    "checkpoint: after `contain`": Point("data.journal:Journal.contain", "after", 2),
    "checkpoint: while an old one is removed": Point("shutil:rmtree", "before", 2, to("step-2"), half_a_folder),
    # the end
    "end: before `final` is renamed into place": Point("os:rename", "before", 1, to("final")),
    "end: after it": Point("os:rename", "after", 1, to("final")),
    "end: before exit.json": Point("os:replace", "before", 1, to("exit.json")),
    "end: after exit.json": Point("os:replace", "after", 1, to("exit.json")),
}


def install(spec: str) -> None:
    """Wraps the function of a point, `POINT[:NTH][@RANK]`, in this process."""
    spec, _, rank = spec.partition("@")
    if os.environ.get("RANK", "0") != (rank or "0"):
        return
    name, nth = (spec, 0) if spec in POINTS else (spec.rpartition(":")[0], int(spec.rpartition(":")[2]))
    owner, attribute = resolve(POINTS[name])
    setattr(owner, attribute, _killing(getattr(owner, attribute), POINTS[name], nth or POINTS[name].nth))


def resolve(point: Point) -> tuple[Any, str]:
    """The module or class that has the function of a point, and its name there."""
    module, _, path = point.function.partition(":")
    owner: Any = importlib.import_module(module)
    *classes, attribute = path.split(".")
    for part in classes:
        owner = getattr(owner, part)
    return owner, attribute


def _killing(function: Callable[..., Any], point: Point, nth: int) -> Callable[..., Any]:
    calls = itertools.count(1)

    @wraps(function)
    def wrapper(*arguments: Any, **named: Any) -> Any:
        dies = point.only(*arguments, **named) and next(calls) == nth
        if dies and point.when == "before":
            _die(point, *arguments, **named)
        result = function(*arguments, **named)
        if dies:
            _die(point, *arguments, **named)
        return result

    return wrapper


def _die(point: Point, *arguments: Any, **named: Any) -> None:
    if point.first is not None:
        point.first(*arguments, **named)
    os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    _, spec, module, *rest = sys.argv
    sys.path[:0] = [str(CHECKOUT)]
    install(spec)
    sys.argv = [module, *rest]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
