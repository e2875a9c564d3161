"""Reward functions written for trl, in files outside the repository and unchanged, score a run; what they log is in its metrics.

The three files are as trl's documentation has them: completions and `**kwargs` alone; everything that trl hands over, a column of
the data set among it; and an async function that waits.
"""

import json
import sys
from pathlib import Path
from statistics import fmean

import pyarrow.parquet as pq
import pytest
import yaml

import rl.train
from sft.init import init_policy

CHECKOUT = Path(__file__).resolve().parent.parent

PLAIN = """
def share_of_digits(completions, **kwargs):
    return [sum(c.isdigit() for c in completion) / max(1, len(completion)) for completion in completions]
"""

EVERYTHING = '''
def near_the_answer(prompts, completions, completion_ids, answer, trainer_state, log_metric=None, log_extra=None, **kwargs):
    """How many characters of the answer occur, one more for each step the trainer has made."""
    assert len(prompts) == len(completions) == len(completion_ids) == len(answer)
    assert all(prompt.endswith("=") for prompt in prompts) and len(set(prompts)) == 1
    a, b = prompts[0].rstrip("=").split("+")
    assert int(a) + int(b) == int(answer[0]), "the column belongs to the prompt"
    rewards = [float(sum(c in completion for c in gold)) for completion, gold in zip(completions, answer)]
    if log_extra:
        log_extra("gold", list(answer))
    if log_metric:
        log_metric("tokens_seen", sum(len(ids) for ids in completion_ids) / len(completion_ids))
        log_metric("trainer_step", trainer_state.global_step)
    return [reward + trainer_state.global_step for reward in rewards]
'''

ASYNC = """
import asyncio


async def length_limit(prompts, completions, completion_ids, **kwargs):
    async def one(completion, ids):
        await asyncio.sleep(0.001)
        return None if not completion else float(len(ids) < 6)

    return await asyncio.gather(*(one(c, i) for c, i in zip(completions, completion_ids)))
"""

FUNCTIONS = {"plain.py:share_of_digits": 1.0, "everything.py:near_the_answer": 0.5, "waits.py:length_limit": 0.1}
"""Where each is, and its weight."""


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    """Two steps on sums, judged by the three files."""
    work = tmp_path_factory.mktemp("work")
    outside = tmp_path_factory.mktemp("outside")
    assert CHECKOUT not in outside.parents
    for name, text in (("plain", PLAIN), ("everything", EVERYTHING), ("waits", ASYNC)):
        (outside / f"{name}.py").write_text(text)
    model, tokenizer = init_policy(
        {
            "model_type": "qwen3_moe", "num_hidden_layers": 1, "hidden_size": 64, "num_attention_heads": 2,
            "num_key_value_heads": 2, "head_dim": 32, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
            "intermediate_size": 64, "max_position_embeddings": 64,
        }, "characters", seed=0,
    )  # fmt: skip
    for part in (model, tokenizer):
        part.save_pretrained(work / "policy")
    recipe = {
        "run": {"name": "trl", "output_dir": str(work)},
        "policy": {"path": str(work / "policy")},
        "prompts": {"task": "arithmetic"},
        "rollout": {"engine": "hf", "group_size": 4, "max_tokens": 8},
        "rewards": {
            "plugins": [f"{outside}/{function}" for function in FUNCTIONS],
            "parts": [{"name": name.partition(":")[2], "weight": weight} for name, weight in FUNCTIONS.items()],
            "max_error_rate": 0.0,
        },
        "learner": {"steps": 2, "prompts_per_step": 2, "lr": 1e-3, "warmup_steps": 0, "threads": 1},
    }  # fmt: skip
    (work / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(work)
        patch.setattr(sys, "argv", ["rl.train", "recipe.yaml"])
        assert rl.train.main() == 0
    return work / "trl"


@pytest.fixture(scope="module")
def rows(run_folder) -> list[dict[str, float]]:
    """The steps of metrics.jsonl."""
    return [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()][1:]


@pytest.fixture(scope="module")
def completions(run_folder) -> list[list[dict]]:
    """The rows of each step's completions."""
    return [pq.read_table(run_folder / "completions" / f"step-{step}.parquet").to_pylist() for step in (1, 2)]


def test_their_means_are_those_of_the_completions(rows, completions):
    for row, step in zip(rows, completions, strict=True):
        shares = [sum(c.isdigit() for c in r["completion"]) / max(1, len(r["completion"])) for r in step]
        assert row["rewards/share_of_digits/mean"] == pytest.approx(fmean(shares))
        short = [float(r["tokens"] < 6) for r in step if r["completion"]]
        assert row["rewards/length_limit/mean"] == pytest.approx(fmean(short))
    assert len(rows) == 2 and all(len(step) == 8 for step in completions)


def test_a_function_sees_columns_ids_and_the_step_of_the_trainer(rows, completions):
    for number, (row, step) in enumerate(zip(rows, completions, strict=True)):
        golds = [str(sum(map(int, r["prompt"].rstrip("=").split("+")))) for r in step]
        rewards = [sum(c in r["completion"] for c in gold) + number for r, gold in zip(step, golds, strict=True)]
        assert row["rewards/near_the_answer/mean"] == pytest.approx(fmean(rewards))


def test_what_a_function_logs_stands_in_the_row_of_its_step(rows, completions):
    for number, (row, step) in enumerate(zip(rows, completions, strict=True)):
        assert row["tokens_seen"] == pytest.approx(fmean(r["tokens"] for r in step)) == row["completions/mean_length"]
        assert row["trainer_step"] == number
        assert row["time/reward/share_of_digits_s"] >= 0


def test_the_reward_is_their_weighted_sum(completions):
    weights = {name.partition(":")[2]: weight for name, weight in FUNCTIONS.items()}
    for r in (r for step in completions for r in step):
        parts = json.loads(r["parts"])
        assert r["reward"] == pytest.approx(sum(weights[name] * value for name, value in parts.items() if value is not None))
