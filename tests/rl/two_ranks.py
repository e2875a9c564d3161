"""What one of several ranks does for test_ranks.py; writes gradients (rank 0) to the file it is given.

Run by torch.distributed.run: `two_ranks.py POLICY OUT CASE`.
"""

import sys
from pathlib import Path

import torch
from made import NoFloat32, gradients, make_groups, make_learner, near

from rl.config import LossConfig
from rl.ranks import Ranks

REWARDS = [[1, 0, 0, 1], [0, 1, 0, 0], [1, 1, 0.5, 0], [0.2, 0.9, 0.4, 0.0]]
CASES = {
    "spread": REWARDS,
    "one rank has only zero advantages": [REWARDS[0], [1, 1, 1, 1], [0, 0, 0, 0]],
}


def main() -> None:
    policy, out, case = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    ranks = Ranks()
    with NoFloat32():
        groups = ranks.groups(lambda: near(make_groups(CASES[case]), policy))
        learner = make_learner(policy, LossConfig(kind="dapo", ratio_base="engine"), micro_tokens=45)
        found = gradients(learner, groups)
    if ranks.main:
        torch.save(found, out)
    ranks.close()


main()
