"""Two gloo ranks that share the masters of an FP8 policy gather codes alone, those of one rank byte for byte, and have its gradients."""

import os
import subprocess
import sys
from pathlib import Path

import policies
import pytest
import torch
from safetensors.torch import load_file, save_file

from rl.config import PolicyConfig
from rl.fp8.folder import engine_policy

HERE = Path(__file__).parent
TORCHRUN = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]


@pytest.mark.parametrize("make", [policies.tiny_qwen3_moe, policies.tiny_deepseek_v3])
def test_codes_do_not_depend_on_the_number_of_ranks(make, tmp_path: Path) -> None:
    """Two ranks cut most matrices in the middle of a block; kv_a_proj_with_mqa has 576 rows. DeepSeek-V3 begins with published codes."""
    plain = policy = make(tmp_path / "plain", seed=0)
    if make is policies.tiny_deepseek_v3:
        policy = engine_policy(PolicyConfig(path=str(plain), precision="fp8"), plain, tmp_path / "published")
        tensors = load_file(policy / "model.safetensors")
        tensors |= {name: scale * 0.7371 for name, scale in tensors.items() if name.endswith("_scale_inv")}  # by another rule
        save_file(tensors, policy / "model.safetensors", metadata={"format": "pt"})
    found = []
    for launch in ([], TORCHRUN):
        out = tmp_path / f"{len(launch)}.safetensors"
        done = subprocess.run(
            [sys.executable, *launch, str(HERE / "two_ranks.py"), str(plain), str(policy), str(out)],
            env={**os.environ, "PYTHONPATH": f"{HERE.parent}:{HERE.parent.parent}", "OMP_NUM_THREADS": "1"},
            capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        found.append(load_file(out))
    one, two = found
    assert one.keys() == two.keys() and any(name.endswith("_scale_inv") for name in one)
    for name in one:
        if not name.startswith("grad/"):
            assert torch.equal(one[name], two[name]), name
    if policy is not plain:
        name = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight_scale_inv"
        assert torch.equal(two[f"begins/{name}"], tensors[name]) and not torch.equal(two[name], tensors[name])
    grads = [name for name in one if name.startswith("grad/")]
    difference = sum((one[n].double() - two[n].double()).square().sum() for n in grads)
    # Not rounding alone: 128x1 tiles of the weight gradient hold other tokens on each rank.
    assert (difference / sum(one[n].double().square().sum() for n in grads)) ** 0.5 < 0.06
