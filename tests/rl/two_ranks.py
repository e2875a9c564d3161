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
from rl.mixed import residual_in_fp32
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


def step_gradients(
    policy: Path, case: str, ranks: Ranks, sharded: torch.dtype | None, masters: torch.dtype = torch.float64
) -> dict[str, torch.Tensor]:
    """sharded: the type that layers are gathered in."""
    groups = ranks.groups(lambda: groups_of(case, policy))
    loss, reference = CASES[case][1], policy if CASES[case][1].kl_coef else None
    learner = make_learner(policy, loss, dtype=masters, micro_tokens=45, reference=reference, router=router_of(case))
    if sharded is not None:
        exported = {name: tensor.to(sharded, copy=True) for name, tensor in learner.export()}
        shard(learner.model, ranks, sharded)
        if sharded is torch.bfloat16:
            residual_in_fp32(learner.model)
        learner = Learner(
            learner.model, learner.loss, learner.config, ranks, sharded=sharded, temperature=TEMPERATURE, max_tokens=MAX_TOKENS,
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
        for case in CASES:
            found[f"{case}, replicated"] = step_gradients(policy, case, ranks, None)
        os.environ.update(FSDP2)
        for case in CASES:
            found[f"{case}, sharded"] = step_gradients(policy, case, ranks, torch.float64)
        found["spread, sharded in bf16"] = step_gradients(policy, "spread", ranks, torch.bfloat16, torch.float32)
    if ranks.main:
        torch.save(found, out)
    ranks.close()


if __name__ == "__main__":
    main()
