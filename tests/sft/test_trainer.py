"""Training with trl: what is saved and loaded is what was trained, and the loss is the one that was meant."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from data.arithmetic import demonstrations
from data.recipe import InputError, parse
from sft.config import SftRecipe
from sft.trainer import load_policy, token_rows, train

INIT = {
    "model_type": "qwen3_moe",
    "num_hidden_layers": 2,
    "hidden_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}
ROWS = demonstrations({"carry_error": 0.3}, 64, seed=0)


def recipe(precision="fp32", **sft) -> SftRecipe:
    return parse(
        {
            "run": {"name": "tiny", "seed": 7},
            "policy": {"init": INIT, "tokenizer": "characters", "precision": precision},
            "data": {"task": "arithmetic"},
            "sft": {"steps": 4, "batch_size": 16, "lr": 1e-2, **sft},
        },
        SftRecipe,
        "test",
    )


def run(folder, rows=ROWS, **sft):
    """Trains a tiny policy; returns it as it is in memory, with the rows of metrics.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    made = recipe(**sft)
    model, tokenizer = load_policy(made)
    train(made, (model, tokenizer), token_rows(made, (model, tokenizer), rows), folder)
    return model.eval(), [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def nll(rows) -> float:
    """Mean over completion tokens, <eos> included, under the untrained policy: each row alone, without padding."""
    model, tokenizer = load_policy(recipe())
    losses = []
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        ids = torch.tensor([prompt + tokenizer(row["completion"] + "<eos>")["input_ids"]])
        with torch.no_grad():
            logp = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        losses.append(-logp.gather(1, ids[0, 1:, None])[len(prompt) - 1 :, 0])
    return torch.cat(losses).mean().item()


def test_what_is_saved_and_loaded_is_what_was_trained_experts_included(tmp_path):
    trained, _ = run(tmp_path)
    begun, _ = load_policy(recipe())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "final").eval()

    assert loaded.state_dict().keys() == trained.state_dict().keys()
    for name, tensor in trained.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    experts = [name for name in trained.state_dict() if ".experts." in name]
    assert len(experts) == 4  # two layers of gate_up_proj and down_proj, all experts in one tensor
    for name in experts:
        moved = (trained.state_dict()[name] - begun.state_dict()[name]).abs().amax(dim=(1, 2))
        assert (moved > 1e-3).all(), f"{name}: an expert was not trained: {moved}"

    ids = AutoTokenizer.from_pretrained(tmp_path / "final")("47+85=<think>7+5=12;", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, trained(input_ids=ids).logits)


def test_the_folder_holds_each_expert_by_name_and_no_pickle(tmp_path):
    trained, _ = run(tmp_path)
    weights = load_file(tmp_path / "final" / "model.safetensors")
    fused = trained.state_dict()["model.layers.1.mlp.experts.down_proj"]
    for expert in range(4):
        assert torch.equal(weights[f"model.layers.1.mlp.experts.{expert}.down_proj.weight"], fused[expert])
    assert {path.suffix for path in (tmp_path / "final").iterdir()} == {".json", ".jinja", ".safetensors"}


def test_the_loss_is_the_mean_over_completion_tokens_alone(tmp_path):
    _, metrics = run(tmp_path, rows=ROWS[:16], steps=1)
    assert metrics[0]["loss"] == pytest.approx(nll(ROWS[:16]), abs=1e-5)


def test_the_auxiliary_loss_is_there_only_if_the_recipe_says_so(tmp_path):
    _, without = run(tmp_path / "without", rows=ROWS[:16], steps=1)
    _, with_it = run(tmp_path / "with", rows=ROWS[:16], steps=1, router_aux_loss_coef=0.5)
    assert "aux_loss" not in without[0]
    assert with_it[0]["loss"] - without[0]["loss"] == pytest.approx(0.5 * with_it[0]["aux_loss"], abs=1e-4)
    # How it was trained is not what it is: the config is as transformers made it.
    saved = json.loads((tmp_path / "with" / "final" / "config.json").read_text())
    assert (saved["router_aux_loss_coef"], saved["output_router_logits"]) == (0.001, False)


def test_two_runs_of_a_recipe_give_the_same_bits(tmp_path):
    one, first = run(tmp_path / "one")
    two, second = run(tmp_path / "two")
    assert all(torch.equal(one.state_dict()[name], two.state_dict()[name]) for name in one.state_dict())
    assert [row["loss"] for row in first] == [row["loss"] for row in second]


def test_the_learning_rate_rises_and_then_falls_towards_nothing(tmp_path):
    _, metrics = run(tmp_path, steps=8, warmup_steps=2)
    rates = [row["learning_rate"] for row in metrics]
    assert rates[:3] == pytest.approx([0.0, 5e-3, 1e-2])
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert rates[-1] < 1e-3


def test_chats_are_trained_through_the_chat_template(tmp_path):
    rows = [
        {"prompt": [{"role": "user", "content": "2+2?"}], "completion": [{"role": "assistant", "content": "4"}]},
        {"prompt": [{"role": "user", "content": "2+3?"}], "completion": [{"role": "assistant", "content": "5"}]},
    ]
    _, metrics = run(tmp_path, rows=rows, steps=1, batch_size=2)
    as_text = [
        {"prompt": f"user: 2+{n}?\nassistant: ", "completion": str(2 + n)} for n in (2, 3)
    ]  # fmt: skip
    assert metrics[0]["loss"] == pytest.approx(nll(as_text), abs=1e-5)


def test_bf16_computes_in_bf16_and_keeps_fp32_weights(tmp_path):
    model, metrics = run(tmp_path, rows=ROWS[:16], steps=1, precision="bf16")
    assert metrics[0]["loss"] == pytest.approx(nll(ROWS[:16]), rel=1e-2)
    assert metrics[0]["loss"] != pytest.approx(nll(ROWS[:16]), abs=1e-6)
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}


def test_a_dense_policy_has_no_experts_to_balance():
    dense = recipe(router_aux_loss_coef=0.01).model_dump(mode="json")
    dense["policy"]["init"] = {"model_type": "qwen3", "num_hidden_layers": 1, "hidden_size": 128}
    with pytest.raises(InputError, match="Qwen3ForCausalLM has no experts to balance; leave it out"):
        load_policy(parse(dense, SftRecipe, "test"))
