"""`--dry-run`: everything is checked that can be without a model, and what a run would do is said in numbers.

A mistake ends it like a run, with one line. What is not there *yet* does not: it is listed with the command that makes it, and what
depends on it is left out. Nothing is fetched: what the hub has is read when a run starts. Tokens and memory are upper bounds, every
completion as long as it may be; the formulas are those of `rl/estimate.py`.
"""

import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import yaml
from transformers import PreTrainedTokenizerBase

from data.prompt_config import PromptsConfig
from data.prompt_files import is_hub_id, read_rows
from data.prompts import check_prompts, read_prompts
from data.recipe import InputError, resolved_yaml
from data.values import Prompt
from rl.command import main_rank
from rl.config import RolloutConfig, TrainRecipe
from rl.estimate import GB, Machine, Place, colocated_share, learner_ranks, machine_of, pass_tokens, places, sent_bytes
from rl.inputs import (
    check_conversation,
    check_engine,
    check_gpus,
    check_judge,
    check_policy,
    check_router,
    check_routes,
    check_trackers,
    config_file,
    is_local,
    longest_completion,
    prompt_room,
)
from rl.policy import load_tokenizer
from rl.run_folder import RunFolder
from rl.shard import check_sharded
from rl.sizes import Sizes, sizes_of
from rl.step_time import Term, passes_of, step_time, work_of

EXAMPLES = 3
"""Prompts that are shown."""
SHOWN_CHARACTERS = 160
SHARED_MEMORY = ("/dev/shm", tempfile.gettempdir())
"""Where the weight file may be."""
MADE_BY = "made by: "
AT_START = "read from the hub at start"


@dataclass(frozen=True)
class Inputs:
    """What is there of a recipe's inputs."""

    missing: tuple[str, ...]
    """A line for each that is not there yet."""
    lines: tuple[str, ...]
    """What the others are."""
    prompts: dict[str, int | None]
    """Prompts by section, None where they cannot be counted yet."""
    hub: bool
    """Whether something is on a hub, which is read when a run starts."""
    longest_prompt: int | None
    """Tokens; None where no tokenizer is at hand, or prompts are on a hub."""


def dry_run(recipe: TrainRecipe, folder: RunFolder) -> int:
    """Prints what a run of `rl.train` would do; returns the exit code. InputError, one line each, for mistakes."""
    ours = folder.check(recipe.run.resume)
    inputs = look(recipe, ["prompts", "eval.prompts"])
    machine = machine_of(recipe.hardware)
    check_gpus(recipe.rollout, machine.gpus, recipe.loss.replay)
    check_sharded(recipe)
    longest, sizes = longest_sequence(recipe, inputs), policy_sizes(recipe)
    if not main_rank():
        return 0
    print(resolved_yaml(recipe))
    print("\n".join(inputs.lines))
    print(_step(recipe, machine, inputs, longest))
    print(memory(recipe, sizes, machine, longest))
    if recipe.rollout.elsewhere:
        print(_elsewhere(recipe.rollout))
    if (
        sizes is not None
        and longest is not None
        and machine.gpus
        and recipe.rollout.engine == "vllm"
        and not recipe.rollout.servers
        and learner_ranks(recipe, machine) > 0
    ):
        print(step_seconds(recipe, sizes, machine, longest))
    if sizes is not None and recipe.rollout.weights == "file":
        print(_weight_file(recipe, sizes))
    result = folder.result() if ours else None
    if result is not None and result["steps"] >= recipe.learner.steps:
        print(f"{folder.path}: finished; its result would be printed again")
    else:
        print(f"{folder.path}: {'a run of this recipe, which would go on' if ours else 'would be made'}")
    print(_missing(inputs))
    return 0


def dry_evaluation(recipe: TrainRecipe, section: str) -> int:
    """Prints what `rl.evaluate` would do with the prompts of one section; returns the exit code."""
    inputs = look(recipe, [section])
    check_gpus(recipe.rollout, machine_of(recipe.hardware).gpus)
    sizes, count = policy_sizes(recipe), inputs.prompts[section]
    print(resolved_yaml(recipe))
    print("\n".join(inputs.lines))
    each = recipe.eval.samples + (1 if recipe.eval.greedy and recipe.eval.temperature > 0.0 else 0)
    tokens = recipe.eval.max_tokens or recipe.rollout.max_tokens
    if count is not None:
        print(f"evaluation: {count:,} prompts x {each} completions, at most {count * each * tokens:,} tokens sampled")
    print(_policy_line(recipe, sizes))
    print(_missing(inputs))
    return 0


# --- inputs -----------------------------------------------------------------------------------------------------------


