"""Router load: what is counted, how often, and the numbers made of it."""

from pathlib import Path

import policies
import pytest
import torch
from made import make_groups, make_learner

from data.values import Group
from rl.advantage import group_advantage
from rl.config import AdvantageConfig, LossConfig
from rl.learner import Learner
from rl.policy import load_model
from rl.router import gates, load_numbers

REWARDS = [[1, 0, 0, 1], [0, 1, 0, 0], [1, 1, 1, 1]]


@pytest.fixture(scope="module", params=["qwen3_moe", "deepseek_v3"])
def policy(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return getattr(policies, f"tiny_{request.param}")(tmp_path_factory.mktemp("policy") / request.param, seed=0)


def test_load_numbers_by_hand() -> None:
    numbers = load_numbers(torch.tensor([[4.0, 4.0, 4.0, 4.0], [10.0, 6.0, 0.0, 0.0]], dtype=torch.float64))
    assert numbers["moe/max_violation"] == pytest.approx(10 / 4 - 1)
    assert numbers["moe/dead_experts"] == 2 / 8
    even, uneven = 1.0, -(0.625 * -0.678071905 + 0.375 * -1.415037499) / 2  # in units of log 4: log2 over 2
    assert numbers["moe/load_entropy"] == pytest.approx((even + uneven) / 2, rel=1e-6)


def loads_of_padded_rows(policy: Path, groups: list[Group]) -> torch.Tensor:
    """Each completion forwarded alone, with its prompt: [L, E]."""
    model = load_model(policy, torch.float64, attention_name="eager")
    loads: list[torch.Tensor] = [torch.zeros(1)] * len(gates(model))

    def counter(layer: int):  # type: ignore[no-untyped-def]
        def count(module, inputs, output) -> None:  # type: ignore[no-untyped-def]
            loads[layer] = loads[layer] + torch.bincount(output[2].flatten(), minlength=output[0].shape[-1])

        return count

    for layer, gate in enumerate(gates(model)):
        gate.register_forward_hook(counter(layer))
    for group in groups:
        for completion in group.completions:
            row = torch.tensor([*group.prompt.token_ids, *completion.token_ids[:-1]])
            model(row[None].long())
    return torch.stack(loads).double()


@pytest.mark.parametrize(("steps", "epochs"), [(1, 1), (2, 3)])
def test_each_token_is_counted_once_a_step_and_a_shared_prompt_once_a_completion(policy: Path, steps: int, epochs: int) -> None:
    groups = make_groups(REWARDS)
    learner = make_learner(policy, LossConfig(), steps_per_batch=steps, epochs_per_batch=epochs, micro_tokens=40, lr=1e-9)
    run_step(learner, groups)
    expected = loads_of_padded_rows(policy, groups[:2])  # the third teaches nothing and is not forwarded
    assert learner.router.load_LE is not None and torch.equal(learner.router.load_LE, expected)
    assert learner.router.numbers() == load_numbers(expected) | {"moe/skipped_groups": 1 / 3}
    run_step(learner, groups)
    assert torch.equal(learner.router.load_LE, expected), "each step counts anew"


def run_step(learner: Learner, groups: list[Group]) -> None:
    for batch in learner.batches(groups, group_advantage(groups, AdvantageConfig())):
        learner.step(batch)


def test_a_dense_policy_has_no_router_numbers(tmp_path: Path) -> None:
    learner = make_learner(policies.tiny_qwen3(tmp_path / "dense", seed=0), LossConfig())
    assert gates(learner.model) == []
    run_step(learner, make_groups(REWARDS))
    assert learner.router.numbers() == {}


def test_recomputed_activations_are_not_counted_twice(policy: Path) -> None:
    plain, recomputing = make_learner(policy, LossConfig()), make_learner(policy, LossConfig())
    recomputing.model.gradient_checkpointing_enable({"use_reentrant": False})
    recomputing.model.train()
    groups = make_groups(REWARDS)
    for learner in (plain, recomputing):
        run_step(learner, groups)
    assert recomputing.router.numbers() == plain.router.numbers() != {}
