"""What each of two sharded ranks does for test_sharded.py: trains a policy, once through and once stopped and resumed.

Run by torch.distributed.run: `two_ranks.py FOLDER`, which holds rows.json, and cases.json with a recipe by case.
"""

import json
import os
import sys
from pathlib import Path

os.environ.update({
    "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true", "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true", "FSDP_OFFLOAD_PARAMS": "false",
    "ACCELERATE_USE_CPU": "true",
})  # fmt: skip

from accelerate import PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

import sft.trainer
from data.recipe import parse
from rl.run import Interrupted
from sft.config import SftRecipe

init_state = PartialState.__init__


def as_accelerators(state, *arguments, **named):
    """accelerate shards on accelerators alone, by name: it is told that these ranks are some. Devices, tensors and gloo stay the CPU's."""
    init_state(state, *arguments, **named)
    if state.distributed_type is DistributedType.MULTI_CPU:
        state.distributed_type = DistributedType.MULTI_XPU


class Stop(TrainerCallback):
    """SIGTERM reaches one rank in the third step."""

    def on_step_begin(self, args, state, control, model, **_):
        assert all(isinstance(weight, DTensor) for weight in model.parameters())
        if state.global_step == 2 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), 15)


def run(recipe: SftRecipe, rows: list, folder: Path, stop: bool) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    policy = sft.trainer.load_policy(recipe)
    make = sft.trainer.make_trainer

    def with_stop(*arguments):
        trainer = make(*arguments)
        assert trainer.accelerator.is_fsdp2
        if stop:
            trainer.add_callback(Stop())
        return trainer

    sft.trainer.make_trainer = with_stop
    try:
        sft.trainer.train(recipe, policy, sft.trainer.token_rows(recipe, policy, rows), folder)
    except Interrupted:
        assert stop and (folder / "checkpoints/checkpoint-3/sharded").is_dir()
    finally:
        sft.trainer.make_trainer = make


def main() -> None:
    PartialState.__init__ = as_accelerators
    folder = Path(sys.argv[1])
    rows = json.loads((folder / "rows.json").read_text())
    for name, values in json.loads((folder / "cases.json").read_text()).items():
        recipe = parse(values, SftRecipe, name)
        run(recipe, rows, folder / name / "whole", stop=False)
        run(recipe, rows, folder / name / "stopped", stop=True)
        run(recipe, rows, folder / name / "stopped", stop=False)


if __name__ == "__main__":
    main()
