"""Supervised fine-tuning: `accelerate launch -m sft.train RECIPE [section.key=value …]`; `python -m sft.train` is one process.

Also the cold start: with `policy.init` the policy is made from nothing and learns the format and the elements of a task. Recipe,
run folder and rows are checked before anything heavy is loaded; `--dry-run` stops there and says what would be done.

A run that was stopped begins again: transformers' resume would drop trained experts, and a cold start takes minutes.
"""

import argparse
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from data.recipe import InputError, read_recipe, resolved_yaml
from rl.config import PolicyConfig
from rl.inputs import check_policy
from rl.run_folder import RunFolder
from sft.config import SftRecipe
from sft.ranks import is_main, ranks
from sft.rows import load_rows


def main() -> int:
    """Returns the exit code: 0 done, 2 a mistake in recipe or inputs."""
    parser = argparse.ArgumentParser(prog="python -m sft.train", description="Supervised fine-tuning, from a recipe.")
    parser.add_argument("recipe", help="YAML file, such as recipes/quickstart_sft.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="replaces a value of the recipe")
    parser.add_argument("--dry-run", action="store_true", help="check everything and say what would be done")
    arguments = parser.parse_args()
    try:
        recipe = read_recipe(arguments.recipe, arguments.overrides, SftRecipe)
        folder = RunFolder(recipe.run.output_dir, recipe.run.name, recipe)
        result = folder.result() if folder.check(recipe.run.resume) else None
        if result is None or arguments.dry_run:
            check(recipe)
            rows = load_rows(recipe)
        if arguments.dry_run:
            return dry_run(recipe, rows, folder, finished=result is not None)
        if result is None:
            return report(recipe, folder, run(recipe, rows, folder))
        return report(recipe, folder, result, " finished before, its result again:")
    except InputError as error:
        print(error, file=sys.stderr)
        return 2


def run(recipe: SftRecipe, rows: list[dict[str, Any]], folder: RunFolder) -> dict[str, Any]:
    """Trains from the beginning; the result also stands in exit.json."""
    # trl reports its use to the hub unless told not to; nothing leaves this machine unasked.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from sft.trainer import load_policy, train  # loads torch, transformers and trl

    policy = load_policy(recipe)
    if is_main():
        folder.claim()
        begin_again(folder.path)
    try:
        result = train(recipe, policy, rows, folder.path)
    except BaseException as error:  # noted, not handled
        if is_main():
            folder.write_exit(1, f"{type(error).__name__}: {error}")
        raise
    if is_main():
        folder.write_exit(0, "finished", result)
    return result


def report(recipe: SftRecipe, folder: RunFolder, result: dict[str, Any], remark: str = "") -> int:
    """Prints what a run gave, on rank 0."""
    if is_main():
        print(
            f"{folder.path}:{remark} {recipe.sft.steps} steps in {result['seconds']:.0f} s, loss {result['loss']:.3f}, "
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
    """Raises InputError for a policy folder without a policy, and for a batch that does not divide among the ranks."""
    if recipe.sft.batch_size % ranks():
        raise InputError(f"sft.batch_size: {recipe.sft.batch_size} rows do not divide among {ranks()} ranks")
    if recipe.policy.path is not None:
        check_policy(PolicyConfig(path=recipe.policy.path))


def begin_again(folder: Path) -> None:
    """Removes what a run that was stopped has left."""
    for name in ("exit.json", "metrics.jsonl"):
        (folder / name).unlink(missing_ok=True)
    for model in folder.glob("final*"):
        shutil.rmtree(model)


if __name__ == "__main__":
    sys.exit(main())
