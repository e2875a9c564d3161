"""Bad inputs to the commands: each is one line that names the thing and the way out, exit code 2, and nothing half-written.

A case is a function that spoils the inputs of a run that would work; its name is the test's. The words in its decorator have to
stand in the line. `early` cases are mistakes in the recipe itself and have to be found where torch cannot be imported.
"""

import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM

import rl.train
import sft.train
from data.recipe import read_recipe
from rl.config import TrainRecipe
from rl.run_folder import RunFolder
from sft.init import init_policy

CHECKOUT = Path(__file__).resolve().parent.parent
TINY = {
    "model_type": "qwen3_moe", "num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2,
    "head_dim": 16, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 32, "intermediate_size": 32,
    "max_position_embeddings": 64,
}  # fmt: skip


@pytest.fixture(scope="module")
def policy(tmp_path_factory) -> Path:
    """A policy that nothing is wrong with; cases that spoil it take a copy."""
    folder = tmp_path_factory.mktemp("policy")
    model, tokenizer = init_policy(TINY, "characters", seed=0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class Inputs:
    """The inputs of a run of one step, in a working folder of its own; a case spoils them."""

    def __init__(self, folder: Path, policy: Path, monkeypatch: pytest.MonkeyPatch):
        self.folder = folder
        self.policy = policy
        self.patch = monkeypatch
        self.module: Any = rl.train
        self.arguments = ["recipe.yaml"]
        self.recipe: dict[str, Any] = {
            "run": {"name": "bad"},
            "policy": {"path": str(policy)},
            "prompts": {"path": "prompts.jsonl"},
            "rollout": {"engine": "hf", "group_size": 2, "max_tokens": 8},
            "rewards": {"parts": [{"name": "math_answer"}]},
            "learner": {"steps": 1, "prompts_per_step": 1, "threads": 1},
            "checkpoint": {"every": 0, "keep": 1},
        }
        self.rows({"prompt": "1+1=", "answer": "2"}, {"prompt": "2+2=", "answer": "4"})
        self.write_recipe()

    @property
    def run_folder(self) -> Path:
        return self.folder / "outputs" / "bad"

    def rows(self, *rows: dict[str, Any] | str) -> None:
        text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
        (self.folder / "prompts.jsonl").write_text(text)

    def write_recipe(self) -> None:
        (self.folder / "recipe.yaml").write_text(yaml.safe_dump(self.recipe))

    def set(self, *overrides: str) -> None:
        self.arguments += overrides

    def own_policy(self) -> Path:
        """A copy of the policy that may be spoilt."""
        copy = self.folder / "policy"
        shutil.copytree(self.policy, copy)
        self.set("policy.path=./policy")
        return copy

    def plugin(self, text: str) -> None:
        (self.folder / "plugin.py").write_text(text)
        self.set("rewards.plugins=[./plugin.py:mine]", "rewards.parts=[{name: mine}]")

    def claimed(self, *overrides: str) -> None:
        """The run's folder as it is in use by this recipe, with these overrides."""
        recipe = read_recipe(self.folder / "recipe.yaml", overrides, TrainRecipe)
        RunFolder(recipe.run.output_dir, recipe.run.name, recipe).claim()

    def sft(self) -> None:
        """The same for `sft.train`."""
        self.module = sft.train
        (self.folder / "rows.jsonl").write_text('{"prompt": "1+1=", "completion": "2"}\n')
        self.recipe = {name: self.recipe[name] for name in ("run", "policy")}
        self.recipe |= {"data": {"path": "rows.jsonl"}, "sft": {"steps": 1, "batch_size": 1, "lr": 0.001}}
        self.write_recipe()

    def main(self) -> int:
        self.patch.setattr(sys, "argv", [self.module.__name__, *self.arguments])
        return self.module.main()

    def left(self) -> dict[str, bytes]:
        """Every file of the output folder, and every folder."""
        outputs = self.folder / "outputs"
        return {str(p.relative_to(outputs)): p.read_bytes() if p.is_file() else b"" for p in outputs.rglob("*")}


@dataclass(frozen=True)
class Case:
    spoil: Callable[[Inputs], Any]
    words: tuple[str, ...]
    early: bool


CASES: list[Case] = []


def bad(*words: str, early: bool = False) -> Callable[[Callable[[Inputs], Any]], Callable[[Inputs], Any]]:
    def note(spoil: Callable[[Inputs], Any]) -> Callable[[Inputs], Any]:
        CASES.append(Case(spoil, words, early))
        return spoil

    return note


# --- the recipe -------------------------------------------------------------------------------------------------------


@bad("recipe.yaml:", "learner.stepz: no such key", "did you mean 'steps'?", early=True)
def a_typo_in_a_key(inputs):
    inputs.recipe["learner"]["stepz"] = 3
    inputs.write_recipe()


@bad("override 'lerner.steps=3'", "lerner: no such key", "did you mean 'learner'?", early=True)
def an_override_of_a_section_that_is_not_there(inputs):
    inputs.set("lerner.steps=3")


@bad("override 'learner.steps'", "section.key=value", early=True)
def an_override_without_a_value(inputs):
    inputs.set("learner.steps")


@bad("override 'rewards.parts[3].weight=1'", "a list of 1", early=True)
def an_override_behind_the_end_of_a_list(inputs):
    inputs.set("rewards.parts[3].weight=1")


@bad("learner.steps", '"sixty"', "valid integer", early=True)
def a_word_for_a_number(inputs):
    inputs.set("learner.steps=sixty")


@bad("recipe.yaml:", "learner.lr: stands twice, first in line", early=True)
def a_key_that_stands_twice(inputs):
    (inputs.folder / "recipe.yaml").write_text("learner:\n  lr: 1e-4\n  steps: 3\n  lr: 1e-5\n")


@bad("recipe.yaml:2: not valid YAML", early=True)
def a_recipe_that_is_no_yaml(inputs):
    (inputs.folder / "recipe.yaml").write_text("run: {name: bad\nlearner: [}\n")


@bad("recipe.yaml: a recipe is a mapping of sections", early=True)
def an_empty_recipe(inputs):
    (inputs.folder / "recipe.yaml").write_text("")


@bad("nothere.yaml: cannot read this recipe: No such file", early=True)
def a_recipe_that_is_not_there(inputs):
    inputs.arguments = ["nothere.yaml"]


@bad("recipe.yaml:1: rewards: missing", "no default", early=True)
def a_section_that_is_missing(inputs):
    del inputs.recipe["rewards"]
    inputs.write_recipe()


@bad("learner.lr", "finite number", early=True)
def a_number_without_end(inputs):
    inputs.set("learner.lr=1e999")


@bad("run.seed", "less than 4294967296", early=True)
def a_seed_that_no_generator_takes(inputs):
    inputs.set("run.seed=4294967296")


@bad("run.name", '"../up"', early=True)
def a_name_that_leaves_the_output_folder(inputs):
    inputs.set("run.name=../up")


@bad("rollout.group_size", "1", "greater than or equal to 2", early=True)
def a_group_of_one(inputs):
    inputs.set("rollout.group_size=1")


@bad("top_p 0.9", "top_p 1", early=True)
def a_truncated_distribution(inputs):
    inputs.set("rollout.top_p=0.9")


@bad("steps_per_batch 4", "prompts_per_step 2", early=True)
def more_optimizer_steps_than_groups(inputs):
    inputs.set("learner.steps_per_batch=4", "learner.prompts_per_step=2")


@bad("loss.kind", '"dpao"', "did you mean 'dapo'?", early=True)
def a_loss_that_is_not_known(inputs):
    inputs.set("loss.kind=dpao")


@bad("loss.replay learner", "steps_per_batch and epochs_per_batch are 1", "take none", early=True)
def a_replay_of_routes_to_updates_that_are_not_there(inputs):
    inputs.set("loss.replay=learner")


@bad("loss.replay", "vLLM returns the experts it chose on a GPU alone", "take rollout.engine=hf, or none")
def a_replay_of_routes_that_the_engine_does_not_return(inputs):
    inputs.patch.setattr(torch.cuda, "is_available", lambda: False)
    inputs.set("loss.replay=rollout", "rollout.engine=vllm")


@bad("learner.router.bias_step", "is for deepseek_v3", "the policy is qwen3_moe", "it has aux_loss")
def a_bias_that_the_routers_do_not_have(inputs):
    inputs.set("learner.router.bias_step=0.001")


@bad("policy.fp8.backend", "'triton' needs a CUDA GPU", "use 'reference'")
def an_fp8_backend_that_cannot_run_here(inputs):
    inputs.set("policy.precision=fp8", "policy.fp8.backend=triton")


@bad("policy: model.layers.0.mlp.experts", "hidden size 32", "multiples of 128", "policy.fp8.keep")
def experts_that_blocks_of_fp8_do_not_fit(inputs):
    inputs.set("policy.precision=fp8")


@bad("weights nccl", "engine is 'hf'", "weights: file", early=True)
def a_weight_transfer_that_the_engine_does_not_have(inputs):
    inputs.set("rollout.weights=nccl")


@bad("rollout.weights", "this machine has none", "take file")
def weights_from_gpu_to_gpu_without_one(inputs):
    inputs.patch.setattr(torch.cuda, "device_count", lambda: 0)
    inputs.set("rollout.weights=nccl", "rollout.engine=vllm")


@bad("learner.optimizer.masters", "fp32 keeps weights in FP32", early=True)
def bf16_masters_of_an_fp32_policy(inputs):
    inputs.set("learner.optimizer.masters=bf16")


@bad("rollout.servers", "'node1:8400' is no address of a server", "http://host:port", early=True)
def a_server_without_a_scheme(inputs):
    inputs.set("rollout.servers=['node1:8400']")


@bad("rollout.server_token_env", "COHORT_NO_TOKEN", "set it to the servers' token")
def a_token_that_is_not_in_the_environment(inputs):
    inputs.set("rollout.servers=['http://127.0.0.1:9']", "rollout.server_token_env=COHORT_NO_TOKEN")


@bad("in_flight true", "set max_staleness to 1", early=True)
def updates_in_flight_that_have_to_be_on_policy(inputs):
    inputs.set("rollout.in_flight=true")


@bad("oversample 0.5", "max_staleness 0", "raise max_staleness to 1", early=True)
def completions_put_off_that_have_to_be_on_policy(inputs):
    inputs.set("rollout.oversample=0.5")


@bad("draft_tokens 2", "engine is hf", "take vllm", early=True)
def drafts_of_transformers(inputs):
    inputs.set("rollout.draft_tokens=2", "rollout.engine=hf")


@bad("draft_tokens 1", "weights nccl", "take weights file", early=True)
def drafts_without_a_weight_file(inputs):
    inputs.set("rollout.draft_tokens=1", "rollout.weights=nccl", "rollout.engine=vllm")


@bad("rollout.draft_tokens: 1", "has no multi-token prediction module", "set it to 0", early=True)
def drafts_of_a_policy_that_has_no_module(inputs):
    inputs.set("rollout.draft_tokens=1", "rollout.engine=vllm")


@bad("placement colocate", "take turns", "max_staleness 1", "placement split", early=True)
def turns_with_staleness(inputs):
    inputs.set("rollout.placement=colocate", "rollout.max_staleness=1")


@bad("weights nccl joins GPUs", "placement colocate", "weights: file", early=True)
def nccl_within_a_gpu(inputs):
    inputs.set("rollout.placement=colocate", "rollout.weights=nccl", "rollout.engine=vllm")


@bad("prompts.task", "no task named 'arithmetics'", "did you mean 'arithmetic'?", early=True)
def a_task_that_is_not_known(inputs):
    inputs.set("prompts={task: arithmetics}")


# --- rewards ----------------------------------------------------------------------------------------------------------


@bad("rewards.parts[0].name: no reward named 'mth'", "did you mean 'math_answer'?", early=True)
def a_reward_that_is_not_known(inputs):
    inputs.set("rewards.parts=[{name: mth}]")


@bad("rewards.normalize", '"z_score"', "'none' or 'group'", early=True)
def a_normalisation_that_is_not_known(inputs):
    inputs.set("rewards.normalize=z_score")


@bad("rewards.parts[0].options", "math_answer has no option 'strict'", early=True)
def an_option_that_a_reward_does_not_have(inputs):
    inputs.set("rewards.parts=[{name: math_answer, options: {strict: true}}]")


@bad("rewards.plugins[0]: no file './plugin.py'", "working folder", early=True)
def a_plugin_file_that_is_not_there(inputs):
    inputs.set("rewards.plugins=[./plugin.py:mine]", "rewards.parts=[{name: mine}]")


@bad("rewards.plugins[0]: ./plugin.py has no function 'mine'", "did you mean 'mime'?", early=True)
def a_function_that_the_plugin_does_not_have(inputs):
    inputs.plugin("def mime(completions, **kwargs):\n    return [0.0 for _ in completions]\n")


@bad("rewards.plugins[0]: plugin.py:1: not valid Python", early=True)
def a_plugin_that_is_no_python(inputs):
    inputs.plugin("def mine(completions, **kwargs) return 1\n")


@bad("rewards: mine: cannot be loaded", "ModuleNotFoundError", "no_such_module", "plugin.py:1")
def a_plugin_that_does_not_import(inputs):
    inputs.plugin("import no_such_module\n\n\ndef mine(completions, **kwargs):\n    return [0.0 for _ in completions]\n")


@bad("rewards.plugins[0]: ./plugin.py:1: mine takes no **kwargs", "**columns", early=True)
def a_reward_function_that_takes_no_columns(inputs):
    inputs.plugin("def mine(completions):\n    return [0.0 for _ in completions]\n")


@bad("rewards.parts: mine", "environment variable COHORT_NO_SUCH_KEY", "is not set")
def a_key_that_is_not_in_the_environment(inputs):
    inputs.plugin("def mine(completions, **kwargs):\n    return [0.0 for _ in completions]\n")
    inputs.set("rewards.parts=[{name: mine, env: [COHORT_NO_SUCH_KEY]}]")


@bad("rollout.conversation: no file './talk.py'", "working folder", early=True)
def a_conversation_that_is_not_there(inputs):
    inputs.set("rollout.conversation=./talk.py:ask")


@bad("rollout.conversation: ./talk.py has no function 'ask'", "did you mean 'task'?", early=True)
def a_conversation_of_another_name(inputs):
    (inputs.folder / "talk.py").write_text("async def task(generate, prompt):\n    return [], []\n")
    inputs.set("rollout.conversation=./talk.py:ask")


@bad("rollout.conversation: ./talk.py cannot be imported: ModuleNotFoundError", "no_such_module")
def a_conversation_that_does_not_import(inputs):
    (inputs.folder / "talk.py").write_text("import no_such_module\n\n\nasync def ask(generate, prompt):\n    return [], []\n")
    inputs.set("rollout.conversation=./talk.py:ask")


@bad("rollout.conversation: ./talk.py:ask is no async function", "async def ask(generate, prompt)")
def a_conversation_that_is_not_async(inputs):
    (inputs.folder / "talk.py").write_text("def ask(generate, prompt):\n    return [], []\n")
    inputs.set("rollout.conversation=./talk.py:ask")


@bad("eval.reward: no part named 'think_format'", "rewards.parts has math_answer")
def an_evaluation_by_a_part_that_is_not_there(inputs):
    inputs.set("eval.reward=think_format")


# --- prompts ----------------------------------------------------------------------------------------------------------


@bad("prompt.jsonl: no such file", "did you mean 'prompts.jsonl'?")
def a_prompt_file_that_is_not_there(inputs):
    inputs.set("prompts.path=prompt.jsonl")


@bad("prompts.jsonl: holds no prompts", "one JSON object a line")
def an_empty_prompt_file(inputs):
    inputs.rows()


@bad("prompts.jsonl:2: not valid JSON", "one JSON object a line", "skip_bad")
def a_line_that_is_no_json(inputs):
    inputs.rows({"prompt": "1+1="}, '{"prompt": "2+2=')


@bad("prompts.jsonl:1: no column 'qestion'", "did you mean 'question'?")
def a_column_that_is_not_there(inputs):
    inputs.rows({"question": "1+1="})
    inputs.set("prompts.columns={prompt: qestion}")


@bad("prompts.jsonl:2: the prompt is empty", "skip_bad")
def a_prompt_that_is_empty(inputs):
    inputs.rows({"prompt": "1+1="}, {"prompt": "  "})


@bad("prompts.jsonl:3: id 'a' stands twice", "first at prompts.jsonl:1")
def an_id_that_stands_twice(inputs):
    inputs.rows({"id": "a", "prompt": "1+1="}, {"id": "b", "prompt": "2+2="}, {"id": "a", "prompt": "3+3="})


@bad("prompts.jsonl:2: the prompt is 100 tokens long", "room for 56", "rollout.max_model_len")
def a_prompt_that_is_longer_than_the_context(inputs):
    inputs.rows({"prompt": "1+1="}, {"prompt": "1" * 100})


@bad("rollout.max_tokens: 64 leaves no room for a prompt", "64 tokens")
def a_completion_that_is_longer_than_the_context(inputs):
    inputs.set("rollout.max_tokens=64")


@bad("rollout.max_model_len: 100", "context of 64 tokens")
def a_context_that_is_longer_than_the_policys(inputs):
    inputs.set("rollout.max_model_len=100")


@bad("prompts.jsonl:2: the prompt holds half a surrogate pair", "skip_bad")
def a_prompt_that_is_cut_in_the_middle_of_a_character(inputs):
    inputs.rows({"prompt": "1+1="}, '{"prompt": "smile: \\ud83d"}')


@bad("other.jsonl: no such file", "working folder")
def a_file_of_held_out_prompts_that_is_not_there(inputs):
    inputs.set("eval.prompts={path: other.jsonl}")


@bad("arithmetic options: digits: 0", "greater than or equal to 1")
def an_option_that_a_task_refuses(inputs):
    inputs.set("prompts={task: arithmetic, options: {digits: 0}}")


# --- the policy -------------------------------------------------------------------------------------------------------


@bad("policy.path: no folder 'outputs/start/final'", "sft.train")
def a_policy_that_is_not_there(inputs):
    inputs.set("policy.path=outputs/start/final")


@bad("policy.path: 'policy' has no weights", "pytorch_model.bin", "only safetensors", "save_pretrained")
def a_policy_with_pickled_weights_alone(inputs):
    (inputs.own_policy() / "model.safetensors").rename(inputs.folder / "policy" / "pytorch_model.bin")


@bad("policy.path: 'policy' has no tokenizer", "tokenizer.save_pretrained")
def a_policy_without_a_tokenizer(inputs):
    for file in inputs.own_policy().glob("tokenizer*"):
        file.unlink()


@bad("policy.path: 'policy' has no config.json", "save_pretrained")
def a_policy_without_a_config(inputs):
    (inputs.own_policy() / "config.json").unlink()


@bad("policy.path: ", "policy", "config.json")
def a_policy_whose_config_is_cut_short(inputs):
    config = inputs.own_policy() / "config.json"
    config.write_text(config.read_text()[:100])


@bad("policy.path: cannot read the tokenizer in 'policy'", "JSON", "tokenizer.save_pretrained")
def a_policy_whose_tokenizer_is_cut_short(inputs):
    tokenizer = inputs.own_policy() / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text()[:100])


