"""Checkpoints in DeepSeek-V3's published layout, which `tests/published.py` writes without a model, load whole: every tensor is equal."""

from pathlib import Path

import policies
import published
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rl.config import Fp8Config, PolicyConfig
from rl.fp8.convert import fp8_model
from rl.fp8.folder import engine_policy
from rl.policy import checkpoint_views, load_model

CPU = torch.device("cpu")


def write(folder: Path, fp8: bool) -> dict[str, torch.Tensor]:
    found = published.write(folder, fp8)
    policies.character_tokenizer(published.V).save_pretrained(folder)
    return found


def same(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    """Names, types, shapes and bits."""
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert (got[name].dtype, got[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(*(t.contiguous().flatten().view(torch.uint8) for t in (got[name], tensor))), name


@pytest.mark.parametrize("fp8", [True, False], ids=["fp8", "bf16"])
def test_every_tensor_loads_as_the_value_it_stands_for(fp8: bool, tmp_path: Path) -> None:
    found = write(tmp_path / "published", fp8)
    same(dict(checkpoint_views(load_model(tmp_path / "published", torch.float32))), published.values(found))


def test_codes_and_scales_leave_an_fp8_policy_as_they_came(tmp_path: Path) -> None:
    found = write(tmp_path / "published", fp8=True)
    same(dict(checkpoint_views(fp8_model(tmp_path / "published", Fp8Config(), CPU))), found)
    folder = engine_policy(PolicyConfig(path="", precision="fp8"), tmp_path / "published", tmp_path / "engine")
    same(load_file(folder / "model.safetensors"), found)


def test_transformers_runs_the_trunk_of_a_bf16_checkpoint_as_we_do(tmp_path: Path) -> None:
    """It leaves the module out; its own logits are those of our trunk."""
    write(tmp_path / "published", fp8=False)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "published", dtype=torch.float32).eval()
    assert not any(name.startswith(f"model.layers.{published.LAYERS}.") for name in theirs.state_dict())
    ours = load_model(tmp_path / "published", torch.float32, attention_name="sdpa")
    ids = torch.arange(2, 30)[None]
    assert torch.equal(ours(ids).logits, theirs(ids).logits)


def test_transformers_refuses_codes_whose_last_block_is_cut_off(tmp_path: Path) -> None:
    """As those of `kv_a_proj_with_mqa` are in every DeepSeek-V3: "Weight shape (576, 256) not divisible by scale grid (5, 2)". `rl.export
    --precision bf16` is the way to it."""
    write(tmp_path / "published", fp8=True)
    with pytest.raises(RuntimeError, match="issues during automatic conversion of the weights"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "published", dtype=torch.float32)
