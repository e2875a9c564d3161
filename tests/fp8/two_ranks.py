"""What one of several ranks does for test_ranks.py: a sharded FP8 policy, moved alike on any number of ranks, exported and trained.

Run by torch.distributed.run, or alone: `two_ranks.py PLAIN POLICY OUT`, the one that the other was made of, to sample near to.
"""

import os
import sys
from pathlib import Path

import torch
from made import MAX_TOKENS, TEMPERATURE, gradients, make_groups, near
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from rl.config import Fp8Config, LearnerConfig, LossConfig
from rl.fp8.convert import fp8_model
from rl.fp8.layout import coded
from rl.learner import Learner
from rl.ranks import Ranks
from rl.shard import shard

os.environ.update({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true"})


def main() -> None:
    plain, policy, out = map(Path, sys.argv[1:])
    torch.set_num_threads(1)
    ranks = Ranks()
    sharded = ranks.count > 1
    rest = torch.float32
    model = fp8_model(policy, Fp8Config(rest="fp32"), ranks.device, rest=rest)
    if sharded:
        shard(model, ranks, rest)
    learner = Learner(
        model, LossConfig(ratio_base="engine"), LearnerConfig(warmup_steps=0, micro_tokens=45), ranks,
        sharded=rest if sharded else None, temperature=TEMPERATURE, max_tokens=MAX_TOKENS,
    )  # fmt: skip
    groups = ranks.groups(lambda: near(make_groups([[1, 0, 0, 1], [0, 1, 0, 0], [1, 1, 0.5, 0]]), plain))
    begins = {f"begins/{name}": tensor.detach().clone().contiguous() for name, tensor in learner.export()}
    found = gradients(learner, groups)
    with torch.no_grad():  # an update that needs no sum over ranks, so that it is the same to the bit
        for _, parameter in learner.optim.parameters:
            parameter.mul_(1.01).add_(0.001)
    exported = {name: tensor.detach().clone().contiguous() for name, tensor in learner.export()}
    whole = {f"grad/{name}": (g.full_tensor() if isinstance(g, DTensor) else g).contiguous() for name, g in found.items()}
    if sharded:  # the masters are what is not whole on a rank
        assert all(isinstance(model.get_parameter(name), DTensor) and codes.held is not None for name, codes in coded(model).items())
        name, codes = next(iter(coded(model).items()))
        assert codes.held.codes.numel() == model.get_parameter(name).to_local().numel() < model.get_parameter(name).numel()
    if ranks.main:
        sent = begins | exported
        save_file({name: t.view(torch.uint8) if "float8" in str(t.dtype) else t for name, t in sent.items()} | whole, out)
    ranks.close()


main()
