"""Several policies on several sets of held-out prompts: `python -m sft.table RECIPE [section.key=value …]`.

Every policy is judged on every domain as `rl.evaluate` does it, with the same random numbers, and the differences that a recipe asks
about are paired by prompt: what is hard for both cancels out, so the interval is as narrow as it can be. Each evaluation is kept in the
run's folder, by the weights, prompts and rewards it is of, and is not done again.
"""

import hashlib
import json
import math
import sys
import tempfile
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from pydantic import Field, model_validator

from data.prompt_config import PromptsConfig
from data.prompts import check_prompts
from data.recipe import InputError, Section, nearest, read_recipe, resolved_yaml
from rewards.config import RewardsConfig
from rewards.versions import reward_versions
from rl.command import command_line, mistake
from rl.config import EvalConfig, LearnerConfig, PolicyConfig, RolloutConfig, RunConfig, TrainRecipe
from rl.inputs import check_conversation, check_engine, check_policy, is_local
from rl.run_folder import RunFolder

Z95 = 1.959964
FREE = ("compare", "margin", "policies", "domains", "rollout", "threads")
"""What may differ when a table is made again: each evaluation in its folder says what it was asked."""


class NamedPolicy(Section):
    name: str = Field(pattern=r"^[A-Za-z0-9][\w .\-]*$")
    path: str
    """Folder or hub id."""


class DomainConfig(Section):
    name: str = Field(pattern=r"^[A-Za-z0-9][\w .\-]*$")
    prompts: PromptsConfig
    """Held-out prompts."""
    against: str | None = None
    """The policy that `compare` is compared with here: the domain's expert."""


class TableRecipe(Section):
    """A recipe of `sft.table`."""

    run: RunConfig
    policies: list[NamedPolicy] = Field(min_length=1)
    domains: list[DomainConfig] = Field(min_length=1)
    compare: str | None = None
    """The policy that is compared with each domain's `against`."""
    margin: float = Field(0.02, ge=0.0)
    """How much worse it may be: the comparison holds if the lower end of the paired 95 % interval is above minus this."""
    samples: int = Field(4, ge=1)
    """Completions of each prompt."""
    temperature: float = Field(1.0, ge=0.0)
    rollout: RolloutConfig = RolloutConfig()
    rewards: RewardsConfig
    threads: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _known(self) -> "TableRecipe":
        names = [policy.name for policy in self.policies]
        for name in [*(domain.against for domain in self.domains), self.compare]:
            if name is not None and name not in names:
                raise ValueError(f"no policy named '{name}'{nearest(name, names)}")
        if self.compare is None and any(domain.against for domain in self.domains):
            raise ValueError("compare: missing; it names the policy that is compared with each domain's `against`")
        return self

    def evaluation(self, policy: NamedPolicy, domain: DomainConfig) -> TrainRecipe:
        return TrainRecipe(
            run=self.run,
            policy=PolicyConfig(path=policy.path),
            prompts=domain.prompts,
            rollout=self.rollout,
            rewards=self.rewards,
            learner=LearnerConfig(threads=self.threads),
            eval=EvalConfig(samples=self.samples, temperature=self.temperature, greedy=False),
        )


def main() -> int:
    arguments = command_line("sft.table", "Several policies on several sets of held-out prompts.").parse_intermixed_args()
    try:
        recipe = read_recipe(arguments.recipe, arguments.overrides, TableRecipe)
        folder = RunFolder(recipe.run.output_dir, recipe.run.name, recipe, FREE)
        folder.check(recipe.run.resume)
        if arguments.dry_run:
            from rl.dry_run import made_by  # loads torch

            missing = [p.path for p in recipe.policies if is_local(p.path) and not Path(p.path).is_dir()]
            lines = [f"  policies: no folder '{path}'; {made_by(path)}" for path in missing]
            print("\n".join([resolved_yaml(recipe), *(["not there yet:", *lines] if lines else ["no input is missing"])]))
            return 0
        for policy in recipe.policies:
            check_policy(PolicyConfig(path=policy.path))
        for domain in recipe.domains:
            check_prompts(domain.prompts)
        check_engine(recipe.evaluation(recipe.policies[0], recipe.domains[0]))
        check_conversation(recipe.rollout)
        folder.claim()
        found = {(p.name, d.name): evaluated(recipe, p, d, folder.path) for p in recipe.policies for d in recipe.domains}
    except InputError as error:
        return mistake(error)
    print(shown(recipe, found))
    folder.write("table.json", json.dumps({"comparisons": comparisons(recipe, found)}, indent=2) + "\n")
    return 0


