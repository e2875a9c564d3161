"""What a curation would do, in numbers; loads no weights and samples nothing."""

from pathlib import Path

from data.prompt_files import is_hub_id
from data.recipe import InputError, resolved_yaml
from rl.dry_run import look
from rl.run_folder import RunFolder
from sft.curate_config import CurateRecipe, ExpertConfig


def dry_run(recipe: CurateRecipe, folder: RunFolder) -> int:
    """Prints the resolved recipe, each expert's prompts and completions, and what is not there yet; returns the exit code."""
    folder.check(recipe.run.resume)
    missing: list[str] = []
    print(resolved_yaml(recipe))
    for expert in recipe.experts:
        print(f"expert {expert.name}:")
        for line in _expert(recipe, expert, missing):
            print("\n".join(f"  {part}" for part in line.splitlines()))
    for path in recipe.clean.against.paths if recipe.clean.against else ():
        if not Path(path).is_file():
            missing.append(f"clean.against: no file '{path}'; paths are relative to the working folder, {Path.cwd()}")
    print("\n".join(["not there yet:", *(f"  {line}" for line in dict.fromkeys(missing))]) if missing else "no input is missing")
    print(f"{folder.path / 'curated'}: would be written")
    return 0


def _expert(recipe: CurateRecipe, expert: ExpertConfig, missing: list[str]) -> list[str]:
    try:
        found = look(recipe.sampling_recipe(expert), ["prompts"])
    except InputError as error:
        raise InputError(f"experts: {expert.name}: {error}") from None
    missing += [f"experts: {expert.name}: {line}" for line in found.missing]
    lines = list(found.lines)
    if expert.sampled is not None:
        if not (Path(expert.sampled) / "recipe.yaml").is_file():
            missing.append(
                f"experts: {expert.name}: sampled: no run in '{expert.sampled}'; `accelerate launch -m rl.train RECIPE` makes one"
            )
        return [*lines, f"takes what {expert.sampled} has sampled, from step {expert.since_step} on"]
    prompts, size = found.prompts["prompts"], expert.rollout.group_size
    if prompts is None or (expert.prompts.path is not None and is_hub_id(expert.prompts.path)):
        return [*lines, f"{size} completions of each prompt, by {expert.rollout.engine}"]
    most = prompts * size * expert.rollout.max_tokens
    return [*lines, f"{prompts * size:,} completions ({size} a prompt, {most:,} tokens at most), by {expert.rollout.engine}"]