def look(recipe: TrainRecipe, sections: list[str]) -> Inputs:
    """Looks at policy, prompts, rewards and engine. InputError for what is wrong; what is absent is listed."""
    assert recipe.policy.path is not None
    check_judge(recipe)
    check_trackers(recipe)
    check_conversation(recipe.rollout)
    check_router(recipe, config_file(recipe.policy))
    missing: list[str] = []
    try:
        check_engine(recipe)
    except InputError as error:
        missing.append(str(error))
    tokenizer = None
    if not is_local(recipe.policy.path):
        policy = f"policy: {recipe.policy.path}, {AT_START}"
    elif Path(recipe.policy.path).is_dir():
        check_policy(recipe.policy)
        tokenizer = load_tokenizer(recipe.policy.path)
        policy = f"policy: {recipe.policy.path}"
    else:
        policy = f"policy: {recipe.policy.path}, not there yet"
        missing.append(f"policy.path: no folder '{recipe.policy.path}'; {made_by(recipe.policy.path)}")
    lines = [policy]
    counts: dict[str, int | None] = {}
    longest: list[int | None] = []
    for section in sections:
        config = recipe.prompts if section == "prompts" else recipe.eval.prompts
        if config is None:
            continue
        if config.path is not None and not Path(config.path).is_file() and not is_hub_id(config.path):
            missing.append(f"{section}.path: no file '{config.path}'; paths are relative to the working folder, {Path.cwd()}")
            counts[section] = None
            longest.append(None)
            continue
        counts[section], tokens, text = _prompts(recipe, section, config, tokenizer)
        longest.append(tokens)
        lines.append(text)
    known = [tokens for tokens in longest if tokens is not None]
    return Inputs(
        missing=tuple(missing), lines=tuple(lines), prompts=counts, hub=any(line.endswith(AT_START) for line in lines),
        longest_prompt=max(known) if known and len(known) == len(longest) else None,
    )  # fmt: skip


def _prompts(
    recipe: TrainRecipe, section: str, config: PromptsConfig, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[int | None, int | None, str]:
    """Their number, the tokens of the longest, and lines that describe them; None for what cannot be known yet."""
    room = prompt_room(recipe)
    if config.path is not None and is_hub_id(config.path):
        return None, None, f"{section}: {config.path} [{config.split}], {AT_START}"
    if tokenizer is None:
        check_prompts(config)
        rows = [row.values for row in islice(read_rows(config), config.limit) if isinstance(row.values, dict)]
        head = f"{section}: {len(rows):,} rows from {config.source}, tokenised when the policy is there"
        column = config.columns.get("prompt", "prompt")
        return len(rows), None, "\n".join([head, *(f"  {_shown(row.get(column))}" for row in rows[:EXAMPLES])])
    read = read_prompts(config, tokenizer, room)
    check_routes(read.prompts, recipe)
    longest = max(len(prompt.token_ids) for prompt in read.prompts)
    skipped = ", ".join(f"{count} {reason}" for reason, count in read.skipped.items())
    head = f"{section}: {len(read.prompts):,} from {config.source}, the longest of {longest} tokens"
    head += f" (left out: {skipped})" if skipped else ""
    return len(read.prompts), longest, "\n".join([head, *(f"  {_example(prompt)}" for prompt in read.prompts[:EXAMPLES])])


def _example(prompt: Prompt) -> str:
    answer = prompt.columns.get("answer")
    return f"{_shown(prompt.text)}  ({len(prompt.token_ids)} tokens)" + (f"  answer {_shown(answer)}" if answer is not None else "")


def _shown(value: Any) -> str:
    """One line without control characters."""
    text = json.dumps(value, ensure_ascii=True)
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 1] + "…"


def made_by(path: str) -> str:
    """The command that makes a policy's folder, or a data set's file: that of the recipe here whose run ends in it."""
    for file in sorted(Path("recipes").rglob("*.yaml")):
        try:
            values = yaml.safe_load(file.read_text(encoding="utf-8"))
        except yaml.YAMLError:  # not what was asked about
            continue
        run = values.get("run") if isinstance(values, dict) else None
        if not isinstance(run, dict):
            continue
        folder = Path(run.get("output_dir", "outputs"), str(run.get("name")))
        if folder / "final" == Path(path):
            return f"{MADE_BY}accelerate launch -m {'rl' if 'rewards' in values and 'sft' not in values else 'sft'}.train {file}"
        if folder / "curated" in Path(path).parents and "experts" in values:
            return f"{MADE_BY}python -m sft.curate {file}"
    return "name a folder that save_pretrained wrote, or a run's `final`, which `accelerate launch -m sft.train RECIPE` makes"


