"""Packed rows do not see each other: each has the loss and the gradient that it has alone, whatever the architecture."""

import pytest
import torch
from policies import tiny_deepseek_v3, tiny_qwen3, tiny_qwen3_moe

from data.recipe import parse
from sft.config import SftRecipe
from sft.tokens import IGNORED
from sft.trainer import load_policy, make_trainer, token_rows

ROWS = [
    {"prompt": "12;", "completion": "345"},
    {"prompt": "4", "completion": "5"},
    {"prompt": "AAB", "completion": "CDCDCDC8"},
    {"prompt": "777777", "completion": "=1"},
    {"prompt": "9", "completion": "0A0A"},
]
KINDS = [tiny_qwen3_moe, tiny_deepseek_v3, tiny_qwen3]


def trainer_of(policy, tmp_path, packing, rows=ROWS):
    recipe = parse(
        {
            "run": {"name": "packing"},
            "policy": {"path": str(policy)},
            "data": {"path": "not read"},
            "sft": {"steps": 1, "batch_size": 8, "max_length": 24, "packing": packing},
        },
        SftRecipe,
        "test",
    )
    loaded = load_policy(recipe)
    tokens = token_rows(recipe, loaded, rows)
    return make_trainer(recipe, loaded, tokens, tmp_path / f"packing-{packing}"), tokens


def loss_and_gradients(trainer, batch):
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, dict(batch))
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}


def alone(trainer, row):
    """The summed loss of a row by itself, without trl, padding or masks; and how many tokens it is over."""
    ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
    logp = trainer.model(input_ids=ids).logits[0, :-1].log_softmax(-1)
    learned = labels[1:] != IGNORED
    return -logp[learned, labels[1:][learned]].sum(), int(learned.sum())


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_has_the_same_loss_packed_and_alone(kind, tmp_path):
    trainer, tokens = trainer_of(kind(tmp_path / "policy", seed=3), tmp_path, packing=True)
    (batch,) = list(trainer.get_train_dataloader())
    assert batch["input_ids"].shape == (1, sum(len(row["input_ids"]) for row in tokens.rows)), "the five rows fill two sequences"
    begins = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
    ends = [*begins[1:], batch["input_ids"].shape[1]]
    assert len(begins) == len(ROWS)
    seen = []
    for begin, end in zip(begins, ends, strict=True):
        only = dict(batch, labels=torch.full_like(batch["labels"], IGNORED))
        only["labels"][0, begin:end] = batch["labels"][0, begin:end]
        with torch.no_grad():
            packed = trainer.compute_loss(trainer.model, only).item()
        ids = batch["input_ids"][0, begin:end].tolist()
        row = next(row for row in tokens.rows if row["input_ids"] == ids)
        total, count = alone(trainer, row)
        assert packed == pytest.approx(total.item() / count, abs=2e-6)
        seen.append(ids)
    assert sorted(seen) == sorted(row["input_ids"] for row in tokens.rows)


@pytest.mark.parametrize("kind", KINDS)
def test_packing_changes_no_gradient(kind, tmp_path):
    policy = kind(tmp_path / "policy", seed=4)
    packed_trainer, _ = trainer_of(policy, tmp_path, packing=True)
    plain_trainer, _ = trainer_of(policy, tmp_path, packing=False)
    packed_loss, packed = loss_and_gradients(packed_trainer, next(iter(packed_trainer.get_train_dataloader())))
    plain_loss, plain = loss_and_gradients(plain_trainer, next(iter(plain_trainer.get_train_dataloader())))
    assert packed_loss == pytest.approx(plain_loss, abs=2e-6)
    assert packed.keys() == plain.keys()
    for name, gradient in plain.items():
        scale = gradient.abs().max().clamp(min=1e-4)
        assert ((packed[name] - gradient).abs().max() / scale).item() < 1e-4, name


def test_without_their_positions_packed_rows_would_see_each_other(tmp_path):
    trainer, _ = trainer_of(tiny_qwen3_moe(tmp_path / "policy", seed=3), tmp_path, packing=True)
    (batch,) = list(trainer.get_train_dataloader())
    one_row = dict(batch, position_ids=torch.arange(batch["input_ids"].shape[1])[None])
    with torch.no_grad():
        isolated, mixed = (trainer.compute_loss(trainer.model, dict(b)).item() for b in (batch, one_row))
    assert abs(isolated - mixed) > 0.01
