"""Real text: GSM8K, its columns mapped, a chat template, byte tokens, and a tiny policy of random weights.

Nothing it writes is right, so nothing can be learned from right and wrong: the run has to say so, end well, leave every weight as
it was and account for every token. A reward that tells bad from worse (the share of digits) does rise, by the same road.
"""

import json
import subprocess
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from data.journal import Journal
from sft.init import init_policy

CHECKOUT = Path(__file__).resolve().parent.parent
ARCHITECTURE = {
    "model_type": "qwen3_moe", "num_hidden_layers": 2, "hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 32, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "intermediate_size": 128,
    "norm_topk_prob": True, "max_position_embeddings": 1024,
}  # fmt: skip
DIGITS = """
def digits(completions, **kwargs):
    texts = [completion[0]["content"] for completion in completions]
    return [sum(c in "0123456789" for c in text) / max(1, len(text)) for text in texts]
"""


@pytest.fixture(scope="module")
def policy(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("policy")
    for part in init_policy(ARCHITECTURE, "bytes", seed=3):
        part.save_pretrained(folder)
    return folder


def recipe(work: Path, policy: Path, test_data: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    values: dict[str, dict[str, Any]] = {
        "run": {"name": "gsm8k", "output_dir": str(work)},
        "policy": {"path": str(policy)},
        "prompts": {
            "path": str(test_data / "gsm8k" / "train.jsonl"),
            "columns": {"prompt": "question"},
            "system": "Put the answer after ####.",
            "limit": 200,
        },
        "rollout": {"group_size": 4, "max_tokens": 24},
        "rewards": {"parts": [{"name": "math_answer"}]},
        "learner": {"steps": 5, "prompts_per_step": 4, "lr": 1e-3, "warmup_steps": 0, "threads": 1},
        "checkpoint": {"every": 0, "keep": 1},
    }
    return {name: value | sections.get(name, {}) for name, value in values.items()}


def train(work: Path, values: dict[str, Any]) -> tuple[str, list[dict[str, Any]]]:
    """Runs the command; what it printed, and the rows of its steps."""
    (work / "recipe.yaml").write_text(yaml.safe_dump(values))
    command = [sys.executable, "-m", "rl.train", str(work / "recipe.yaml")]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in (work / "gsm8k" / "metrics.jsonl").read_text().splitlines()]
    return done.stdout, rows[1:]


@pytest.mark.slow
def test_where_nothing_is_right_nothing_is_learned_and_the_run_says_so(tmp_path, policy, test_data):
    printed, rows = train(tmp_path, recipe(tmp_path, policy, test_data))
    said = [line for line in printed.splitlines() if "nothing was learned" in line]
    assert said == ["nothing was learned: none of 20 groups had rewards that differ, so every advantage is 0"]
    assert [row["reward"] for row in rows] == [0.0] * 5
    assert [row["groups/zero_advantage"] for row in rows] == [4] * 5
    assert [row["grad_norm"] for row in rows] == [0.0] * 5
    assert json.loads((tmp_path / "gsm8k" / "exit.json").read_text())["code"] == 0

    with Journal(tmp_path / "gsm8k" / "journal.sqlite", read_only=True) as journal:
        sums = journal.sums()
    assert sums.trained == sums.open == 0
    assert sums.wasted == {"zero_advantage": sums.sampled}
    assert sums.groups == {"zero_advantage": 20, "open": 0}
    assert sums.sampled == sum(row["tokens/sampled"] for row in rows) == sum(row["tokens/wasted"] for row in rows)
    assert sums.sampled > 20 * 4

    before, after = load_file(policy / "model.safetensors"), load_file(tmp_path / "gsm8k" / "final" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(before[name].numpy().tobytes() == after[name].numpy().tobytes() for name in before)


@pytest.mark.slow
def test_a_reward_that_tells_bad_from_worse_rises(tmp_path, tmp_path_factory, policy, test_data):
    plugin = tmp_path_factory.mktemp("outside") / "dense.py"
    plugin.write_text(DIGITS)
    values = recipe(
        tmp_path, policy, test_data,
        rollout={"engine": "hf", "group_size": 8},
        rewards={"plugins": [f"{plugin}:digits"], "parts": [{"name": "digits"}]},
        learner={"steps": 12, "lr": 5e-3},
    )  # fmt: skip
    printed, rows = train(tmp_path, values)
    rewards = [row["reward"] for row in rows]
    assert rewards[0] < 0.1, "random bytes are digits in 1 of 26"
    assert fmean(rewards[-3:]) > 0.3, rewards  # 0.6 where this was written
    assert "nothing was learned" not in printed

    with Journal(tmp_path / "gsm8k" / "journal.sqlite", read_only=True) as journal:
        sums = journal.sums()
    assert sums.open == 0
    assert sums.trained == sum(row["tokens/trained"] for row in rows)
    assert sum(sums.wasted.values()) == sum(row["tokens/wasted"] for row in rows)
    assert sums.sampled == sums.trained + sum(sums.wasted.values()) == sum(row["tokens/sampled"] for row in rows)
