"""What one of several ranks does for test_ranks.py: gradients of every case, replicated and sharded, into the file it is given.

Run by torch.distributed.run: `two_ranks.py POLICY OUT`.
"""

import os
import sys
from pathlib import Path

import torch
from made import MAX_TOKENS, TEMPERATURE, NoFloat32, gradients, make_groups, make_learner, near, random_routes, step_numbers
from torch.distributed.tensor import DTensor

from data.values import Group
from rl.config import LossConfig, RouterConfig
from rl.learner import Learner
from rl.ranks import Ranks
from rl.shard import shard

REWARDS = [[1, 0, 0, 1], [0, 1, 0, 0], [1, 1, 0.5, 0], [0.2, 0.9, 0.4, 0.0]]
DAPO = LossConfig(kind="dapo", ratio_base="engine")
CASES = {
    "spread": (REWARDS, DAPO),
    # With an auxiliary loss over the load of all ranks and passes, and the routes that completions came with.
    "routers": (REWARDS, DAPO.model_copy(update={"replay": "rollout"})),
    "one rank has only zero advantages": ([REWARDS[0], [1, 1, 1, 1], [0, 0, 0, 0]], DAPO),
    # The reference is the policy itself, from which k1 has a gradient all the same.
    "gspo with KL": (REWARDS, LossConfig(kind="gspo", ratio_base="engine", kl_coef=0.1, kl="k1")),
}

FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true"}


def groups_of(case: str, policy: Path) -> list[Group]:
    groups = near(make_groups(CASES[case][0]), policy)
    return random_routes(groups, layers=2) if case == "routers" else groups


def router_of(case: str) -> RouterConfig:
    return RouterConfig(aux_loss=0.5 if case == "routers" else 0.0)


def step_gradients(policy: Path, case: str, ranks: Ranks, sharded: bool) -> dict[str, torch.Tensor]:
    groups = ranks.groups(lambda: groups_of(case, policy))
    loss = CASES[case][1]
    learner = make_learner(policy, loss, micro_tokens=45, reference=policy if loss.kl_coef else None, router=router_of(case))
    if sharded:
        exported = {name: tensor.clone() for name, tensor in learner.export()}
        shard(learner.model, ranks, torch.float64)
        learner = Learner(
            learner.model, learner.loss, learner.config, ranks, sharded=torch.float64, temperature=TEMPERATURE, max_tokens=MAX_TOKENS,
            reference=learner.reference,
        )  # fmt: skip
        assert all(torch.equal(exported[name], tensor) for name, tensor in learner.export()), "what is gathered is what was sharded"
    return {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in gradients(learner, groups).items()}


def main() -> None:
    policy, out = Path(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    ranks = Ranks()
    found = {}
    with NoFloat32():
        loss, router = CASES["routers"][1], router_of("routers")
        groups = ranks.groups(lambda: groups_of("routers", policy))
        found["numbers"] = step_numbers(make_learner(policy, loss, micro_tokens=45, router=router), groups)
        for sharded in (False, True):
            os.environ.update(FSDP2 if sharded else {})
            for case in CASES:
                found[f"{case}, {'sharded' if sharded else 'replicated'}"] = step_gradients(policy, case, ranks, sharded)
    if ranks.main:
        torch.save(found, out)
    ranks.close()


if __name__ == "__main__":
    main()
