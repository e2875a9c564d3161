"""What one rank and two compute alike: for tests/rl/test_ranks.py and the ranks that it starts."""

from pathlib import Path

from made import make_groups, near, random_routes

from data.values import Group
from rl.config import LossConfig, MtpConfig, RouterConfig

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


def groups_of(case: str, policy: Path) -> list[Group]:
    groups = near(make_groups(CASES[case][0]), policy)
    return random_routes(groups, layers=1 if is_deepseek(policy) else 2) if case == "routers" else groups


def settings_of(case: str, policy: Path) -> dict[str, object]:
    """Each architecture's own router loss; and DeepSeek-V3 trains its multi-token prediction module, in one case through the trunk."""
    weight = 0.5 if case == "routers" else 0.0
    if is_deepseek(policy):
        return {"router": RouterConfig(sequence_loss=weight), "mtp": MtpConfig(weight=0.3, detach=case != "spread")}
    return {"router": RouterConfig(aux_loss=weight)}


def is_deepseek(policy: Path) -> bool:
    return "deepseek" in policy.name