@bad("policy.path: the tokenizer of 'policy' has no pad token", "tokenizer.pad_token", "save_pretrained")
def a_tokenizer_without_a_pad_token(inputs):
    path = inputs.own_policy() / "tokenizer_config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "pad_token"}))


@bad("prompts.jsonl:1: the prompt is a chat", "no chat template", "chat_template.jinja")
def a_chat_for_a_tokenizer_without_a_chat_template(inputs):
    (inputs.own_policy() / "chat_template.jinja").unlink()
    inputs.rows({"prompt": [{"role": "user", "content": "1+1="}]})


@bad("policy.path: cannot load 'policy'", "safetensors are damaged", "copy or save them again")
def a_policy_whose_weights_are_cut_short(inputs):
    weights = inputs.own_policy() / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:10_000])


@bad("policy.path: cannot read the tokenizer in 'policy'", "variant", "tokenizer.save_pretrained")
def a_policy_whose_tokenizer_is_of_another_make(inputs):
    path = inputs.own_policy() / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model": {"type": "NoSuchModel"}}))


@bad("policy.path: prompt 'prompts-1' has token", "tokens 0 to 9", "save them together")
def a_tokenizer_of_another_policy(inputs):
    folder = inputs.own_policy()
    config = AutoConfig.from_pretrained(folder)
    config.vocab_size = 10
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


