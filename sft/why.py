"""Where a row comes from: `python -m sft.why DATASET ROW`: prints its history and samples it again from the same expert and seed.

DATASET is a folder that curation wrote, or its train file; ROW counts from 0. The recipe, and with it the expert, is found in the run
whose folder the data set stands in, or named by --run. Exit code 0: the row came out the same, or cannot be sampled again for a reason
that is said; 1: it came out otherwise; 2: a mistake in what was given.
"""

import argparse
import json
import os
import sys
import tempfile
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.card import train_file
from data.recipe import InputError, read_recipe
from data.records import record_from_row
from data.rows import read_files
from data.values import Record
from rl.command import mistake
from sft.curate_config import CurateRecipe

if TYPE_CHECKING:
    from data.values import Completion
    from sft.experts import Expert

SHOWN = 2000
"""Characters of a message that are printed."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m sft.why", description="The history of a row, and the row sampled again.")
    parser.add_argument("dataset", type=Path, metavar="DATASET", help="a folder that curation wrote, or its train.parquet or train.jsonl")
    parser.add_argument("row", type=int, metavar="ROW", help="its number, from 0")
    parser.add_argument("--run", type=Path, metavar="FOLDER", help="the run that curated it, where the data set stands elsewhere")
    arguments = parser.parse_args()
    try:
        file = train_file(arguments.dataset) if arguments.dataset.is_dir() else arguments.dataset
        record = read_record(file, arguments.row)
        print(history(record))
        folder = arguments.run or file.absolute().parent.parent
        return sample_again(record, folder)
    except InputError as error:
        return mistake(error)


def read_record(file: Path, number: int) -> Record:
    """One row of a file of records."""
    if not file.is_file():
        raise InputError(f"DATASET: no file '{file}'; name a folder that curation wrote, or its train.parquet or train.jsonl")
    if number < 0:
        raise InputError(f"ROW: {number}; rows count from 0")
    row = next(islice(read_files([file]), number, None), None)
    if row is None:
        raise InputError(f"ROW: {file} has no row {number}; they count from 0")
    try:
        return record_from_row(row.values)
    except ValueError as error:
        raise InputError(f"{row.place}: {error}; name a data set that sft.curate wrote") from None


def history(record: Record) -> str:
    """What the row says of itself. Texts are escaped: a model's words are no commands to a terminal."""
    provenance = record.provenance
    lines = [f"{message['role']}: {_escaped(message['content'])}" for message in record.messages]
    rate = "unknown" if provenance.pass_rate is None else f"{provenance.pass_rate:.0%}"
    lines += [
        "",
        f"prompt      {_escaped(provenance.prompt_id)} of {_escaped(provenance.source)}",
        f"expert      {provenance.expert}, weights {provenance.expert_hash[:16] or 'none: the response came with the problem'}",
        f"sampled     completion {provenance.index} of group {_escaped(provenance.group_id)}, seed {provenance.seed}, "
        f"{provenance.tokens} tokens, ended by {provenance.finish_reason}",
        f"settings    {json.dumps(provenance.sampling)}",
        f"reward      {provenance.reward}; pass rate of its group {rate}",
    ]
    lines += [f"  {name}@{version}: {provenance.parts.get(name)}" for name, version in sorted(provenance.rewards.items())]
    lines += [f"passed      {', '.join(provenance.filters) or 'no filter'}", f"recipe      {provenance.recipe_hash[:16]}"]
    return "\n".join(lines)


def sample_again(record: Record, folder: Path) -> int:
    """Asks the expert once more and compares; prints the verdict and returns the exit code."""
    provenance = record.provenance
    kind = provenance.sampling.get("kind")
    if kind != "expert":
        why = (
            "its response came with the problem"
            if kind == "original"
            else "a training run sampled it, from weights that have changed since"
        )
        print(f"not sampled again: {why}")
        return 0
    if not (folder / "recipe.yaml").is_file():
        raise InputError(f"no run in '{folder}'; name the folder of the curation that wrote this data set by --run")
    recipe = read_recipe(folder / "recipe.yaml", [], CurateRecipe)
    config = recipe.expert(provenance.expert)
    if config is None:
        raise InputError(f"{folder}: its recipe has no expert named '{provenance.expert}'; name the right run by --run")
    from sft.experts import Expert  # loads torch

    expert = Expert(recipe, config)
    if expert.weights != provenance.expert_hash:
        raise InputError(
            f"experts: {expert.name}: '{config.path}' holds the weights {expert.weights[:16]} now, and the row was sampled from "
            f"{provenance.expert_hash[:16]}; restore them to sample it again"
        )
    return verdict(record, expert, completion_again(record, expert, recipe))


def completion_again(record: Record, expert: "Expert", recipe: CurateRecipe) -> "Completion":
    """The same completion asked of the same expert; where an engine's call is over a whole group, the whole group."""
    import torch

    from data.journal import Attempt, Slot
    from rl.engines.base import Sampling
    from rl.engines.make import make_engines
    from rl.pool import RolloutPool
    from sft.sampling import request

    provenance = record.provenance
    torch.set_num_threads(recipe.threads or min(os.cpu_count() or 1, 16))
    places = {prompt.id: position for position, prompt in enumerate(expert.prompts)}
    if provenance.prompt_id not in places:
        raise InputError(f"experts: {expert.name}: its prompts have none with the id '{provenance.prompt_id}' any more; restore them")
    position = places[provenance.prompt_id]
    number = int(provenance.group_id.rpartition("/")[2])
    rollout = expert.config.rollout
    attempt = Attempt(0, provenance.group_id, Slot(expert.name, position, provenance.prompt_id), number, rollout.group_size, 0, 0)
    sampling = Sampling(rollout.max_tokens, rollout.temperature, tuple(rollout.stop))
    found: dict[int, Completion] = {}

    def keep(completion: "Completion") -> None:
        found[completion.index] = completion

    with tempfile.TemporaryDirectory(prefix="cohort-why-") as logs:
        engines = make_engines(expert.recipe.rollout, expert.recipe.policy, expert.folder, expert.max_model_len, Path(logs), say=print)
        with RolloutPool(engines) as pool:
            indices = range(rollout.group_size) if engines[0].whole_groups else [provenance.index]
            pool.collect([[request(expert, expert.prompts[position], attempt, index, sampling) for index in indices]], keep)
    return found[provenance.index]


def verdict(record: Record, expert: "Expert", again: "Completion") -> int:
    from sft.records import written_messages

    provenance = record.provenance
    prompt = next(prompt for prompt in expert.prompts if prompt.id == provenance.prompt_id)
    text = written_messages(prompt, expert, expert.text(again))[-1]["content"]
    same = text == record.messages[-1]["content"] and len(again.token_ids) == provenance.tokens and again.seed == provenance.seed
    if same:
        print(f"sampled again: the same, {len(again.token_ids)} tokens")
        return 0
    print(f"sampled again: not the same; now {len(again.token_ids)} tokens (there were {provenance.tokens}): {_escaped(text)}")
    return 1


def _escaped(value: Any) -> str:
    """One line without control characters."""
    text = json.dumps(value, ensure_ascii=True)[1:-1] if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= SHOWN else text[: SHOWN - 1] + "…"


if __name__ == "__main__":
    sys.exit(main())
