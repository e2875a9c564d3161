"""GRPO: `accelerate launch -m rl.train RECIPE [section.key=value …]`, or `python -m rl.train` for one process.

`train` is the algorithm. Below it stands only how a command begins and ends: recipe, folder and inputs are checked before anything
heavy is loaded, and whatever ends the run stands in `<run>/exit.json`. Exit codes are those of `rl/command.py`.
"""

import errno
import sys
from typing import TYPE_CHECKING, Any

from data.journal_file import InUse
from data.recipe import InputError, read_recipe
from rl.command import command_line, exit_code, leave, main_rank, mistake, stopped
from rl.config import TrainRecipe
from rl.inputs import check_inputs
from rl.run_folder import RunFolder

if TYPE_CHECKING:
    from rl.run import Run

FREE = ("learner.steps", "log", "checkpoint", "eval", "hardware", "rollout.servers", "rollout.server_token_env")
"""What may differ when a run goes on."""


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
    parser = command_line("rl.train", "GRPO without a critic, from a recipe.")
    arguments = parser.parse_intermixed_args()
    try:
        recipe = read_recipe(arguments.recipe, arguments.overrides, TrainRecipe)
        folder = RunFolder(recipe.run.output_dir, recipe.run.name, recipe, FREE)
        if arguments.dry_run:
            from rl.dry_run import dry_run  # loads torch

            return dry_run(recipe, folder)
        ours = folder.check(recipe.run.resume)
    except InputError as error:
        return mistake(error)
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
    except InUse as error:
        return mistake(error)  # the folder is another process's, its exit.json too
    except InputError as error:
        _note(folder, 2, str(error))
        return mistake(error)
    except BaseException as error:
        _note(folder, exit_code(error), f"{type(error).__name__}: {error}".removesuffix(": "))
        code = stopped(error, str(folder.path))
        if code is None:
            raise
        return code
    _note(folder, 0, "finished", result)
    return _report(folder, result)


def _note(folder: RunFolder, code: int, reason: str, result: dict[str, Any] | None = None) -> None:
    if main_rank():
        try:
            folder.path.mkdir(parents=True, exist_ok=True)
            folder.write_exit(code, reason, result)
        except OSError as error:  # the reason itself is about to be printed, and must not be lost for it
            if error.errno != errno.ENOSPC:
                print(f"{folder.path}: cannot write exit.json: {error.strerror}", file=sys.stderr)


def _report(folder: RunFolder, result: dict[str, Any], again: bool = False) -> int:
    if main_rank():
        from rl.report import report

        print(report(folder.path, result, again))
    return 0


if __name__ == "__main__":
    leave(main())