@bad("policy.path: cannot load 'policy'", "model.layers.1.", "missing", "save_pretrained")
def a_policy_with_fewer_layers_than_its_config_says(inputs):
    config = inputs.own_policy() / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_hidden_layers": 2, "layer_types": None}))


@bad("policy.path: cannot load 'policy'", "size")
def a_policy_whose_weights_have_other_shapes_than_its_config_says(inputs):
    config = inputs.own_policy() / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"moe_intermediate_size": 64}))


# --- the machine and the folder ---------------------------------------------------------------------------------------


@bad("log.trackers: wandb is not installed", "pip install wandb")
def a_tracker_that_is_not_installed(inputs):
    inputs.patch.setitem(sys.modules, "wandb", None)  # as it is here, wherever the tests run
    inputs.set("log.trackers=[wandb]")


@bad("rollout.engines: 3 engines with rollout.tensor_parallel 2 need 6 GPUs, and there are 4", "lower one of the two")
def more_engines_than_gpus(inputs):
    inputs.set("rollout.engine=vllm", "rollout.engines=3", "rollout.tensor_parallel=2")
    inputs.patch.setattr("torch.cuda.device_count", lambda: 4)


@bad("rollout.engine: vllm is not installed", "make install", "rollout.engine=hf")
def an_engine_that_is_not_installed(inputs):
    inputs.patch.setitem(sys.modules, "vllm", None)
    inputs.set("rollout.engine=vllm")


