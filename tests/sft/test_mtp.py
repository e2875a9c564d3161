"""The multi-token prediction module in SFT: packed it learns what it learns row by row, and what is saved is what was trained."""

import json
from pathlib import Path

import pytest
import torch
from made import NoFloat32, distance
from policies import tiny_deepseek_v3, tiny_qwen3_moe
from safetensors.torch import load_file
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3DecoderLayer

from data.recipe import InputError, parse
from rl.mtp import mtp_layer
from rl.policy import checkpoint_views, load_model
from sft.config import SftRecipe
from sft.mtp import mtp_loss
from sft.tokens import IGNORED
from sft.trainer import load_policy, make_trainer, token_rows, train

ROWS = [
    {"prompt": "12;", "completion": "345"},
    {"prompt": "4", "completion": "5"},
    {"prompt": "AAB", "completion": "CDCDCDC8"},
    {"prompt": "777777", "completion": "=1"},
]


def recipe_of(policy: Path, **sft: object) -> SftRecipe:
    settings = {"steps": 1, "batch_size": 8, "max_length": 24, "mtp_weight": 0.3, "threads": 1, **sft}
    return parse(
        {"run": {"name": "mtp"}, "policy": {"path": str(policy)}, "data": {"path": "not read"}, "sft": settings}, SftRecipe, "test"
    )


def alone(model, row):
    """Equations 21 to 24 on one row, written out: the loss, and for each learned token how far draft and trunk overlap."""
    layer, decoder = mtp_layer(model), model.get_decoder()
    ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
    hidden, embedded = decoder(ids).last_hidden_state, decoder.embed_tokens(ids)
    embedded = torch.cat([torch.zeros_like(embedded[:, :1]), embedded[:, 2:]], dim=1)  # that of position 0 is blanked
    x = layer.eh_proj(torch.cat([layer.enorm(embedded), layer.hnorm(hidden[:, :-1])], dim=-1))
    position = torch.arange(x.shape[1])[None]
    mask = torch.full((x.shape[1],) * 2, -torch.inf, dtype=x.dtype).triu(1)[None, None]
    rotary = decoder.rotary_emb(x, position)
    out = DeepseekV3DecoderLayer.forward(layer, x, attention_mask=mask, position_ids=position, position_embeddings=rotary)
    draft = model.lm_head(layer.shared_head["norm"](out))[0, :-1].log_softmax(-1)
    trunk = model.lm_head(hidden)[0, 1:-1].log_softmax(-1)
    learned = labels[2:] != IGNORED
    return -draft[learned, labels[2:][learned]].sum(), torch.minimum(draft, trunk).exp().sum(-1)[learned]


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
def test_loss_gradients_and_acceptance_of_a_batch_are_those_of_its_rows_alone(packing, tmp_path):
    recipe = recipe_of(tiny_deepseek_v3(tmp_path / "policy", seed=3), packing=packing)
    policy = load_policy(recipe)
    trainer = make_trainer(recipe, policy, tokens := token_rows(recipe, policy, ROWS), tmp_path / "run")
    (batch,) = list(trainer.get_train_dataloader())
    model = policy[0].double()
    model.config._experts_implementation = "eager"  # the grouped product takes no float64
    kept = []
    model.get_decoder().register_forward_hook(lambda module, args, output: kept.append(output.last_hidden_state))
    with NoFloat32():
        model(**{name: value for name, value in batch.items() if name != "labels"})
        loss, accepted = mtp_loss(model, kept[0], batch)
        losses, overlaps = zip(*(alone(model, row) for row in tokens.rows), strict=True)
        expected = sum(losses)
        names, parameters = zip(*model.named_parameters(), strict=True)
        ours, theirs = (dict(zip(names, torch.autograd.grad(x, parameters, materialize_grads=True), strict=True)) for x in (loss, expected))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert distance(ours, theirs) < 1e-10
    assert 0.0 < accepted == pytest.approx(torch.cat(overlaps).mean().item(), rel=1e-6)  # a number to look at: in float32


def test_the_trained_module_is_saved_in_the_published_names_and_learns(tmp_path):
    recipe = recipe_of(tiny_deepseek_v3(tmp_path / "policy", seed=3), steps=12, lr=5e-3, min_lr=0.0)
    policy = load_policy(recipe)
    first = mtp_layer(policy[0]).eh_proj.weight.detach().clone()
    train(recipe, policy, token_rows(recipe, policy, ROWS), tmp_path / "run")
    saved = load_file(tmp_path / "run" / "final" / "model.safetensors")
    assert all(torch.equal(tensor, saved[name]) for name, tensor in checkpoint_views(policy[0]))
    assert not torch.equal(first, saved["model.layers.2.eh_proj.weight"])
    again = load_model(tmp_path / "run" / "final", torch.float32)
    assert torch.equal(mtp_layer(again).eh_proj.weight, saved["model.layers.2.eh_proj.weight"])
    first, *_, last = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert last["mtp_loss"] < 0.5 * first["mtp_loss"]
    assert 0.0 < first["mtp_acceptance"] < last["mtp_acceptance"] <= 1.0


def test_a_policy_made_from_a_config_says_what_it_is(tmp_path):
    values = json.loads((tiny_deepseek_v3(tmp_path / "policy", seed=3) / "config.json").read_text())
    init = {
        name: values[name]
        for name in values
        if name not in ("architectures", "vocab_size", "pad_token_id", "eos_token_id", "bos_token_id", "dtype")
    }
    made = recipe_of(tmp_path / "policy").model_dump() | {"policy": {"init": init, "tokenizer": "characters"}}
    recipe = parse(made, SftRecipe, "test")
    policy = load_policy(recipe)
    train(recipe, policy, token_rows(recipe, policy, ROWS), tmp_path / "run")
    said = json.loads((tmp_path / "run" / "final" / "config.json").read_text())
    assert said["architectures"] == ["DeepseekV3ForCausalLM"], "vLLM chooses the model by it"
    assert said["num_nextn_predict_layers"] == 1


def test_without_a_weight_a_module_stays_as_it_is(tmp_path):
    first = recipe_of(tiny_deepseek_v3(tmp_path / "policy", seed=3), steps=1, lr=5e-3, min_lr=0.0)
    policy = load_policy(first)
    train(first, policy, token_rows(first, policy, ROWS), tmp_path / "run")
    second = recipe_of(tmp_path / "run" / "final", steps=2, lr=5e-3, min_lr=0.0, mtp_weight=0.0)
    policy = load_policy(second)
    train(second, policy, token_rows(second, policy, ROWS), tmp_path / "again")
    before, after = (load_file(tmp_path / run / "final" / "model.safetensors") for run in ("run", "again"))
    module = [name for name in before if name.startswith("model.layers.2.") and "embed_tokens" not in name and "head.head" not in name]
    assert before.keys() == after.keys() and len(module) > 20
    assert all(torch.equal(before[name], after[name]) for name in module)
    assert not torch.equal(before["lm_head.weight"], after["lm_head.weight"])


def test_a_policy_of_another_kind_has_no_module(tmp_path):
    with pytest.raises(InputError, match="multi-token prediction is DeepSeek-V3's"):
        load_policy(recipe_of(tiny_qwen3_moe(tmp_path / "policy", seed=3)))
