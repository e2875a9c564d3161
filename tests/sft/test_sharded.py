"""SFT under FSDP2 on two ranks (gloo): it trains what one process trains, adapters and experts included, and goes on after a stop."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from policies import tiny_qwen3_moe
from safetensors.torch import load_file

from data.recipe import parse
from sft.config import SftRecipe
from sft.trainer import load_policy, token_rows, train

HERE = Path(__file__).parent
ROWS = [{"prompt": f"{n}", "completion": f"{n * n % 90}"} for n in range(40)]
# With rank 4 on the experts' matrices too: peft treats these otherwise than the weight of a linear layer.
LORA = {"rank": 4, "targets": ["q_proj", "v_proj"], "parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}


def recipe(policy: Path, **changes) -> dict:
    return {
        "run": {"name": "sharded", "seed": 3}, "policy": {"path": str(policy), **changes}, "data": {"path": "not read"},
        "sft": {"steps": 6, "batch_size": 4, "lr": 1e-3, "threads": 1}, "checkpoint": {"every": 2},
    }  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of what two sharded ranks made, by case: `whole`, and `stopped` in its third step and resumed."""
    folder = tmp_path_factory.mktemp("sharded")
    policy = tiny_qwen3_moe(folder / "policy", seed=5)
    (folder / "rows.json").write_text(json.dumps(ROWS))
    (folder / "cases.json").write_text(json.dumps({"all": recipe(policy), "lora": recipe(policy, lora=LORA)}))
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", str(HERE / "two_ranks.py"), str(folder)],
        env={**os.environ, "PYTHONPATH": f"{HERE.parent}:{HERE.parent.parent}", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    (folder / "log.txt").write_text(done.stdout)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("case", ["all", "lora"])
def test_two_sharded_ranks_train_what_one_process_trains_and_go_on_after_a_stop(trained: Path, case: str, tmp_path: Path) -> None:
    one = parse(json.loads((trained / "cases.json").read_text())[case], SftRecipe, "test")
    policy = load_policy(one)
    train(one, policy, token_rows(one, policy, ROWS), tmp_path)

    alone = load_file(tmp_path / "final/model.safetensors")
    whole, stopped = (load_file(trained / case / name / "final/model.safetensors") for name in ("whole", "stopped"))
    begun = load_file(trained / "policy/model.safetensors")
    assert alone.keys() == whole.keys() == stopped.keys() == begun.keys()
    assert all(torch.equal(whole[name], stopped[name]) for name in whole), "resumed: the same bits"
    moved = sum((alone[name] - begun[name]).square().sum() for name in begun) ** 0.5
    apart = sum((alone[name] - whole[name]).square().sum() for name in begun) ** 0.5
    assert apart < 1e-3 * moved
    experts = [name for name in begun if ".experts." in name]
    assert sum(not torch.equal(whole[name], begun[name]) for name in experts) >= len(experts) // 2
    frozen = [name for name in begun if torch.equal(whole[name], begun[name])]
    assert ("lm_head.weight" in frozen) == (case == "lora")
    config = json.loads((trained / case / "whole/final/config.json").read_text())
    assert config["architectures"] == ["Qwen3MoeForCausalLM"]
    assert "going on after step 3" in (trained / "log.txt").read_text()
    assert not (trained / case / "stopped/checkpoints").exists()
