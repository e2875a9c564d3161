"""Supervised fine-tuning: `accelerate launch -m sft.train RECIPE [section.key=value …]`; `python -m sft.train` is one process.

Also the cold start: with `policy.init` the policy is made from nothing and learns the format and the elements of a task. Recipe,
run folder and rows are checked before anything heavy is loaded; `--dry-run` stops there and says what would be done. A run that was
stopped goes on from its newest checkpoint, and begins again where there is none. With `eval.prompts` the trained policy is judged
at the end as `rl.evaluate` does it, into `eval.json`. Exit codes are those of `rl/command.py`.
"""

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from data.prompts import check_prompts
from data.recipe import InputError, read_recipe, resolved_yaml
from rl.command import AGAIN, AT_ONCE, command_line, leave, mistake, stopped
from rl.config import LearnerConfig, PolicyConfig, TrainRecipe
from rl.inputs import check_conversation, check_judge, check_policy, is_local
from rl.run_folder import RunFolder
from sft.config import SftRecipe
from sft.ranks import is_main, ranks
from sft.rows import load_rows

FREE = ("checkpoint",)
"""What may differ when a run goes on."""


def main() -> int:
    """Returns the exit code: 0 done, 2 a mistake in recipe or inputs, 75 asked to end."""
    arguments = command_line("sft.train", "Supervised fine-tuning, from a recipe.").parse_intermixed_args()
    try:
        recipe = read_recipe(arguments.recipe, arguments.overrides, SftRecipe)
        folder = RunFolder(recipe.run.output_dir, recipe.run.name, recipe, FREE)
        result = folder.result() if folder.check(recipe.run.resume) else None
        if arguments.dry_run and (missing := not_there(recipe)):
            print("\n".join([resolved_yaml(recipe), "not there yet:", *(f"  {line}" for line in missing)]))
            return 0
        if result is None or arguments.dry_run:
            check(recipe)
            rows = load_rows(recipe)
        if arguments.dry_run:
            return dry_run(recipe, rows, folder, finished=result is not None)
        if result is not None:
            return report(folder, result, " finished before, its result again:")
        return run(recipe, rows, folder)
    except InputError as error:
        return mistake(error)


def run(recipe: SftRecipe, rows: list[dict[str, Any]], folder: RunFolder) -> int:
    """Trains and evaluates; how it ended also stands in exit.json."""
    # trl reports its use to the hub unless told not to; nothing leaves this machine unasked.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from rl.run import Interrupted  # loads torch, transformers and trl
    from sft.tokens import unknown_line
    from sft.trainer import load_policy, token_rows, train

    policy = load_policy(recipe)
    tokens = token_rows(recipe, policy, rows)
    if is_main():
        folder.claim()
        (folder.path / "exit.json").unlink(missing_ok=True)
        if tokens.skipped:
            print(f"{tokens.skipped} of {len(rows)} rows are too long and left out", flush=True)
        if tokens.unknown:
            print(unknown_line(tokens.unknown, policy[1]), flush=True)
    try:
        result = train(recipe, policy, tokens, folder.path)
        if is_main() and recipe.eval.prompts is not None:
            result |= {"eval": evaluate(recipe, folder.path)}
    except Interrupted as error:
        _note(folder, AGAIN, str(error))
        print(f"{folder.path}: {error}", file=sys.stderr)
        return AGAIN
    except KeyboardInterrupt as error:
        _note(folder, AT_ONCE, "KeyboardInterrupt")
        return stopped(error, str(folder.path)) or AT_ONCE
    except BaseException as error:  # noted, not handled
        _note(folder, 2 if isinstance(error, InputError) else 1, f"{type(error).__name__}: {error}")
        raise
    _note(folder, 0, "finished", result)
    return report(folder, result)


def evaluate(recipe: SftRecipe, folder: Path) -> dict[str, float]:
    """Judges `<folder>/final` on held-out prompts; the numbers, which with the table also stand in eval.json."""
    from rl.evaluate import evaluate_policy, numbers, table, write_json

    judged = as_evaluation(recipe, folder)
    with tempfile.TemporaryDirectory(prefix="cohort-evaluate-") as logs:
        found = evaluate_policy(judged, Path(logs))
    print(table(judged, found))
    write_json(folder / "eval.json", numbers(judged, found))
    return {"pass@1": found[0].pass_at[1].value, "pass@1_ci95": found[0].pass_at[1].half}


def as_evaluation(recipe: SftRecipe, folder: Path) -> TrainRecipe:
    """The recipe of `rl.evaluate` for what this run trained."""
    assert recipe.eval.prompts is not None and recipe.rewards is not None
    return TrainRecipe(
        run=recipe.run,
        policy=PolicyConfig(path=str(folder / "final")),
        prompts=recipe.eval.prompts,
        rollout=recipe.rollout,
        rewards=recipe.rewards,
        learner=LearnerConfig(threads=recipe.sft.threads),
        eval=recipe.eval,
    )


def report(folder: RunFolder, result: dict[str, Any], remark: str = "") -> int:
    """Prints what a run gave, on rank 0."""
    if is_main():
        print(
            f"{folder.path}:{remark} {result['steps']} steps in {result['seconds']:.0f} s, loss {result['loss']:.3f}, "
            f"{result['mean_token_accuracy']:.1%} of completion tokens right\n"
            f"  load it: AutoModelForCausalLM.from_pretrained('{folder.path / 'final'}')"
        )
    return 0


def dry_run(recipe: SftRecipe, rows: list[dict[str, Any]], folder: RunFolder, finished: bool) -> int:
    """Prints the resolved recipe, an example row and the size of a step; loads no weights."""
    from sft.plan import describe  # loads torch and transformers

    print(resolved_yaml(recipe))
    print(describe(recipe, rows))
    print(f"{folder.path}: {'finished; its result would be printed again' if finished else 'would be written'}")
    return 0


def check(recipe: SftRecipe) -> None:
    """Raises InputError for a policy folder without a policy, held-out prompts that cannot be read, and a batch that does not divide."""
    if recipe.sft.batch_size % ranks():
        raise InputError(f"sft.batch_size: {recipe.sft.batch_size} rows do not divide among {ranks()} ranks")
    if recipe.policy.path is not None:
        check_policy(PolicyConfig(path=recipe.policy.path))
    if recipe.eval.prompts is not None:
        check_prompts(recipe.eval.prompts)
        check_judge(as_evaluation(recipe, Path()))
        check_conversation(recipe.rollout)


def not_there(recipe: SftRecipe) -> list[str]:
    """A line for each input that is not there yet, with the command that makes it. A file that no recipe here makes is a mistake."""
    from rl.dry_run import MADE_BY, made_by  # loads torch

    policy = recipe.policy.path
    missing = [f"policy.path: no folder '{policy}'; {made_by(policy)}"] if policy and is_local(policy) and not Path(policy).is_dir() else []
    paths = [source.path for source in [recipe.data, *recipe.data.sources] if source.path and not Path(source.path).exists()]
    made = {path: made_by(path) for path in paths}
    return missing + [f"data: no file '{path}'; {how}" for path, how in made.items() if how.startswith(MADE_BY)]


def _note(folder: RunFolder, code: int, reason: str, result: dict[str, Any] | None = None) -> None:
    if is_main():
        folder.write_exit(code, reason, result)


if __name__ == "__main__":
    leave(main())
