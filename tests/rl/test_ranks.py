"""Several ranks (gloo) give the gradients of one; groups cross between ranks without loss."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import policies
import pytest
import torch
from made import NoFloat32, distance, gradients, make_groups, make_learner, near

from data.values import Completion, Group
from rl.config import LossConfig
from rl.ranks import decode_groups, encode_groups

HERE = Path(__file__).parent
REWARDS = [[1, 0, 0, 1], [0, 1, 0, 0], [1, 1, 0.5, 0], [0.2, 0.9, 0.4, 0.0]]


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return policies.tiny_qwen3_moe(tmp_path_factory.mktemp("policy") / "moe", seed=0)


@pytest.mark.parametrize(
    ("case", "rewards"),
    [("spread", REWARDS), ("one rank has only zero advantages", [REWARDS[0], [1, 1, 1, 1], [0, 0, 0, 0]])],
)
def test_two_ranks_give_the_gradients_of_one(policy: Path, tmp_path: Path, case: str, rewards: list[list[float]]) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    done = subprocess.run(
        [*command, str(HERE / "two_ranks.py"), str(policy), str(tmp_path / "grads.pt"), case],
            env={**os.environ, "PYTHONPATH": f"{HERE.parent}:{HERE.parent.parent}", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    two = torch.load(tmp_path / "grads.pt", weights_only=True)
    with NoFloat32():
        one = gradients(make_learner(policy, LossConfig(kind="dapo", ratio_base="engine")), near(make_groups(rewards), policy))
    assert distance(two, one) < 1e-10


def test_groups_cross_between_ranks_bit_by_bit() -> None:
    groups = make_groups([[1, None, 0], [0.1, 0.2, 0.3]])
    first = groups[0].completions[0]
    tokens = len(groups[0].prompt.token_ids) + len(first.token_ids)
    routed = Completion(**{
        **vars(first),
        "routes": np.arange(tokens * 6, dtype=np.uint8).reshape(tokens, 2, 3),
        "routes_valid": np.arange(tokens) % 2 == 0,
    })  # fmt: skip
    groups[0] = Group(groups[0].id, groups[0].prompt, 0, (routed, *groups[0].completions[1:]), groups[0].scores)
    header, arrays = encode_groups(groups)
    flat = torch.from_numpy(np.frombuffer(b"".join(np.ascontiguousarray(a).tobytes() for a in arrays), dtype=np.uint8).copy())


    again = decode_groups(json.loads(header), flat)
    for a, b in zip(groups, again, strict=True):
        assert (a.id, a.prompt.id, a.attempt) == (b.id, b.prompt.id, b.attempt)
        assert [(s.value, s.status) for s in a.scores] == [(s.value, s.status) for s in b.scores]
        assert np.array_equal(a.prompt.token_ids, b.prompt.token_ids)
        for c, d in zip(a.completions, b.completions, strict=True):
            for name, value in vars(c).items():
                other = getattr(d, name)
                same = np.array_equal(value, other) and value.dtype == other.dtype if isinstance(value, np.ndarray) else value == other
                assert same, name