@bad("outputs/bad: no space for the checkpoints", "0.00 GB", "run.output_dir", "checkpoint.keep")
def no_space_for_a_checkpoint(inputs):
    usage = namedtuple("usage", "total used free")
    inputs.patch.setattr(shutil, "disk_usage", lambda path: usage(2000, 1000, 1000))


@bad("outputs/bad: in use by another recipe", "learner.lr (0.5 there, 0.0001 here)", "another run.name", early=True)
def a_folder_in_use_by_another_recipe(inputs):
    inputs.claimed("learner.lr=0.5")


@bad("outputs/bad: in use by something that is no run", "another run.name", early=True)
def a_folder_in_use_by_something_that_is_no_run(inputs):
    inputs.run_folder.mkdir(parents=True)
    (inputs.run_folder / "thesis.txt").write_text("all of it")


@bad("outputs/bad: in use, and run.resume is never", "another run.name", early=True)
def a_folder_in_use_where_resuming_is_not_wanted(inputs):
    inputs.claimed()
    inputs.set("run.resume=never")


@bad("outputs/bad: not a folder", "another run.name", early=True)
def a_file_in_the_place_of_the_folder(inputs):
    inputs.run_folder.parent.mkdir()
    inputs.run_folder.write_text("a file")


@bad("outputs/bad/journal.sqlite: in use by process", "another run.name")
def a_folder_that_another_process_writes(inputs):
    inputs.claimed()
    return another_process_locks(inputs.run_folder / "journal.sqlite")


