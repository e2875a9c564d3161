"""A run that was stopped ends with the bits of one that was not, experts and adapters included."""

import json
import os
import signal

import pytest
import torch
from policies import tiny_deepseek_v3, tiny_qwen3_moe
from safetensors.torch import load_file
from transformers import TrainerCallback

from data.recipe import InputError, parse
from rl.run import Interrupted
from sft.config import SftRecipe
from sft.trainer import load_policy, make_trainer, token_rows, train

ROWS = [{"prompt": f"{n}", "completion": f"{n * n % 90}"} for n in range(40)]


def recipe(folder, **changes) -> SftRecipe:
    values = {
        "run": {"name": "resume", "seed": 3},
        "policy": {"path": str(folder), **changes.pop("policy", {})},
        "data": {"path": "not read"},
        "sft": {"steps": 6, "batch_size": 4, "lr": 1e-3, **changes.pop("sft", {})},
        "checkpoint": {"every": 2, **changes.pop("checkpoint", {})},
    }
    return parse(values, SftRecipe, "test")


def run(made, folder, rows=ROWS):
    folder.mkdir(parents=True, exist_ok=True)
    policy = load_policy(made)
    return train(made, policy, token_rows(made, policy, rows), folder)


def stopped_after(step, made, folder, monkeypatch, number=signal.SIGTERM):
    """Trains until a signal arrives in a step."""

    class Stop(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            if state.global_step == step - 1:
                os.kill(os.getpid(), number)

    import sft.trainer

    def with_stop(*arguments):
        trainer = make_trainer(*arguments)
        trainer.add_callback(Stop())
        return trainer

    with monkeypatch.context() as patched, pytest.raises(Interrupted, match=f"asked to end after step {step}"):
        patched.setattr(sft.trainer, "make_trainer", with_stop)
        run(made, folder)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        (tiny_qwen3_moe, {}),
        (tiny_deepseek_v3, {"sft": {"packing": True, "max_length": 24, "steps": None, "epochs": 2.0, "mtp_weight": 0.3}}),
        (tiny_qwen3_moe, {"policy": {"lora": {"rank": 4}}}),
    ],
)
def test_stopped_and_resumed_is_the_same_as_never_stopped(kind, changes, tmp_path, monkeypatch):
    made = recipe(kind(tmp_path / "policy", seed=5), **changes)
    whole = run(made, tmp_path / "whole")
    stopped_after(3, made, tmp_path / "stopped", monkeypatch, signal.SIGINT if kind is tiny_deepseek_v3 else signal.SIGTERM)
    resumed = run(made, tmp_path / "stopped")

    one, two = (load_file(tmp_path / name / "final/model.safetensors") for name in ("whole", "stopped"))
    begun = load_file(tmp_path / "policy/model.safetensors")
    assert one.keys() == two.keys() and begun.keys() <= one.keys(), "mtp_weight adds a module"
    assert all(torch.equal(one[name], two[name]) for name in one)
    experts = [name for name in one if ".experts." in name and "down_proj" in name and name in begun]
    assert experts and sum(not torch.equal(one[name], begun[name]) for name in experts) >= len(experts) // 2
    assert whole["steps"] == resumed["steps"]
    metrics = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("whole", "stopped")]
    losses = [[json.loads(line)["loss"] for line in lines] for lines in metrics]
    assert losses[0] == losses[1]
    assert not (tmp_path / "stopped/checkpoints").exists(), "final is there, and nothing is left to go on from"


def test_a_checkpoint_that_a_kill_left_half_written_is_passed_over(tmp_path, monkeypatch, capsys):
    made = recipe(tiny_qwen3_moe(tmp_path / "policy", seed=5), checkpoint={"keep": 2})
    run(made, tmp_path / "whole")
    stopped_after(4, made, tmp_path / "stopped", monkeypatch)
    newest = tmp_path / "stopped/checkpoints/checkpoint-4/trained.safetensors"
    newest.write_bytes(newest.read_bytes()[:1000])
    run(made, tmp_path / "stopped")
    said = capsys.readouterr().out
    assert "checkpoint-4: not whole, so it is passed over" in said and "going on after step 2" in said
    one, two = (load_file(tmp_path / name / "final/model.safetensors") for name in ("whole", "stopped"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_other_rows_are_refused(tmp_path, monkeypatch):
    made = recipe(tiny_qwen3_moe(tmp_path / "policy", seed=5))
    stopped_after(2, made, tmp_path / "stopped", monkeypatch)
    with pytest.raises(InputError, match=r"data: not the rows that .*checkpoint-2 was trained on"):
        run(made, tmp_path / "stopped", [{"prompt": "7", "completion": "8"}] * 40)


def test_the_default_is_two_epochs_of_a_cosine_from_5e_6_to_1e_6(tmp_path):
    made = recipe(tiny_qwen3_moe(tmp_path / "policy", seed=5), checkpoint={"every": 0})
    made = made.model_copy(update={"sft": type(made.sft)(batch_size=4)})
    result = run(made, tmp_path / "run")
    rates = [json.loads(line)["learning_rate"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert result["steps"] == len(rates) == 20  # 40 rows, 4 a step, twice
    assert rates[0] == pytest.approx(5e-6)
    assert rates[10] == pytest.approx(3e-6)  # the middle of the cosine
    assert 1e-6 < rates[-1] < 1.03e-6
