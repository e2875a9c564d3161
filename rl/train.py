"""GRPO: `accelerate launch -m rl.train RECIPE [section.key=value …]`, or `python -m rl.train` for one process.

`train` is the algorithm. Below it stands only how a command begins and ends: recipe, folder and inputs are checked before anything
heavy is loaded, and whatever ends the run stands in `<run>/exit.json`. Exit codes: 0 finished, 1 stopped, 2 a mistake in recipe or
inputs, 75 asked to end (SIGTERM) with a checkpoint left: start again with the same command.
"""

import argparse
import os
import sys
from typing import TYPE_CHECKING, Any

from data.recipe import InputError, read_recipe
from rl.config import TrainRecipe
from rl.inputs import check_inputs
from rl.run_folder import RunFolder

if TYPE_CHECKING:
    from rl.run import Run

FREE = ("learner.steps", "log", "checkpoint", "eval")
"""What may differ when a run goes on."""
AGAIN = 75
"""EX_TEMPFAIL: a scheduler may start the same command again."""


def train(recipe: TrainRecipe, run: "Run") -> dict[str, Any]:
    """Group relative policy optimization (arXiv:2402.03300, algorithm 1), without a critic."""
    from rl.advantage import group_advantage

    stream, learner, sync = run.stream, run.learner, run.sync
    run.begin()
    for step in range(run.start, recipe.learner.steps):
        # 1. G completions of each prompt, sampled and scored, in a fixed order
        groups = stream.next(recipe.learner.prompts_per_step)
        # 2. each against its own group; no critic
        advantages = group_advantage(groups, recipe.advantage)
        # 3. raise the better ones, inside the clip
        for batch in learner.batches(groups, advantages):
            learner.step(batch)
        # 4. the engines sample next from the new weights
        sync.push(learner, version=step + 1)
        # metrics, evaluation, checkpoint
        run.end_step(step)
    return run.finish()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m rl.train", description="GRPO without a critic, from a recipe.")
    parser.add_argument("recipe", help="YAML file, such as recipes/quickstart.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="replaces a value of the recipe")
    parser.add_argument("--dry-run", action="store_true", help="check everything, say what would be done, load no model")
    arguments = parser.parse_args()
    try:
        recipe = read_recipe(arguments.recipe, arguments.overrides, TrainRecipe)
        folder = RunFolder(recipe.run.output_dir, recipe.run.name, recipe, FREE)
        if arguments.dry_run:
            from rl.dry_run import dry_run

            return dry_run(recipe, folder)
        ours = folder.check(recipe.run.resume)
    except InputError as error:
        return _mistake(error)
    result = folder.result() if ours else None
    if result is not None and result["steps"] >= recipe.learner.steps:
        return _report(folder, result, again=True)
    return run_training(recipe, folder)


def run_training(recipe: TrainRecipe, folder: RunFolder) -> int:
    """Trains to the end and says in `exit.json` how it ended."""
    try:
        check_inputs(recipe)
        from rl.open_run import open_run  # loads torch
        from rl.ranks import Ranks

        with open_run(recipe, folder, Ranks()) as run:
            result = train(recipe, run)
    except InputError as error:
        _note(folder, 2, str(error))
        return _mistake(error)
    except BaseException as error:
        return _stopped(folder, error)
    _note(folder, 0, "finished", result)
    return _report(folder, result)


def _stopped(folder: RunFolder, error: BaseException) -> int:
    """Notes what ended the run; what has a message of its own ends without a traceback."""
    from rl.engines.base import EngineDead
    from rl.run import Interrupted
    from rl.stream import RunStopped

    code = AGAIN if isinstance(error, Interrupted) else 1
    _note(folder, code, f"{type(error).__name__}: {error}")
    if isinstance(error, Interrupted | RunStopped | EngineDead):
        if _main_rank():
            print(f"{folder.path}: {error}", file=sys.stderr)
        return code
    raise error


def _mistake(error: InputError) -> int:
    if _main_rank():
        print(error, file=sys.stderr)
    return 2


def _note(folder: RunFolder, code: int, reason: str, result: dict[str, Any] | None = None) -> None:
    if _main_rank():
        folder.path.mkdir(parents=True, exist_ok=True)
        folder.write_exit(code, reason, result)


def _report(folder: RunFolder, result: dict[str, Any], again: bool = False) -> int:
    if _main_rank():
        from rl.report import report

        print(report(folder.path, result, again))
    return 0


def _main_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"


if __name__ == "__main__":
    sys.exit(main())