@bad("outputs/bad/journal.sqlite: not readable as a journal", "move it away")
def a_journal_that_is_damaged(inputs):
    inputs.claimed()
    (inputs.run_folder / "journal.sqlite").write_bytes(b"not a database" * 100)


@bad("outputs/bad/recipe.yaml", "not valid YAML", "another run.name", early=True)
def a_folder_whose_recipe_is_damaged(inputs):
    inputs.claimed()
    (inputs.run_folder / "recipe.yaml").write_text("run: {name: [")


@bad("recipe.yaml", "run.output_dir", "is a file", early=True)
def an_output_folder_that_is_a_file(inputs):
    inputs.set("run.output_dir=recipe.yaml")


@bad("run.output_dir", "shut", "cannot be written")
def an_output_folder_that_cannot_be_written(inputs):
    shut = inputs.folder / "shut"
    shut.mkdir()
    shut.chmod(0o500)
    if os.access(shut, os.W_OK):  # nothing is shut to root
        access = os.access
        inputs.patch.setattr(os, "access", lambda path, mode: mode != os.W_OK | os.X_OK and access(path, mode))
    inputs.set("run.output_dir=shut")


# --- sft.train --------------------------------------------------------------------------------------------------------


@bad("recipe.yaml:", "sft.stepz: no such key", "did you mean 'steps'?", early=True)
def a_typo_in_a_key_of_sft(inputs):
    inputs.sft()
    inputs.recipe["sft"]["stepz"] = 3
    inputs.write_recipe()


