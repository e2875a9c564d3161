"""What one of several ranks does for test_ranks.py: gradients of every case, replicated and sharded, into the file it is given.

Run by torch.distributed.run: `two_ranks.py POLICY OUT`.
"""

import os
import sys
from pathlib import Path

import torch
from made import MAX_TOKENS, TEMPERATURE, NoFloat32, gradients, make_learner, step_numbers
from rank_cases import CASES, groups_of, settings_of
from torch.distributed.tensor import DTensor

from rl.learner import Learner
from rl.mixed import residual_in_fp32
from rl.ranks import Ranks
from rl.shard import shard

FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true"}


def step_gradients(
    policy: Path, case: str, ranks: Ranks, sharded: torch.dtype | None, masters: torch.dtype = torch.float64
) -> dict[str, torch.Tensor]:
    """sharded: the type that layers are gathered in."""
    groups = ranks.groups(lambda: groups_of(case, policy))
    loss, reference = CASES[case][1], policy if CASES[case][1].kl_coef else None
    learner = make_learner(policy, loss, dtype=masters, micro_tokens=45, reference=reference, **settings_of(case, policy))
    if sharded is not None:
        exported = {name: tensor.clone() for name, tensor in learner.export()}
        shard(learner.model, ranks, sharded)
        if sharded is torch.bfloat16:
            residual_in_fp32(learner.model)
        learner = Learner(
            learner.model, learner.loss, learner.config, ranks, sharded=sharded, temperature=TEMPERATURE, max_tokens=MAX_TOKENS,
            reference=learner.reference,
        )  # fmt: skip
        sent = learner.export()
        assert all(torch.equal(exported[name].to(t.dtype), t) for name, t in sent), "what is gathered is what was sharded"
    return {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in gradients(learner, groups).items()}


def main() -> None:
    policy, out = Path(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    ranks = Ranks()
    found = {}
    with NoFloat32():
        groups = ranks.groups(lambda: groups_of("routers", policy))
        learner = make_learner(policy, CASES["routers"][1], micro_tokens=45, **settings_of("routers", policy))
        found["numbers"] = step_numbers(learner, groups)
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