def _missing(inputs: Inputs) -> str:
    if not inputs.missing:
        return "no input is missing; what the hub has was not looked at" if inputs.hub else "no input is missing"
    return "\n".join(["not there yet:", *(f"  {line}" for line in inputs.missing)])


# --- a step and its memory --------------------------------------------------------------------------------------------


def policy_sizes(recipe: TrainRecipe) -> Sizes | None:
    """Sizes from the policy's config; None where that is not at hand."""
    path = config_file(recipe.policy)
    return sizes_of(path, recipe.policy.lora) if path is not None else None


def longest_sequence(recipe: TrainRecipe, inputs: Inputs) -> int | None:
    """Longest prompt and completion together, in tokens: the recipe's, else the prompts', else the policy's context."""
    if recipe.rollout.max_model_len is not None:
        return recipe.rollout.max_model_len
    answer = longest_completion(recipe)
    if inputs.longest_prompt is not None:
        return inputs.longest_prompt + answer
    room = prompt_room(recipe)
    return None if room is None else room + answer


def _step(recipe: TrainRecipe, machine: Machine, inputs: Inputs, longest: int | None) -> str:
    rollout, learner = recipe.rollout, recipe.learner
    p, g = learner.prompts_per_step, rollout.group_size
    zero = " or teaches nothing" if rollout.resample_zero_groups else ""
    again = f"what has no score{zero} is asked again, at most {rollout.max_resamples} times"
    lines = [
        f"a step: {p} prompts x {g} = {p * g:,} completions, at most {p * g:,} x {rollout.max_tokens} = "
        f"{p * g * rollout.max_tokens:,} tokens sampled; {again}"
    ]
    if rollout.conversation is not None:
        lines.append(f"  in turns, by {rollout.conversation}; {rollout.max_tokens} holds for all turns and what tools write between them")
    updates = learner.steps_per_batch * learner.epochs_per_batch
    ranks = learner_ranks(recipe, machine)
    if longest is not None and ranks > 0:
        group, most = pass_tokens(recipe, longest)
        passes = passes_of(recipe, machine, longest)
        lines.append(
            f"  {updates} optimizer step{'s' if updates > 1 else ''}, each of at most {passes} passes on each of {ranks} "
            f"rank{'s' if ranks > 1 else ''}; a group has at most {group:,} tokens, a pass {most:,}"
        )
        if group > learner.micro_tokens:
            lines.append(f"  a group of full length is more than learner.micro_tokens, {learner.micro_tokens:,}: a pass of its own")
    held_out = inputs.prompts.get("eval.prompts")
    if held_out is not None:
        lines.append(f"  an evaluation: {held_out:,} prompts x {recipe.eval.samples} completions")
    return "\n".join([*lines, f"{learner.steps} steps: {p * g * learner.steps:,} completions"])


def _policy_line(recipe: TrainRecipe, sizes: Sizes | None) -> str:
    if sizes is None:
        return "parameters: unknown until the policy is there; policy.config may name a model config"
    trained = f"; the adapter has {sizes.adapter:,}" if sizes.adapter else ""
    return f"parameters: {sizes.total:,}, of which a token uses {sizes.active:,}{trained} (from {config_file(recipe.policy)})"


def memory(recipe: TrainRecipe, sizes: Sizes | None, machine: Machine, longest: int | None) -> str:
    """Parameters, and for each kind of place its parts and by how much they fit."""
    head = _policy_line(recipe, sizes)
    if sizes is None or longest is None:
        return f"{head}\nmemory: unknown until then"
    try:
        found = places(recipe, sizes, machine, longest)
    except InputError as error:
        return f"{head}\nmemory: does not fit: {error}"
    if any(place.left_bytes < 0 for place in found):
        helps = ["more GPUs"]
        helps += ["learner.optimizer.moments=bf16"] if recipe.learner.optimizer.moments == "fp32" else []
        if recipe.learner.optimizer.masters == "fp32" and recipe.policy.lora is None and learner_ranks(recipe, machine) == 1:
            helps += ["learner.optimizer.masters=bf16"] if recipe.policy.precision != "fp32" else []
        helps += ["policy.activation_checkpointing=true"] if not recipe.policy.activation_checkpointing else []
        verdict = f"does not fit; what helps: {', '.join([*helps, 'a lower rollout.max_tokens'])}"
        if recipe.rollout.placement == "colocate":
            verdict += ", a lower rollout.gpu_memory_utilization, placement split"
        if found[0].left_bytes < 0:
            verdict += _spread(recipe, sizes, machine, longest)
    else:
        verdict = "fits, where what is left holds the programs, CUDA contexts, NCCL's buffers and fragmentation"
    return "\n".join([head, *map(_place, found), f"memory: {verdict}", *_other_placement(recipe, sizes, machine, longest)])


