"""What a checkpoint brings back: weights and buffers, optimizer, random numbers, and nothing that was damaged."""

from pathlib import Path

import policies
import pytest
import torch
from made import make_groups, make_learner

from data.recipe import InputError
from rl.advantage import group_advantage
from rl.checkpoint import Checkpoints
from rl.config import AdvantageConfig, LossConfig
from rl.learner import Learner
from rl.policy import load_tokenizer
from rl.ranks import Ranks

REWARDS = [[1, 0, 0, 1], [0, 1, 0, 0]]


def learn(learner: Learner, seed: int) -> None:
    groups = make_groups(REWARDS, seed=seed)
    for batch in learner.batches(groups, group_advantage(groups, AdvantageConfig())):
        learner.step(batch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_learner_goes_on_with_the_same_bits_router_bias_included(dtype: torch.dtype, tmp_path: Path) -> None:
    policy = policies.tiny_deepseek_v3(tmp_path / "policy", seed=0, dtype=dtype)
    tokenizer, checkpoints = load_tokenizer(policy), Checkpoints(tmp_path / "checkpoints", 2, Ranks())
    first = make_learner(policy, LossConfig(), dtype=dtype)
    learn(first, 1)
    biases = {name: buffer for name, buffer in first.model.named_buffers() if name.endswith("e_score_correction_bias")}
    assert biases
    for bias in biases.values():
        bias += 0.3  # as balancing would move it
    torch.manual_seed(5)
    torch.rand(3)
    path = checkpoints.save(1, first, tokenizer, {"step": 1, "updates": first.updates})
    wanted = torch.rand(3)

    second = make_learner(path, LossConfig(), dtype=dtype)
    torch.manual_seed(6)
    assert checkpoints.load(1, second) == {"step": 1, "updates": 1}
    second.updates, second.optim.steps = 1, 1
    assert torch.equal(torch.rand(3), wanted)
    found = dict(second.model.named_buffers())
    for name, bias in biases.items():
        assert found[name].dtype == bias.dtype and torch.equal(found[name], bias), name
    learn(first, 2)
    learn(second, 2)
    for (name, a), (_, b) in zip(first.export(), second.export(), strict=True):
        assert torch.equal(a, b), name
    assert all(torch.equal(a, second.state_dict()[name]) for name, a in first.state_dict().items())


def test_a_folder_that_was_not_renamed_into_place_is_no_checkpoint(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, 2, Ranks())
    for name in (".step-3.partial", "damaged-step-2", "step-x"):
        (tmp_path / name).mkdir()
    assert checkpoints.steps() == [] and checkpoints.newest() is None


@pytest.mark.parametrize("file", ["state.json", "trainer/.metadata", "config.json", "hashes.json", "model.safetensors"])
def test_every_file_of_a_checkpoint_is_missed(file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    policy = policies.tiny_qwen3(tmp_path / "policy", seed=0)
    checkpoints = Checkpoints(tmp_path / "checkpoints", 2, Ranks())
    learner = make_learner(policy, LossConfig(), dtype=torch.float32)
    for step in (1, 2):
        checkpoints.save(step, learner, load_tokenizer(policy), {"step": step})
    assert checkpoints.newest() == 2
    (checkpoints.path(2) / file).unlink()
    assert checkpoints.newest() == 1
    assert f"step-2: damaged ({file}" in capsys.readouterr().out


def test_a_checkpoint_of_other_trained_tensors_is_one_line(tmp_path: Path) -> None:
    policy = policies.tiny_qwen3_moe(tmp_path / "policy", seed=0)
    checkpoints = Checkpoints(tmp_path / "checkpoints", 2, Ranks())
    first = make_learner(policy, LossConfig(), dtype=torch.float32)
    learn(first, 1)
    name, _ = first.optim.parameters[0]
    moments = first.optim.state.pop(name)
    path = checkpoints.save(1, first, load_tokenizer(policy), {"step": 1})
    first.optim.state[name] = moments
    with pytest.raises(InputError, match=rf"^{path}: the checkpoint lacks {name}/exp_avg \(2 such tensors in all\): .*policy.path={path}$"):
        checkpoints.load(1, first)
