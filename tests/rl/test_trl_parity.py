"""Gradients against trl's own `GRPOTrainer._compute_loss`, on the same completions, with clipping active.

trl pads, forwards every prompt G times and keeps old log-probs beside the batch; ours packs and shares. What is compared is the
gradient of a whole step, in float64 (experts one by one on both sides) and in float32. trl's output head computes in float32 whatever
the model is in, so in float64 its place is taken by the same formula in float64; the loss around it is trl's in both cases. trl counts
positions from the padding's begin and rotary angles are float32, so in float64 all prompts have the same length.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import made
import numpy as np
import policies
import pytest
import torch
from datasets import Dataset
from made import MAX_TOKENS, TEMPERATURE, NoFloat32, distance, gradients, make_groups, make_learner, near, padded_logp, reference_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from data.values import Group
from rl.advantage import advantage, group_advantage, rewards_of
from rl.config import AdvantageConfig, LossConfig

REWARDS = [[1, 0, 0, 1], [0, 1, 0, 0], [1, 1, 0.5, 0], [0.2, 0.9, 0.4, 0.0]]
DDOF1 = AdvantageConfig(ddof=1)


@pytest.fixture(autouse=True)
def no_float32() -> Iterator[None]:
    with NoFloat32():
        yield


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return policies.tiny_qwen3_moe(tmp_path_factory.mktemp("policy") / "moe", seed=0)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return policies.tiny_qwen3_moe(tmp_path_factory.mktemp("policy") / "other", seed=1)


def trl_trainer(policy: Path, folder: Path, dtype: torch.dtype, **settings: Any) -> GRPOTrainer:
    model = AutoModelForCausalLM.from_pretrained(
        policy, dtype=dtype, attn_implementation="sdpa", experts_implementation="eager", router_aux_loss_coef=0.0
    )
    arguments = GRPOConfig(
        output_dir=str(folder), per_device_train_batch_size=16, gradient_accumulation_steps=1, num_generations=4,
        max_completion_length=MAX_TOKENS, temperature=TEMPERATURE, use_cpu=True, bf16=False, gradient_checkpointing=False,
        report_to=[], use_bias_correction_kl=False, router_aux_loss_coef=0.0, **settings,
    )  # fmt: skip
    return GRPOTrainer(
        model=model, args=arguments, reward_funcs=lambda completions, **_: [0.0] * len(completions),
        processing_class=AutoTokenizer.from_pretrained(policy), train_dataset=Dataset.from_list([{"prompt": "0"}]),
    )  # fmt: skip


def padded_inputs(groups: list[Group], advantages_PG: torch.Tensor, mask_truncated: bool, ref: Path | None) -> dict[str, torch.Tensor]:
    """The batch as trl's own collation makes it: prompts padded on the left, completions on the right."""
    rows = [(g.prompt, c) for g in groups for c in g.completions]
    wide_p, wide_c = max(len(p.token_ids) for p, _ in rows), max(len(c.token_ids) for _, c in rows)
    ids = {"prompt": np.zeros((len(rows), wide_p), np.int64), "completion": np.zeros((len(rows), wide_c), np.int64)}
    masks = {name: np.zeros_like(x) for name, x in ids.items()}
    old = np.zeros((len(rows), wide_c))
    ref_logp = np.zeros((len(rows), wide_c))
    model = reference_model(ref) if ref else None
    for i, (prompt, c) in enumerate(rows):
        ids["prompt"][i, wide_p - len(prompt.token_ids) :] = prompt.token_ids
        masks["prompt"][i, wide_p - len(prompt.token_ids) :] = 1
        ids["completion"][i, : len(c.token_ids)] = c.token_ids
        masks["completion"][i, : len(c.token_ids)] = not (mask_truncated and c.finish_reason == "length")
        old[i, : len(c.token_ids)] = c.engine_logp
        if model is not None:
            ref_logp[i, : len(c.token_ids)] = padded_logp(model, prompt, c).detach().numpy()
    out = {f"{name}_ids": torch.from_numpy(x) for name, x in ids.items()}
    out |= {f"{name}_mask": torch.from_numpy(x) for name, x in masks.items()}
    out["advantages"] = advantages_PG.flatten()
    out["old_per_token_logps"] = torch.from_numpy(old)
    out["num_items_in_batch"] = out["completion_mask"].sum()
    if ref is not None:
        out["ref_per_token_logps"] = torch.from_numpy(ref_logp)
    return out


def float64_head(model: Any, ids: torch.Tensor, mask: torch.Tensor, keep: int, **_: Any) -> tuple[torch.Tensor, torch.Tensor, None]:
    """What `GRPOTrainer._get_per_token_logps_and_entropies` returns: log-probs and entropies of the last `keep` tokens."""
    logits = model(input_ids=ids, attention_mask=mask).logits[:, -keep - 1 : -1] / TEMPERATURE
    logp = logits.log_softmax(-1)
    return logp.gather(-1, ids[:, -keep:, None]).squeeze(-1), -(logp.exp() * logp).sum(-1), None


