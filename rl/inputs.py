"""What a run needs to find before a model is loaded: policy, prompts, rewards, room on the disk. Loads neither torch nor vllm."""

import importlib.util
import inspect
import json
import os
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from data.prompt_config import PromptsConfig
from data.prompt_files import is_hub_id
from data.prompts import PromptSet, check_prompts, read_prompts
from data.recipe import InputError
from data.values import Prompt
from rewards.plugins import CONVERSATIONS, find_plugin
from rewards.registry import BUILTINS
from rewards.worker import import_function
from rl.config import PolicyConfig, RolloutConfig, TrainRecipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

COLD_START = "accelerate launch -m sft.train recipes/quickstart_sft.yaml makes the quickstart's"


def check_inputs(recipe: TrainRecipe) -> None:
    """Raises InputError, one line, for the first input that is wrong or missing."""
    check_policy(recipe.policy)
    check_prompts(recipe.prompts)
    if recipe.eval.prompts is not None:
        check_prompts(recipe.eval.prompts)
    check_judge(recipe)
    check_engine(recipe)
    check_router(recipe, config_file(recipe.policy))
    check_trackers(recipe)
    check_conversation(recipe.rollout)


def check_conversation(rollout: RolloutConfig) -> None:
    if rollout.conversation is not None:
        load_conversation(rollout.conversation)


def load_conversation(named: str) -> Callable[..., Awaitable[Any]]:
    """The function that `rollout.conversation` names; InputError if its module does not load, or it is no async function."""
    plugin = find_plugin(named, CONVERSATIONS)
    try:
        function = import_function(plugin.source, plugin.function)
    except Exception as error:  # whatever its module raises is what the user must see
        said = " ".join(str(error).split())
        raise InputError(f"rollout.conversation: {plugin.source} cannot be imported: {type(error).__name__}: {said}") from error
    if not inspect.iscoroutinefunction(function):
        raise InputError(f"rollout.conversation: {named} is no async function; it is `async def {plugin.function}(generate, prompt)`")
    return function


def is_local(path: str) -> bool:
    """Whether a policy's path means a folder; `org/name` is a hub id unless there is such a folder."""
    return os.path.exists(path) or not is_hub_id(path) or path.startswith(("outputs/", "./", "/"))