@bad("rows.jsonl:2: completion is missing", "text or a list of chat messages")
def a_row_of_sft_without_a_completion(inputs):
    inputs.sft()
    (inputs.folder / "rows.jsonl").write_text('{"prompt": "1+1=", "completion": "2"}\n{"prompt": "2+2="}\n')


@bad("row.jsonl: no such file", "did you mean 'rows.jsonl'?")
def a_file_of_rows_that_is_not_there(inputs):
    inputs.sft()
    inputs.set("data.path=row.jsonl")


@bad("policy.path: cannot load 'policy'", "safetensors")
def a_policy_of_sft_whose_weights_are_cut_short(inputs):
    inputs.sft()
    weights = inputs.own_policy() / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:10_000])


@bad("recipe.yaml", "run.output_dir", "is a file", early=True)
def an_output_folder_of_sft_that_is_a_file(inputs):
    inputs.sft()
    inputs.set("run.output_dir=recipe.yaml")


# --- the tests --------------------------------------------------------------------------------------------------------


def another_process_locks(journal: Path) -> subprocess.Popen[str]:
    code = "import sys; from data.journal import Journal; held = Journal(sys.argv[1]); print('open', flush=True); sys.stdin.read()"
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(journal)], cwd=CHECKOUT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None and holder.stdout.readline() == "open\n"
    return holder