def trl_loss(trainer: GRPOTrainer, inputs: dict[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    if dtype is torch.float64:
        trainer._get_per_token_logps_and_entropies = float64_head
    loss: torch.Tensor = trainer._compute_loss(trainer.model, inputs)
    return loss


def trl_gradients(trainer: GRPOTrainer, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    loss.backward()
    return {n: p.grad if p.grad is not None else torch.zeros_like(p) for n, p in trainer.model.named_parameters()}


CASES = {
    "grpo": ({"loss_type": "grpo"}, LossConfig(kind="grpo", ratio_base="engine")),
    "dapo": ({"loss_type": "dapo"}, LossConfig(kind="dapo", ratio_base="engine")),
    "dr_grpo": ({"loss_type": "dr_grpo"}, LossConfig(kind="dr_grpo", ratio_base="engine")),
    "gspo": ({"loss_type": "grpo", "importance_sampling_level": "sequence"}, LossConfig(kind="gspo", ratio_base="engine")),
    "cispo": ({"loss_type": "cispo"}, LossConfig(kind="cispo", ratio_base="engine")),
    "grpo with KL": ({"loss_type": "grpo", "beta": 0.1}, LossConfig(kind="grpo", ratio_base="engine", kl_coef=0.1)),
    "dapo with KL": ({"loss_type": "dapo", "beta": 0.1}, LossConfig(kind="dapo", ratio_base="engine", kl_coef=0.1)),
    "grpo masked": ({"loss_type": "grpo"}, LossConfig(kind="grpo", ratio_base="engine", mask_truncated=True)),
    "dapo masked": ({"loss_type": "dapo"}, LossConfig(kind="dapo", ratio_base="engine", mask_truncated=True)),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("case", CASES)
def test_gradients_equal_trl(policy: Path, other: Path, tmp_path: Path, case: str, dtype: torch.dtype) -> None:
    settings, loss = CASES[case]
    groups = near(make_groups(REWARDS, truncate=True, prompt_tokens=6 if dtype is torch.float64 else None), policy)
    ref = other if loss.kl_coef else None
    # trl's upper bound of cispo is the ratio itself; ours is 1 + clip_high for every loss.
    epsilon_high = 1 + loss.clip_high if loss.kind == "cispo" else loss.clip_high
    trainer = trl_trainer(policy, tmp_path, dtype, epsilon=loss.clip_low, epsilon_high=epsilon_high, **settings)
    inputs = padded_inputs(groups, group_advantage(groups, DDOF1), loss.mask_truncated, ref)
    theirs = trl_gradients(trainer, trl_loss(trainer, inputs, dtype))
    ours = gradients(make_learner(policy, loss, dtype=dtype, reference=ref), groups, DDOF1)
    assert distance(ours, theirs) < (1e-10 if dtype is torch.float64 else 5e-6)


def test_in_bf16_gradients_are_no_further_from_float32_than_those_of_trl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint in bf16, which trl trains as it is, or in fp32 under autocast (its own choice). All experts take every token: where a
    few are chosen, rounding now and then chooses others, and distances jump by chance."""
    monkeypatch.setattr(made, "MAX_TOKENS", 40)
    squares = {"ours": 0.0, "trl": 0.0, "trl, autocast": 0.0}
    for seed in range(3):
        policy = policies.tiny_qwen3_moe(tmp_path / f"policy-{seed}", seed=seed, dtype=torch.bfloat16)
        config = json.loads((policy / "config.json").read_text())
        (policy / "config.json").write_text(json.dumps(config | {"num_experts_per_tok": 8}))
        groups = make_groups(REWARDS, seed=seed)
        inputs = padded_inputs(groups, group_advantage(groups, DDOF1), False, None)
        del inputs["old_per_token_logps"]  # on-policy: where a ratio is clipped is no matter of rounding

        def theirs(
            dtype: torch.dtype, autocast: bool = False, policy: Path = policy, inputs: dict[str, torch.Tensor] = inputs
        ) -> dict[str, torch.Tensor]:
            trainer = trl_trainer(policy, tmp_path / "trl", dtype, loss_type="dapo")
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):  # accelerate's `mixed_precision: bf16`
                loss = trl_loss(trainer, inputs, torch.float32)
            return trl_gradients(trainer, loss)

        def ours(dtype: torch.dtype, policy: Path = policy, groups: list[Group] = groups) -> dict[str, torch.Tensor]:
            return gradients(make_learner(policy, LossConfig(kind="dapo", correction="none"), dtype=dtype), groups, DDOF1)

        exact = theirs(torch.float32)
        assert distance(ours(torch.float32), exact) < 5e-6
        squares["ours"] += distance(ours(torch.bfloat16), exact) ** 2
        squares["trl"] += distance(theirs(torch.bfloat16), exact) ** 2
        squares["trl, autocast"] += distance(theirs(torch.float32, autocast=True), exact) ** 2
    rms = {side: (square / 3) ** 0.5 for side, square in squares.items()}
    assert 0.005 < rms["trl, autocast"] < 0.95 * rms["trl"] < 0.05
    assert rms["ours"] < 1.02 * rms["trl, autocast"], rms


def test_advantages_equal_trl(policy: Path) -> None:
    """trl: rewards minus the group's mean, over the standard deviation (ddof 1) plus 1e-4."""
    rewards_PG = rewards_of(make_groups(REWARDS))
    mean, std = rewards_PG.mean(1, keepdim=True), rewards_PG.std(1, keepdim=True)
    assert torch.allclose(advantage(rewards_PG, DDOF1), (rewards_PG - mean) / (std + 1e-4), atol=1e-12)
    batch = AdvantageConfig(scale="batch", ddof=1)
    assert torch.allclose(advantage(rewards_PG, batch), (rewards_PG - mean) / (rewards_PG.std() + 1e-4), atol=1e-12)
