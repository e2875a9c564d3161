"""Curation: `python -m sft.curate RECIPE [section.key=value …]`: experts -> completions -> scores -> selection ->
cleaning -> mixture -> Records.

Prompts are decontaminated and deduplicated before sampling is paid for. Completions and scores stand in the run's journal, so a run
that was killed goes on where it was, and one that is finished writes its data set anew when `select`, `clean` or `mix` have changed.
`<run>/curated` holds `train.parquet` and `train.jsonl`, what was rejected and why, and the card. Exit codes are those of
`rl/command.py`.
"""

import json
import os
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from data.journal_file import InUse
from data.prompts import check_prompts
from data.recipe import InputError, read_recipe, resolved_yaml
from rewards.versions import reward_versions
from rl.command import asked_to_end, command_line, exit_code, mistake, stopped
from rl.inputs import check_engine, check_policy
from rl.run_folder import RunFolder
from sft.curate_config import FREE, CurateRecipe


def main() -> int:
    arguments = command_line("sft.curate", "Rejection sampling from experts, into SFT data.").parse_intermixed_args()
    try:
        recipe = read_recipe(arguments.recipe, arguments.overrides, CurateRecipe)
        folder = RunFolder(recipe.run.output_dir, recipe.run.name, recipe, FREE)
        if arguments.dry_run:
            from sft.curate_plan import dry_run  # loads torch

            return dry_run(recipe, folder)
        ours = folder.check(recipe.run.resume)
        if ours and (result := finished(recipe, folder)) is not None:
            return report(folder, result, " finished before, its result again:")
        check(recipe)
        return run(recipe, folder)
    except InputError as error:
        return mistake(error)


def run(recipe: CurateRecipe, folder: RunFolder) -> int:
    """Samples, scores, writes, and says in exit.json how it ended; a mistake that is found only then leaves a new folder empty."""
    try:
        result = curate(recipe, folder)
    except InputError as error:
        if not isinstance(error, InUse):  # then the folder is another process's
            folder.withdraw()
        raise
    except BaseException as error:
        if folder.path.is_dir():
            folder.write_exit(exit_code(error), f"{type(error).__name__}: {error}".removesuffix(": "))
        code = stopped(error, str(folder.path))
        if code is None:
            raise
        return code
    folder.write_exit(0, "finished", result)
    return report(folder, result)


def curate(recipe: CurateRecipe, folder: RunFolder) -> dict[str, Any]:
    """The whole of it; returns what the report says, and what was held, sampled and scored in this process."""
    import torch

    from data.journal import Journal
    from rewards.scorer import Scorer
    from rl.engines.vllm import preload
    from rl.run import Interrupted
    from sft.experts import Expert, claim_inputs, claim_rewards
    from sft.records import Writer
    from sft.sampling import Sampler

    began = time.monotonic()
    torch.set_num_threads(recipe.threads or min(os.cpu_count() or 1, 16))
    if any(expert.rollout.engine == "vllm" and expert.sampled is None for expert in recipe.experts):
        preload()
    experts = [Expert(recipe, config) for config in recipe.experts]
    folder.claim()
    asked: list[int] = []
    with ExitStack() as stack:
        journal = stack.enter_context(Journal(folder.path / "journal.sqlite"))
        claim_inputs(journal, experts)
        claim_rewards(journal, recipe.rewards, experts)
        folder.go_on()
        (folder.path / "exit.json").unlink(missing_ok=True)  # it tells of another selection, or of how a process ended before
        cleaned = [expert.clean(recipe.clean, folder.path) for expert in experts]
        for expert in experts:
            _say(f"{expert.name}: {len(expert.kept):,} of {len(expert.prompts):,} prompts after decontamination and dedup")
        stack.enter_context(asked_to_end(lambda: asked.append(1)))
        logs = folder.path / "logs"
        logs.mkdir(exist_ok=True)
        scorer = stack.enter_context(Scorer(recipe.rewards, log_dir=logs))
        sampler = Sampler(journal, scorer, logs, recipe.rewards.max_error_rate, _say)
        if not sampler.run(experts, recipe.experts_at_once, lambda: bool(asked)):
            journal.flush()
            raise Interrupted("asked to end; start again with the same command to go on")
        journal.flush()
        report = Writer(recipe, experts, journal, folder.path).write(cleaned)
    spent = {name: vars(each) for name, each in sampler.spent.items()}
    work = {name: sampler.counts[name] for name in ("held", "sampled", "scored")}
    return report | {"work": work, "engines": spent, "seconds": round(time.monotonic() - began, 1)}


def check(recipe: CurateRecipe) -> None:
    """Raises InputError, one line, for the first input that is wrong or missing; loads neither torch nor vllm."""
    for expert in recipe.experts:
        sampling = recipe.sampling_recipe(expert)
        try:
            check_policy(sampling.policy)
            check_prompts(sampling.prompts)
            if expert.sampled is not None:
                check_sampled(Path(expert.sampled))
            else:
                check_engine(sampling)
        except InputError as error:
            raise InputError(f"experts: {expert.name}: {error}") from None
    for path in recipe.clean.against.paths if recipe.clean.against else ():
        if not Path(path).is_file():
            raise InputError(f"clean.against: no file '{path}'; paths are relative to the working folder, {Path.cwd()}")


def check_sampled(run: Path) -> None:
    """InputError for what is no run of rl.train."""
    if not (run / "recipe.yaml").is_file() or not (run / "journal.sqlite").is_file():
        raise InputError(f"sampled: '{run}' is no run of rl.train; name the folder that holds its recipe.yaml and journal.sqlite")


def finished(recipe: CurateRecipe, folder: RunFolder) -> dict[str, Any] | None:
    """The result of a run of this very recipe, by these very reward functions, that has ended; None if there is something to do."""
    path = folder.path / "exit.json"
    if not path.is_file() or not (folder.path / "curated").is_dir():
        return None
    ended = json.loads(path.read_text(encoding="utf-8"))
    same = (folder.path / "curated" / "recipe.yaml").read_text(encoding="utf-8") == resolved_yaml(recipe)
    return ended["result"] if ended["code"] == 0 and same and ended["result"]["rewards"] == reward_versions(recipe.rewards) else None


def report(folder: RunFolder, result: dict[str, Any], remark: str = "") -> int:
    """Prints the funnel and where the data set is."""
    funnel = " -> ".join(f"{count:,} {stage}" for stage, count in result["stages"])
    work = result["work"]
    print(
        f"{folder.path}:{remark} {funnel}\n"
        f"  {work['sampled']:,} completions sampled and {work['scored']:,} scored, {work['held']:,} held before, "
        f"in {result['seconds']:.0f} s\n"
        f"  read it: datasets.load_dataset('{folder.path / 'curated'}')['train']; {folder.path / 'curated' / 'index.html'} shows some rows"
    )
    return 0


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