def _other_placement(recipe: TrainRecipe, sizes: Sizes, machine: Machine, longest: int) -> list[str]:
    """Whether the placement that the recipe did not take would fit."""
    rollout = recipe.rollout
    if not machine.gpus or rollout.engine != "vllm" or rollout.elsewhere:
        return []
    if rollout.placement == "split":
        shares = colocated_share(recipe, sizes, machine, longest)
        what = f"fits with rollout.gpu_memory_utilization from {shares[0]:.2f} to {shares[1]:.2f}" if shares else "does not fit"
        return [f"memory: placement colocate {what}"]
    split = recipe.model_copy(update={"rollout": rollout.model_copy(update={"placement": "split"})})
    alone = learner_ranks(split, machine) > 0 and all(place.left_bytes >= 0 for place in places(split, sizes, machine, longest))
    return [f"memory: placement split {'fits' if alone else 'does not fit'}"]


def _spread(recipe: TrainRecipe, sizes: Sizes, machine: Machine, longest: int) -> str:
    """What expert parallelism would bring a learner that does not fit: the fewest GPUs to a layer's experts with which it would."""
    ranks = learner_ranks(recipe, machine)
    for expert_parallel in (2**n for n in range(1, 12)):
        if not machine.gpus or not sizes.experts or sizes.experts % expert_parallel or ranks % expert_parallel:
            continue
        left = places(recipe, sizes, machine, longest, expert_parallel)[0].left_bytes
        if left >= 0:
            return (
                f"\nmemory: with each layer's experts spread over {expert_parallel} GPUs, {left / GB:.2f} GB would be left on each that "
                f"learns: transformers has that (DistributedConfig(ep_size={expert_parallel})), the learner does not use it yet"
            )
    return ""


def step_seconds(recipe: TrainRecipe, sizes: Sizes, machine: Machine, longest: int) -> str:
    """The estimated time of a step, by phase and term."""
    found = step_time(work_of(recipe, sizes, machine, longest), sizes)
    joined = "the longer of sampling and learning, and sync" if found.ahead else "together"
    head = (
        f"time: {found.total_s:.0f} s a step ({joined}) with every completion as long as it may be, by arithmetic for H100s; steps\n"
        "  that NeMo-RL publishes took 1.2 to 2.1 times what this arithmetic gives for them (recipes/README.md)"
    )

    def line(phase: str, term: Term) -> str:
        return f"  {phase + ': ' + term.name:<36}  {term.seconds:>8.1f} s   {term.formula}"

    phases = {"rollout": found.rollout, "learn": found.learn, "sync": found.sync}
    return "\n".join([head, *(line(phase, term) for phase, terms in phases.items() for term in terms)])


def _elsewhere(rollout: RolloutConfig) -> str:
    """Engines that are not this machine's; they are not looked for before a run starts."""
    if rollout.servers:
        return f"engines: {', '.join(rollout.servers)}; their memory is not counted here, and whether they answer is seen when a run starts"
    return f"engines: {rollout.engines} on the Ray cluster {os.environ.get('RAY_ADDRESS') or 'of this machine'}, where it has room"


def _weight_file(recipe: TrainRecipe, sizes: Sizes) -> str:
    """Shared memory that weight updates go through, and whether this machine has it; one that the recipe names is not here to be asked."""
    need = sizes.total * sent_bytes(recipe)
    line = f"weight file: {need / GB:.3f} GB of shared memory, through which updates reach the engines"
    if recipe.hardware is not None:
        return f"{line}; /dev/shm has to hold it"
    free = {place: shutil.disk_usage(place).free for place in SHARED_MEMORY if Path(place).is_dir()}
    room = ", ".join(f"{place} has {left / GB:.2f} GB" for place, left in free.items())
    if max(free.values()) > need:
        return f"{line}; fits: {room} free"
    return f"{line}; does not fit: {room} free; enlarge /dev/shm (docker: --shm-size) or set TMPDIR to a folder with room"


def _place(place: Place) -> str:
    width = max(len(part.name) for part in place.parts)
    lines = [f"memory: {place.name}, {place.room_bytes / GB:.2f} GB:"]
    lines += [f"  {part.name:<{width}}  {part.bytes / GB:>8.3f} GB   {part.formula}" for part in place.parts]
    left = place.left_bytes
    verdict = f"fits, {left / GB:.2f} GB are left" if left >= 0 else f"does not fit, {-left / GB:.2f} GB too much"
    lines.append(f"  {'together':<{width}}  {place.used_bytes / GB:>8.3f} GB   {verdict}")
    return "\n".join(lines)