def check_policy(policy: PolicyConfig) -> None:
    """A folder has to hold config, safetensors and tokenizer; a hub id is looked at when it is loaded."""
    assert policy.path is not None
    if not is_local(policy.path):
        return
    folder = Path(policy.path)
    if not folder.is_dir():
        raise InputError(f"policy.path: no folder '{folder}' (looked from {os.getcwd()}); {COLD_START}")
    if not (folder / "config.json").is_file():
        raise InputError(f"policy.path: '{folder}' has no config.json; name a folder that save_pretrained wrote")
    if not any(folder.glob("*.safetensors")):
        other = next((p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth")), None)
        found = f"it holds {other}, and only safetensors are read" if other else "no *.safetensors"
        raise InputError(f"policy.path: '{folder}' has no weights: {found}; save it with save_pretrained")
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        raise InputError(f"policy.path: '{folder}' has no tokenizer; save it there with tokenizer.save_pretrained")


def config_file(policy: PolicyConfig) -> Path | None:
    """The config that says how large the policy is: its folder's, else `policy.config`; None where neither is at hand."""
    named = [Path(policy.path or "") / "config.json", *([Path(policy.config)] if policy.config else [])]
    return next((path for path in named if path.is_file()), None)


def context_length(policy: PolicyConfig) -> int | None:
    """Longest input of the policy in tokens by its config, where that is at hand."""
    path = config_file(policy)
    return json.loads(path.read_text(encoding="utf-8")).get("max_position_embeddings") if path else None


def longest_completion(recipe: TrainRecipe) -> int:
    """Tokens, in training or evaluation."""
    return max(recipe.rollout.max_tokens, recipe.eval.max_tokens or 0)


def prompt_room(recipe: TrainRecipe) -> int | None:
    """Tokens that a prompt may take of the context; None is no limit. InputError if completions leave nothing."""
    context, asked = context_length(recipe.policy), recipe.rollout.max_model_len
    if context is not None and asked is not None and asked > context:
        raise InputError(f"rollout.max_model_len: {asked} is more than the policy's context of {context} tokens")
    context = asked or context
    answer = longest_completion(recipe)
    if context is not None and answer >= context:
        raise InputError(f"rollout.max_tokens: {answer} leaves no room for a prompt in a context of {context} tokens")
    return None if context is None else context - answer


def read_prompt_sets(
    recipe: TrainRecipe, configs: Sequence[PromptsConfig], tokenizer: "PreTrainedTokenizerBase"
) -> tuple[list[PromptSet], int]:
    """Prompts of each source, and the longest prompt and completion together in tokens: what engines are built for."""
    room = prompt_room(recipe)
    sets = [read_prompts(config, tokenizer, room) for config in configs]
    longest = max(len(prompt.token_ids) for read in sets for prompt in read.prompts)
    return sets, recipe.rollout.max_model_len or longest + longest_completion(recipe)


ROUTERS = {"deepseek_v3": ("bias_step", "sequence_loss"), "qwen3_moe": ("aux_loss",)}
"""What balances the experts of a policy, by its config's model_type; their routes can be replayed."""


def check_router(recipe: TrainRecipe, config: Path | None) -> None:
    """InputError for a setting of the router, or a replay, that the policy of this config has no use for."""
    if config is None:
        return  # a hub id's is looked at when it is there
    try:
        model_type = json.loads(config.read_text(encoding="utf-8")).get("model_type")
    except ValueError:
        return  # loading the policy says what is wrong with it
    has = ROUTERS.get(model_type, ())
    for name, value in recipe.learner.router:
        if value and name not in has:
            whose = " and ".join(kind for kind, names in ROUTERS.items() if name in names)
            way_out = f"it has {' and '.join(has)}" if has else "it is no mixture of experts that can be balanced; set it to 0"
            raise InputError(f"learner.router.{name}: is for {whose}, and the policy is {model_type}; {way_out}")
    if recipe.loss.replay != "none" and not has:
        raise InputError(
            f"loss.replay: {recipe.loss.replay}: routes of {model_type} cannot be replayed, those of {' and '.join(ROUTERS)} can"
        )


def check_judge(recipe: TrainRecipe) -> None:
    names = [part.key for part in recipe.rewards.parts]
    if recipe.eval.reward is not None and recipe.eval.reward not in names:
        raise InputError(f"eval.reward: no part named '{recipe.eval.reward}'; rewards.parts has {', '.join(names)}")


def check_routes(prompts: Sequence[Prompt], recipe: TrainRecipe) -> None:
    """InputError for a prompt that is routed to rewards which the recipe does not have, and where no reward can judge any prompt."""
    lacking: dict[str, tuple[str, ...]] = {}
    can_judge = not prompts
    for prompt in prompts:
        try:
            parts = recipe.rewards.parts_for(prompt.columns)
        except ValueError as error:
            raise InputError(f"prompt '{prompt.id}': {error}; add the route, or correct the row") from None
        for part in parts:
            gold = BUILTINS[part.name].gold if part.name in BUILTINS else ()
            can_judge |= part.weight != 0.0 and (not gold or any(prompt.columns.get(column) not in (None, "", []) for column in gold))
            lacking |= {part.name: gold} if gold else {}
        if can_judge and recipe.rewards.route is None:
            return
    for name, columns in lacking.items() if not can_judge else ():
        raise InputError(
            f"rewards.parts: {name} judges by {' or '.join(columns)}, and no prompt has either; name the column, as in "
            "prompts.columns.answer=COLUMN"
        )


def judge_of(recipe: TrainRecipe) -> str:
    """The part that says whether a completion is right."""
    return recipe.eval.reward or recipe.rewards.parts[0].key


def check_trackers(recipe: TrainRecipe) -> None:
    for name in recipe.log.trackers:
        if importlib.util.find_spec(name) is None:
            raise InputError(f"log.trackers: {name} is not installed; `pip install {name}`, or take it out of the recipe")


def check_engine(recipe: TrainRecipe) -> None:
    if recipe.rollout.placement == "ray" and importlib.util.find_spec("ray") is None:
        raise InputError("rollout.placement: ray is not installed; `pip install -e '.[ray]'`, or take split")
    server_token(recipe.rollout)
    check_drafts(recipe.rollout, Path(recipe.policy.path or ""))
    if not recipe.rollout.elsewhere:
        check_vllm(recipe.rollout)


def check_drafts(rollout: RolloutConfig, folder: Path) -> None:
    """InputError where a policy without a multi-token prediction module is to draft with it. A hub id is looked at when it is loaded."""
    files = sorted(folder.glob("*.safetensors")) if rollout.draft_tokens else []
    if not files:
        return
    names: set[str] = set()
    try:
        config = json.loads((folder / "config.json").read_text())
        for file in files:
            with safe_open(file, framework="numpy") as opened:
                names.update(opened.keys())
    except (OSError, ValueError, SafetensorError):
        return  # whoever loads it says what is wrong with it
    module = f"model.layers.{config.get('num_hidden_layers')}."
    if config.get("model_type") != "deepseek_v3" or not any(name.startswith(module) for name in names):
        raise InputError(
            f"rollout.draft_tokens: {rollout.draft_tokens}, and '{folder}' has no multi-token prediction module to draft with; "
            "set it to 0, or train one (sft.mtp_weight)"
        )


def check_vllm(rollout: RolloutConfig) -> None:
    """InputError where an engine of this machine is to be vLLM's, and that is not installed."""
    if rollout.engine == "vllm" and importlib.util.find_spec("vllm") is None:
        raise InputError(
            "rollout.engine: vllm is not installed; `make install` (CPU) or `make install EXTRA=gpu` brings it, or set rollout.engine=hf"
        )


def check_gpus(rollout: RolloutConfig, gpus: int, replay: str = "none") -> None:
    """gpus: of the node that the engines are on; 0 is a CPU machine. Engines in the learner's process (hf) need none of their own."""
    if rollout.elsewhere:
        return
    if replay == "rollout" and rollout.engine == "vllm" and gpus == 0:
        raise InputError(
            "loss.replay: vLLM returns the experts it chose on a GPU alone, and this machine has none; take rollout.engine=hf, or none"
        )
    needed = rollout.engines * rollout.tensor_parallel
    if rollout.engine == "vllm" and 0 < gpus < needed:
        raise InputError(
            f"rollout.engines: {rollout.engines} engines with rollout.tensor_parallel {rollout.tensor_parallel} need {needed} GPUs, "
            f"and there {'is' if gpus == 1 else 'are'} {gpus}; lower one of the two"
        )
    if rollout.weights == "nccl" and gpus == 0:
        raise InputError("rollout.weights: nccl carries weights from GPU to GPU, and this machine has none; take file")


def server_token(rollout: RolloutConfig) -> str | None:
    """The token of servers, from the environment; None if they have none. InputError if the variable is not set."""
    if rollout.server_token_env is None:
        return None
    token = os.environ.get(rollout.server_token_env, "")
    if not token:
        raise InputError(f"rollout.server_token_env: no environment variable {rollout.server_token_env}; set it to the servers' token")
    return token
