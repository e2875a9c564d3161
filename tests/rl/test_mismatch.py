"""Engine against learner: means, quantiles, and precision apart from staleness."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import policies
import pytest
import torch
from made import make_groups, make_learner, near

from data.values import Group
from rl.advantage import group_advantage
from rl.config import AdvantageConfig, LossConfig
from rl.mismatch import Mismatch, mismatch_numbers


def test_numbers_by_hand() -> None:
    mismatch = Mismatch()
    old, engine = torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-1.0, -2.5, -2.0])
    mismatch.add(old, engine, torch.tensor([False, False, True]))
    numbers = mismatch_numbers(mismatch.packed)
    k3 = [math.exp(d) - d - 1 for d in (0.0, 0.5, -1.0)]
    assert numbers["sampling/sampling_logp_difference/mean"] == pytest.approx(1.5 / 3)
    assert numbers["mismatch/kl"] == pytest.approx(sum(k3) / 3)
    assert numbers["mismatch/current/logp_difference"] == pytest.approx(0.25)
    assert numbers["mismatch/current/kl"] == pytest.approx(sum(k3[:2]) / 2)
    assert numbers["mismatch/older/logp_difference"] == pytest.approx(1.0)
    assert numbers["mismatch/older/kl"] == pytest.approx(k3[2])
    assert numbers["mismatch/older_tokens"] == pytest.approx(1 / 3)
    assert mismatch_numbers(Mismatch().packed) == {}


def test_tiny_differences_keep_their_kl() -> None:
    """k3 of 1e-6 is 5e-13, which float32 gives as 0."""
    mismatch = Mismatch()
    mismatch.add(torch.full((8,), -2.0, dtype=torch.float64) + 1e-6, torch.full((8,), -2.0), torch.zeros(8, dtype=torch.bool))
    assert mismatch_numbers(mismatch.packed)["mismatch/kl"] == pytest.approx(5e-13, rel=1e-3)


@pytest.mark.parametrize("spread", [1e-5, 0.01, 1.0])
def test_quantiles_are_within_a_bin_and_passes_add_up(spread: float) -> None:
    log_ratio = np.random.default_rng(0).normal(0.0, spread, 5001)
    whole, parts = Mismatch(), [Mismatch(), Mismatch()]
    rows = torch.from_numpy(log_ratio)
    whole.add(rows, torch.zeros(5001), torch.zeros(5001, dtype=torch.bool))
    for part, piece in zip(parts, rows.split(3000), strict=True):
        part.add(piece, torch.zeros(len(piece)), torch.zeros(len(piece), dtype=torch.bool))
    numbers = mismatch_numbers(whole.packed)
    for q in (0.01, 0.1, 0.5, 0.9, 0.99):
        wanted = np.quantile(log_ratio, q, method="inverted_cdf")
        found = math.log(numbers[f"mismatch/ratio_p{100 * q:02.0f}"])
        assert found == pytest.approx(wanted, rel=0.01, abs=1e-8)
    together = mismatch_numbers(parts[0].packed + parts[1].packed)
    assert together == pytest.approx(numbers, rel=1e-12)


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return policies.tiny_qwen3_moe(tmp_path_factory.mktemp("policy") / "moe", seed=0)


def test_versions_tell_precision_from_staleness(policy: Path) -> None:
    """Tokens of the version that is trained are current, others older; log-probs are those before the first update, whatever follows."""
    groups = near(make_groups([[1, 0, 0, 1], [0, 1, 0, 0]]), policy)
    learner = make_learner(policy, LossConfig(), steps_per_batch=2, epochs_per_batch=2)

    def step(groups: list[Group]) -> dict[str, float]:
        for batches in learner.batches(groups, group_advantage(groups, AdvantageConfig())):
            learner.step(batches)
        return learner.watch.collect(with_kl=False)

    first = step(groups)
    assert first["mismatch/older_tokens"] == 0.0 and "mismatch/older/kl" not in first
    whole = make_learner(policy, LossConfig())
    learner_of_one = learner
    learner = whole
    alone = step(groups)
    names = [name for name in alone if name.startswith("mismatch/")]
    assert {name: first[name] for name in names} == pytest.approx({name: alone[name] for name in names})

    learner = learner_of_one  # trains version 1 now
    (a, b) = groups
    fresh = [replace(c, policy_version=np.ones_like(c.policy_version)) for c in a.completions]
    second = step([replace(a, completions=tuple(fresh)), b])
    tokens = [sum(len(c.token_ids) for c in g.completions) for g in (a, b)]
    assert second["mismatch/older_tokens"] == pytest.approx(tokens[1] / sum(tokens))
    parts = tokens[0] * second["mismatch/current/kl"] + tokens[1] * second["mismatch/older/kl"]
    assert second["mismatch/kl"] == pytest.approx(parts / sum(tokens))