def evaluated(recipe: TableRecipe, policy: NamedPolicy, domain: DomainConfig, folder: Path) -> dict[str, Any]:
    """pass@1 and the share of right completions of each prompt; from the folder, if it was done for these
    weights, prompts and reward functions."""
    from rl.evaluate import evaluate_policy, numbers, write_json
    from rl.policy import policy_folder
    from sft.provenance import weight_hash

    weights = weight_hash(policy_folder(policy.path, None))
    path = folder / f"{policy.name}-{domain.name}.json"
    asked = {
        "weights": weights,
        "prompts": domain.prompts.model_dump(mode="json"),
        "prompts_sha256": _file_hash(domain.prompts.path),
        "rollout": recipe.rollout.model_dump(mode="json"),
        "reward_versions": reward_versions(recipe.rewards),
    }
    if path.is_file() and (held := json.loads(path.read_text(encoding="utf-8")))["asked"] == asked:
        return held
    print(f"{policy.name} on {domain.name} …", flush=True)
    judged = recipe.evaluation(policy, domain)
    with tempfile.TemporaryDirectory(prefix="cohort-table-") as logs:
        found = evaluate_policy(judged, Path(logs))
    held = {"asked": asked, **numbers(judged, found), "right": found[0].right}
    write_json(path, held)
    return held


def _file_hash(path: str | None) -> str | None:
    """sha256 of a prompt file; None for a task or a hub id."""
    if path is None or not Path(path).is_file():
        return None
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def comparisons(recipe: TableRecipe, found: dict[tuple[str, str], dict[str, Any]]) -> list[dict[str, Any]]:
    """The paired difference of `compare` and each domain's `against`, with its 95 % interval."""
    out = []
    for domain in recipe.domains:
        if domain.against is not None and recipe.compare is not None:
            ours, theirs = (found[name, domain.name]["right"] for name in (recipe.compare, domain.against))
            value, half = paired([ours[prompt] - theirs[prompt] for prompt in sorted(ours.keys() & theirs.keys())])
            holds = value - half >= -recipe.margin
            out.append({"domain": domain.name, "against": domain.against, "difference": value, "ci95": half, "holds": holds})
    return out


def paired(differences: list[float]) -> tuple[float, float]:
    """Mean difference over prompts and half the width of its 95 % interval."""
    half = Z95 * stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else math.inf
    return fmean(differences), half


def shown(recipe: TableRecipe, found: dict[tuple[str, str], dict[str, Any]]) -> str:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    title = f"pass@1 at temperature {recipe.temperature:g}, {recipe.samples} completions a prompt, 95 % intervals over prompts"
    table = Table(
        "", *(f"{domain.name} ({len(found[recipe.policies[0].name, domain.name]['right']):,} prompts)" for domain in recipe.domains)
    )
    for policy in recipe.policies:
        cells = []
        for domain in recipe.domains:
            one = found[policy.name, domain.name]["evaluations"][0]["pass@1"]
            cells.append(f"{100 * one['value']:.1f} % ± {100 * one['ci95']:.1f}")
        table.add_row(escape(policy.name), *cells)
    console = Console(width=120, highlight=False)
    with console.capture() as captured:
        console.print(escape(title))
        console.print(table)
        for one in comparisons(recipe, found):
            low, high = (100 * (one["difference"] + sign * one["ci95"]) for sign in (-1, 1))
            verdict = "holds" if one["holds"] else "does not hold"
            line = f"{recipe.compare} against {one['against']} on {one['domain']}: {100 * one['difference']:+.1f} points, "
            line += f"paired 95 % interval {low:+.1f} to {high:+.1f}; at least as good minus {100 * recipe.margin:g} points: {verdict}"
            console.print(escape(line))
    return captured.get().rstrip()


if __name__ == "__main__":
    sys.exit(main())