@pytest.fixture
def inputs(tmp_path, policy, monkeypatch) -> Iterator[Inputs]:
    monkeypatch.chdir(tmp_path)
    yield Inputs(tmp_path, policy, monkeypatch)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.spoil.__name__)
def test_is_one_line_with_code_2_and_leaves_nothing_half_written(case, inputs, capfd):
    holder = case.spoil(inputs)
    before = inputs.left()
    capfd.readouterr()
    try:
        code = inputs.main()
        after = inputs.left()
    finally:
        if holder is not None:
            holder.communicate()  # its input ends, and with it the process
    errors = capfd.readouterr().err
    assert code == 2, errors
    (line,) = errors.splitlines()
    for word in case.words:
        assert word in line
    written = {name for name in {*before, *after} if before.get(name) != after.get(name)}
    if "bad/exit.json" in written:
        ended = json.loads(after["bad/exit.json"])
        assert (ended["code"], ended["reason"]) == (2, line)
        written -= {"bad", "bad/exit.json"}
    written -= {"bad/journal.sqlite.lock"}  # says nothing once its process is gone
    assert not written


def run_all(cases: list[Case], without: list[str], tmp_path: Path, policy: Path) -> dict[str, tuple[int, list[str]]]:
    """Exit code and lines on stderr of each case, from a fresh process in which these packages cannot be imported."""
    commands = []
    for case in cases:
        folder = tmp_path / case.spoil.__name__
        folder.mkdir()
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            inputs = Inputs(folder, policy, patch)
            case.spoil(inputs)
        commands.append((str(folder), inputs.module.__name__, inputs.arguments))
    code = """
import importlib, json, os, sys
without, commands = json.load(sys.stdin)
sys.modules.update(dict.fromkeys(without))
for folder, module, arguments in commands:
    os.chdir(folder)
    sys.argv = [module, *arguments]
    code = importlib.import_module(module).main()
    print("end of", code, file=sys.stderr, flush=True)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], input=json.dumps((without, commands)), env=os.environ | {"PYTHONPATH": str(CHECKOUT)},
        capture_output=True, text=True,
    )  # fmt: skip
    ends: dict[str, tuple[int, list[str]]] = {}
    lines: list[str] = []
    for line in done.stderr.splitlines():
        if line.startswith("end of "):
            ends[cases[len(ends)].spoil.__name__] = int(line.removeprefix("end of ")), lines
            lines = []
        else:
            lines.append(line)
    assert done.returncode == 0, done.stderr
    return ends


def test_a_mistake_in_the_recipe_is_found_where_torch_cannot_be_imported(tmp_path, policy):
    early = [case for case in CASES if case.early]
    ends = run_all(early, ["torch", "vllm", "transformers", "datasets", "accelerate"], tmp_path, policy)
    for case in early:
        code, (line,) = ends[case.spoil.__name__]
        assert code == 2 and all(word in line for word in case.words)


def test_libraries_add_no_line_of_theirs_to_a_mistake_that_is_found_late(tmp_path, policy):
    late = [case for case in CASES if case.spoil in (
        a_policy_whose_weights_are_cut_short, a_policy_with_fewer_layers_than_its_config_says, a_plugin_that_does_not_import,
        a_policy_whose_weights_have_other_shapes_than_its_config_says, a_prompt_that_is_longer_than_the_context,
        a_tokenizer_without_a_pad_token, a_policy_of_sft_whose_weights_are_cut_short,
    )]  # fmt: skip
    for name, (code, lines) in run_all(late, [], tmp_path, policy).items():
        assert code == 2 and len(lines) == 1, f"{name}: {lines}"


# --- what is found only in the middle of a run ------------------------------------------------------------------------


def test_a_disk_that_fills_up_leaves_the_last_checkpoint_and_one_line(inputs, capfd):
    from rl import policy  # loads torch

    written = []

    def save_file(tensors, path, metadata):
        written.append(path)
        if len(written) == 2:
            Path(path).write_bytes(b"as much as there was room for")
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        return real(tensors, path, metadata)

    real = policy.save_file
    inputs.patch.setattr(policy, "save_file", save_file)
    inputs.set("learner.steps=2", "checkpoint.every=1")
    assert inputs.main() == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert "no space for the checkpoint of step 2" in line and "step-1, is intact" in line
    assert [path.name for path in (inputs.run_folder / "checkpoints").iterdir()] == ["step-1"]
    assert json.loads((inputs.run_folder / "exit.json").read_text())["reason"] == line

    inputs.patch.setattr(policy, "save_file", real)
    assert inputs.main() == 0
    steps = [json.loads(text)["step"] for text in (inputs.run_folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == [0, 1, 2]


def test_a_reward_that_fails_stops_the_run_once_too_much_has_failed_for_certain_and_can_be_mended(inputs, capfd):
    inputs.rows(*({"prompt": f"{n}+1=", "answer": str(n + 1)} for n in range(8)))
    inputs.plugin("def mine(completions, **kwargs):\n    raise RuntimeError('no connection')\n")
    inputs.set("learner.prompts_per_step=8", "rewards.max_error_rate=0.2")
    assert inputs.main() == 1
    errors = capfd.readouterr().err
    # 8 groups of 2 give 16 scores, 3 may fail: the second group that fails decides it, and nobody waits for the other six.
    assert errors.startswith("outputs/bad: step 0: 4 of 16 scores failed already, more than rewards.max_error_rate 0.2 allows; ")
    assert "RuntimeError: no connection (plugin.py:2)" in errors
    # Mended, the same command goes on: failures that the journal holds are no verdicts.
    (inputs.folder / "plugin.py").write_text("def mine(completions, **kwargs):\n    return [1.0 for _ in completions]\n")
    assert inputs.main() == 0


def test_a_broken_tool_stops_the_run_with_a_message_that_names_it_and_can_be_mended(inputs, capfd):
    inputs.rows(*({"prompt": f"{n}+1=", "answer": str(n + 1)} for n in range(8)))
    talk = "async def ask(generate, prompt):\n    turn = await generate()\n    {}\n    return turn.token_ids, [1] * len(turn.token_ids)\n"
    (inputs.folder / "talk.py").write_text(talk.format("raise OSError('no connection')"))
    inputs.set("rollout.conversation=./talk.py:ask", "learner.prompts_per_step=8", "rewards.max_error_rate=0.2")
    assert inputs.main() == 1
    errors = capfd.readouterr().err
    assert errors.startswith("outputs/bad: step 0: 4 of 16 scores failed already, more than rewards.max_error_rate 0.2 allows; ")
    assert "4 of them in rollout.conversation ask: OSError: no connection" in errors and "talk.py:3)" in errors
    (inputs.folder / "talk.py").write_text(talk.format("pass"))
    sys.modules.pop("reward_plugin_talk")  # as in a process of its own
    assert inputs.main() == 0


def test_prompts_that_no_reward_can_judge_stop_the_run_with_that_reason(inputs, capfd):
    inputs.rows({"prompt": "1+1=", "answer": " "}, {"prompt": "2+2=", "answer": " "})
    assert inputs.main() == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert "none of 1 groups got two scores" in line and "could be judged by math_answer" in line
