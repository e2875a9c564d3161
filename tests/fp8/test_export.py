"""The export command: an FP8 policy in BF16 and the other way, and one line for what cannot be."""

import json
from pathlib import Path

import policies
import pytest
import torch
from safetensors.torch import load_file

from rl.config import Fp8Config
from rl.export import main
from rl.fp8.convert import fp8_model
from rl.fp8.layout import coded
from rl.fp8.quantize import SQUARE, quantize
from rl.policy import checkpoint_views, load_model

CPU = torch.device("cpu")
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj"]


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["rl.export", *map(str, arguments)])
    return main()


@pytest.mark.parametrize("make", [policies.tiny_qwen3_moe, policies.tiny_deepseek_v3])
def test_codes_and_values_of_one_policy(make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    made = make(tmp_path / "made", seed=0, dtype=torch.bfloat16)
    assert run(monkeypatch, made, tmp_path / "runs" / "fp8", "--precision", "fp8") == 0
    assert "runs/fp8: fp8," in capsys.readouterr().out
    model = fp8_model(made, Fp8Config(), CPU)
    codes = load_file(tmp_path / "runs" / "fp8" / "model.safetensors")
    begins = dict(checkpoint_views(model))
    assert codes.keys() == begins.keys(), "as a run of FP8 begins"
    assert all(codes[name].dtype is t.dtype and torch.equal(codes[name].float(), t.float()) for name, t in begins.items())

    assert run(monkeypatch, tmp_path / "runs" / "fp8", tmp_path / "bf16", "--precision", "bf16") == 0
    assert "quantization_config" not in json.loads((tmp_path / "bf16" / "config.json").read_text())
    plain = load_model(tmp_path / "bf16", torch.bfloat16)
    for name, tensor in load_model(made, torch.bfloat16).state_dict().items():
        wanted = quantize(tensor, SQUARE).dequantize(torch.bfloat16) if name in coded(model) else tensor
        assert torch.equal(plain.state_dict()[name], wanted), name
    kinds = {t.dtype for name, t in load_file(tmp_path / "bf16" / "model.safetensors").items() if not name.endswith("correction_bias")}
    assert kinds == {torch.bfloat16}


def test_a_mistake_is_one_line_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    made = policies.tiny_qwen3_moe(tmp_path / "made", seed=0)
    (tmp_path / "empty").mkdir()
    out = tmp_path / "out"
    cases = {
        f"OUT: '{tmp_path / 'empty'}' exists; name a new folder": (made, tmp_path / "empty", "--precision", "bf16"),
        f"policy.path: no folder '{tmp_path / 'none'}'": (tmp_path / "none", out, "--precision", "bf16"),
        f"policy.path: '{tmp_path / 'empty'}' has no config.json": (tmp_path / "empty", out, "--precision", "fp8"),
        "policy.fp8.keep: no module of this model is named 'nosuch'": (made, out, "--precision", "fp8", "--keep", "nosuch"),
        "leaves nothing of this model to convert": (made, out, "--precision", "fp8", "--keep", "lm_head", "experts", *PROJECTIONS),
    }
    for said, arguments in cases.items():
        assert run(monkeypatch, *arguments) == 2
        printed = capsys.readouterr()
        assert said in printed.err and printed.err.count("\n") == 1 and printed.out == ""
        assert not out.exists() and not list(tmp_path.glob(".*"))
