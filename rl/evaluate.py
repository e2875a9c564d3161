"""Evaluation on its own: `python -m rl.evaluate RECIPE [section.key=value …] [--out numbers.json]`.

Samples `eval.prompts` (the recipe's `prompts` if it has none) from `policy.path` and says pass@1, pass@k and maj@k with 95 %
intervals over prompts. Any policy can be named on the command line: `policy.path=outputs/quickstart/final`. It makes no run folder;
the logs of engines and rewards are in a temporary one, which stays and is named where something went wrong. Exit codes are those
of `rl/command.py`.
"""

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.recipe import InputError, read_recipe
from rl.command import AT_ONCE, command_line, mistake, stopped
from rl.config import TrainRecipe
from rl.inputs import check_inputs, judge_of, read_prompt_sets

if TYPE_CHECKING:
    from rl.evaluation import Evaluation


def main() -> int:
    parser = command_line("rl.evaluate", "pass@1, pass@k and maj@k of a policy.")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also writes the numbers as JSON")
    arguments = parser.parse_intermixed_args()
    try:
        recipe = read_recipe(arguments.recipe, arguments.overrides, TrainRecipe)
        if arguments.out is not None and not arguments.out.absolute().parent.is_dir():
            raise InputError(f"--out: no folder '{arguments.out.parent}'; paths are relative to the working folder, {Path.cwd()}")
        if arguments.dry_run:
            from rl.dry_run import dry_evaluation  # loads torch

            return dry_evaluation(recipe, "eval.prompts" if recipe.eval.prompts else "prompts")
        check_inputs(recipe)
    except InputError as error:
        return mistake(error)
    if recipe.eval.prompts is None:
        _say("eval.prompts is null: these are the recipe's own prompts, those that it trains on")
    return run_evaluation(recipe, arguments.out)


def run_evaluation(recipe: TrainRecipe, out: Path | None) -> int:
    """Evaluates, prints a table and writes the numbers; returns the exit code."""
    logs = Path(tempfile.mkdtemp(prefix="cohort-evaluate-"))
    try:
        found = evaluate_policy(recipe, logs)
    except InputError as error:
        shutil.rmtree(logs)
        return mistake(error)
    except KeyboardInterrupt:
        shutil.rmtree(logs)
        print("ended by Ctrl-C; nothing was written", file=sys.stderr)
        return AT_ONCE
    except BaseException as error:  # the logs, which may explain it, stay
        code = stopped(error, str(recipe.policy.path))
        print(f"logs are in {logs}", file=sys.stderr)
        if code is None:
            raise
        return code
    shutil.rmtree(logs)
    print(table(recipe, found))
    if out is not None:
        write_json(out, numbers(recipe, found))
        print(f"written: {out}")
    return 0


def evaluate_policy(recipe: TrainRecipe, logs: Path) -> "list[Evaluation]":
    """As `eval` says: `samples` at its temperature, then with `greedy` one greedy completion of each prompt."""
    import torch

    from rewards.scorer import Scorer
    from rl.conversation_pool import make_pool
    from rl.engines.base import Sampling
    from rl.engines.make import make_engines
    from rl.evaluation import evaluate
    from rl.fp8.folder import engine_policy
    from rl.policy import load_tokenizer, policy_folder

    config = recipe.eval
    torch.set_num_threads(recipe.learner.threads or min(os.cpu_count() or 1, 16))
    assert recipe.policy.path is not None
    source = policy_folder(recipe.policy.path, recipe.policy.revision)
    tokenizer = load_tokenizer(source)
    (prompts,), max_model_len = read_prompt_sets(recipe, [config.prompts or recipe.prompts], tokenizer)
    passes = [(config.samples, config.temperature)]
    if config.greedy and config.temperature > 0.0:
        passes.append((1, 0.0))
    folder = engine_policy(recipe.policy, source, logs / "policy")
    engines = make_engines(recipe.rollout, recipe.policy, folder, max_model_len, logs, say=_say)
    found = []
    with Scorer(recipe.rewards, log_dir=logs) as scorer, make_pool(recipe.rollout, engines, tokenizer, _say) as pool:
        for samples, temperature in passes:
            sampling = Sampling(config.max_tokens or recipe.rollout.max_tokens, temperature, tuple(recipe.rollout.stop))
            found.append(
                evaluate(
                    pool, scorer, prompts.prompts, tokenizer, sampling,
                    samples=samples, part=judge_of(recipe), label=f"evaluate-{temperature:g}", seed=recipe.run.seed,
                )
            )  # fmt: skip
    return found


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def numbers(recipe: TrainRecipe, found: "list[Evaluation]") -> dict[str, Any]:
    """What stands in the file: whose numbers they are, and one object for each temperature."""
    prompts = recipe.eval.prompts or recipe.prompts
    return {
        "policy": recipe.policy.path,
        "revision": recipe.policy.revision,
        "prompts": {"source": prompts.source, "split": prompts.split, "options": prompts.options},
        "reward": judge_of(recipe),
        "seed": recipe.run.seed,
        "engine": recipe.rollout.engine,
        "evaluations": [
            {
                "temperature": one.temperature,
                "prompts": one.prompts,
                "samples": one.samples,
                **{f"pass@{k}": {"value": e.value, "ci95": _finite(e.half)} for k, e in one.pass_at.items()},
                **({f"maj@{one.samples}": {"value": one.maj.value, "ci95": _finite(one.maj.half)}} if one.samples > 1 else {}),
                "mean_length": one.mean_length,
                **({"turns": one.turns} if one.turns is not None else {}),
                "entropy": one.entropy,
                "unscored": one.unscored,
                "seconds": one.seconds,
            }
            for one in found
        ],
    }


def table(recipe: TrainRecipe, found: "list[Evaluation]") -> str:
    """A column for each temperature."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    prompts = recipe.eval.prompts or recipe.prompts
    titles = [f"temperature {e.temperature:g}, {e.samples} completions" if e.temperature else "greedy" for e in found]
    rows = Table(f"{found[0].prompts:,} prompts", *titles, title_justify="left")
    for k in sorted({k for one in found for k in one.pass_at}):
        rows.add_row(f"pass@{k}", *(str(one.pass_at[k]) if k in one.pass_at else "-" for one in found))
    if found[0].samples > 1:
        rows.add_row(f"maj@{found[0].samples}", *(str(one.maj) if one.samples > 1 else "-" for one in found))
    rows.add_row("mean length", *(f"{one.mean_length:.1f} tokens" for one in found))
    if found[0].turns is not None:
        rows.add_row("turns", *(f"{one.turns:.2f}" for one in found))
    rows.add_row("entropy", *(f"{one.entropy:.3f} nats a token" for one in found))
    rows.add_row("without a verdict", *(f"{one.unscored}" for one in found))
    rows.add_row("time", *(f"{one.seconds:.1f} s" for one in found))
    console = Console(width=100, highlight=False)
    with console.capture() as captured:
        console.print(escape(f"{recipe.policy.path} on {prompts.source} [{prompts.split}], right by {judge_of(recipe)}; ± is 95 %"))
        console.print(rows)
    return captured.get().rstrip()


def write_json(path: Path, values: dict[str, Any]) -> None:
    """A whole file or none."""
    aside = path.with_name(f".{path.name}.partial")
    aside.write_text(json.dumps(values, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(aside, path)


def _finite(half: float) -> float | None:
    """One prompt has no interval; JSON has no infinity."""
    return half if half != float("inf") else None


if __name__ == "__main__":
    sys.exit(main())
