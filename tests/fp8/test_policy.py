"""Policies in DeepSeek-V3's layout: one set of codes for what trains, travels and is saved."""

import json
from pathlib import Path

import policies
import pytest
import torch
from made import TEMPERATURE, gradients, make_groups
from safetensors.torch import load_file, save_file

from data.recipe import InputError
from rl.config import Fp8Config, LearnerConfig, LoraConfig, LossConfig, OptimizerConfig, PolicyConfig
from rl.fp8.convert import convert, fp8_model
from rl.fp8.decode import Decoder
from rl.fp8.folder import engine_policy
from rl.fp8.layout import coded
from rl.fp8.linear import Fp8Linear
from rl.fp8.quantize import SQUARE, quantize
from rl.learner import Learner
from rl.lora import add_adapter
from rl.policy import checkpoint_specs, checkpoint_views, load_model, load_tokenizer, save_policy
from rl.ranks import Ranks

CPU = torch.device("cpu")
MAKERS = {"qwen3_moe": policies.tiny_qwen3_moe, "deepseek_v3": policies.tiny_deepseek_v3, "qwen3": policies.tiny_qwen3}


@pytest.fixture(scope="module", params=list(MAKERS))
def policy(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return MAKERS[request.param](tmp_path_factory.mktemp("policy") / request.param, seed=0, dtype=torch.bfloat16)


def learner(model: torch.nn.Module, **optimizer: object) -> Learner:
    config = LearnerConfig(lr=1e-2, warmup_steps=0, optimizer=OptimizerConfig(**optimizer))  # type: ignore[arg-type]
    return Learner(model, LossConfig(), config, Ranks(), temperature=TEMPERATURE, max_tokens=12)


def step(one: Learner) -> None:
    gradients(one, make_groups([[1, 0, 0, 1], [0, 1, 0, 0]]))
    one.optim.step(1e-2)


def as_bytes(tensors: dict[str, torch.Tensor]) -> dict[str, bytes]:
    return {name: t.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes() for name, t in tensors.items()}


def export(model: torch.nn.Module) -> dict[str, bytes]:
    return as_bytes(dict(checkpoint_views(model)))


def saved(folder: Path) -> dict[str, bytes]:
    return as_bytes(load_file(folder / "model.safetensors"))


def test_what_trains_is_what_is_sent_and_saved_and_loaded(policy: Path, tmp_path: Path) -> None:
    one = learner(fp8_model(policy, Fp8Config(), CPU))
    step(one)
    for name, codes in coded(one.model).items():  # what the next forward uses
        wanted = quantize(one.model.get_parameter(name), SQUARE)
        assert torch.equal(codes.of(one.model.get_parameter(name)).codes.view(torch.uint8), wanted.codes.view(torch.uint8))
    sent = export(one.model)
    save_policy(tmp_path / "saved", one.export(), one.model, load_tokenizer(policy))
    assert saved(tmp_path / "saved") == sent
    again = fp8_model(tmp_path / "saved", Fp8Config(), CPU)
    assert export(again) == sent
    groups = make_groups([[1, 0, 0, 1]])
    first, second = gradients(one, groups), gradients(learner(again), groups)
    assert all(torch.equal(grad, second[name]) for name, grad in first.items())


def test_specs_are_those_of_the_export_and_a_weight_takes_half_its_bytes(policy: Path) -> None:
    model = fp8_model(policy, Fp8Config(), CPU)
    views = dict(checkpoint_views(model))
    specs = {name: (kind, shape) for name, kind, shape in checkpoint_specs(model)}
    assert specs == {name: (str(t.dtype).removeprefix("torch."), tuple(t.shape)) for name, t in views.items()}
    weights = [name.removesuffix("_scale_inv") for name in views if name.endswith("_scale_inv")]
    in_bf16 = sum(2 * views[name].numel() for name in weights)
    coded_bytes = sum(views[name].nbytes + views[f"{name}_scale_inv"].nbytes for name in weights)
    assert coded_bytes / in_bf16 < 0.51
    plain = sum(t.nbytes for _, t in checkpoint_views(load_model(policy, torch.bfloat16)))
    print(f"{policy.name}: weights {coded_bytes / in_bf16:.4f}, whole policy {sum(t.nbytes for t in views.values()) / plain:.4f} of BF16")


def test_an_engine_begins_with_the_codes_of_the_learner(policy: Path, tmp_path: Path) -> None:
    config = PolicyConfig(path=str(policy), precision="fp8")
    folder = engine_policy(config, policy, tmp_path / "engine")
    assert saved(folder) == export(fp8_model(policy, config.fp8, CPU))
    again = engine_policy(config, folder, tmp_path / "again")
    assert saved(again) == saved(folder)
    said = json.loads((folder / "config.json").read_text())
    assert said["quantization_config"]["weight_block_size"] == [128, 128]
    left = said["quantization_config"]["modules_to_not_convert"]
    assert "lm_head" in left and all(name.endswith(".mlp.gate") for name in left if name != "lm_head")
    if said["model_type"] == "deepseek_v3":
        assert (said["topk_method"], said["scoring_func"], left) == ("noaux_tc", "sigmoid", ["model.layers.1.mlp.gate", "lm_head"])


def test_a_published_checkpoint_keeps_its_codes_and_its_odd_shapes(tmp_path: Path) -> None:
    """Scales of our own choice, BF16 rest, a layer that transformers does not know, and 576 rows of kv_a_proj_with_mqa."""
    made = policies.tiny_deepseek_v3(tmp_path / "made", seed=3, dtype=torch.bfloat16)
    folder = engine_policy(PolicyConfig(path=str(made), precision="fp8"), made, tmp_path / "published")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"
    assert tensors[name].shape == (576, 128) and tensors[f"{name}_scale_inv"].shape == (5, 1)
    for scale in [n for n in tensors if n.endswith("_scale_inv")]:
        tensors[scale] = tensors[scale] * 0.7371  # as another quantiser might choose them
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert tensors[bias].dtype is torch.float32
    tensors["model.layers.7.enorm.weight"] = torch.ones(128, dtype=torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    model = fp8_model(folder, Fp8Config(), CPU)
    wanted = as_bytes({n: t for n, t in tensors.items() if "layers.7" not in n})
    assert export(model) == wanted
    value = tensors[name].float() * tensors[f"{name}_scale_inv"].repeat_interleave(128, 0)[:576]
    assert torch.equal(model.get_parameter(name), value)
    assert torch.equal(dict(load_model(folder, torch.float32).named_parameters())[name], value)
    one = learner(model)
    step(one)
    assert export(model) != wanted
    # BF16 policies begin from it too, and their engines get BF16
    plain = engine_policy(PolicyConfig(path=str(folder), precision="bf16"), folder, tmp_path / "plain")
    assert load_file(plain / "model.safetensors")[name].dtype is torch.bfloat16
    assert "quantization_config" not in (plain / "config.json").read_text()


def test_another_quantisation_is_refused(tmp_path: Path) -> None:
    folder = policies.tiny_qwen3(tmp_path / "policy", seed=0)
    said = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(said | {"quantization_config": {"quant_method": "awq", "bits": 4}}))
    with pytest.raises(InputError, match=r"is quantised by 'awq' with blocks None; known is fp8 with blocks \[128, 128\]"):
        load_model(folder, torch.float32)


def test_modules_that_the_recipe_keeps_stay_as_they_are(tmp_path: Path) -> None:
    folder = policies.tiny_deepseek_v3(tmp_path / "policy", seed=0)
    model = fp8_model(folder, Fp8Config(keep=["lm_head", "gate", "kv_b_proj", "shared_experts.down_proj"]), CPU)
    kept = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and not isinstance(m, Fp8Linear)}
    assert kept == {
        "lm_head", "model.layers.0.self_attn.kv_b_proj", "model.layers.1.self_attn.kv_b_proj", "model.layers.1.mlp.shared_experts.down_proj"
    }  # fmt: skip
    assert model.get_parameter("model.layers.0.self_attn.kv_b_proj.weight").dtype is torch.bfloat16
    with pytest.raises(InputError, match="leaves nothing of this model to convert"):
        convert(load_model(folder, torch.float32), Fp8Config(keep=["lm_head", "experts", *PROJECTIONS]), CPU)


PROJECTIONS = [
    "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
]  # fmt: skip


def test_with_an_adapter_the_codes_stay_and_what_leaves_is_merged(policy: Path, tmp_path: Path) -> None:
    model = fp8_model(policy, Fp8Config(), CPU, masters="values")
    before = as_bytes({name: codes.of(model.get_parameter(name)).codes for name, codes in coded(model).items()})
    begins_with = engine_policy(PolicyConfig(path=str(policy), precision="fp8", lora=LoraConfig()), policy, tmp_path / "engine")
    add_adapter(model, LoraConfig(rank=4), seed=0)
    one = learner(model)
    start, theirs = export(model), load_file(begins_with / "model.safetensors")
    # by value: a zero of the codes may be negative, and is not after 0 was added
    assert all(torch.equal(t, theirs[n]) for n, t in checkpoint_views(model) if n in theirs) and theirs.keys() <= start.keys()
    assert not any(name.endswith("_scale_inv") for name in start)
    step(one)
    after = {name.replace(".base_layer", ""): codes for name, codes in coded(model).items()}
    assert as_bytes({name: codes.held.codes for name, codes in after.items()}) == before
    assert export(model) != start and {t.dtype for _, t in checkpoint_views(model)} <= {torch.bfloat16, torch.float32}


def test_masters_come_back_to_the_bit(tmp_path: Path) -> None:
    """The trainer's part of a checkpoint holds FP32 masters and BF16 moments; codes follow them."""
    folder = policies.tiny_qwen3_moe(tmp_path / "policy", seed=0)
    one = learner(fp8_model(folder, Fp8Config(), CPU), moments="bf16", betas=(0.9, 0.95))
    step(one)
    state = {name: tensor.clone() for name, tensor in one.state_dict().items()}
    assert state["model.layers.0.mlp.experts.down_proj/weight"].dtype is torch.float32
    assert state["model.layers.0.mlp.experts.down_proj/exp_avg"].dtype is torch.bfloat16
    save_policy(tmp_path / "saved", one.export(), one.model, load_tokenizer(folder))
    two = learner(fp8_model(tmp_path / "saved", Fp8Config(), CPU), moments="bf16", betas=(0.9, 0.95))
    two.optim.steps = one.optim.steps
    for name, tensor in two.state_dict().items():
        tensor.copy_(state[name])
    assert export(two.model) == export(one.model)
    step(one), step(two)
    assert export(two.model) == export(one.model)
    assert all(torch.equal(t, two.state_dict()[name]) for name, t in one.state_dict().items())


def test_bf16_masters_are_rounded_at_random_and_the_same_again(tmp_path: Path) -> None:
    folder = policies.tiny_qwen3(tmp_path / "policy", seed=0)
    ends = []
    for _ in range(2):
        one = learner(fp8_model(folder, Fp8Config(), CPU, master_type=torch.bfloat16), masters="bf16")
        assert {p.dtype for _, p in one.optim.parameters} == {torch.bfloat16} and not any("master" in name for name in one.state_dict())
        step(one), step(one)
        ends.append(export(one.model))
    assert ends[0] == ends[1] and ends[0] != export(fp8_model(folder, Fp8Config(), CPU))


def test_codes_and_scales_that_arrive_apart_become_values() -> None:
    torch.manual_seed(0)
    held = {name: quantize(torch.randn(200, 300), SQUARE) for name in ("a.weight", "b.weight")}
    a, b = held.values()
    norm = torch.ones(3, dtype=torch.bfloat16)
    decoder = Decoder(torch.bfloat16)
    came = dict(decoder.values([("b.weight_scale_inv", b.scales), ("a.weight", a.codes), ("norm.weight", norm)]))
    assert came == {"norm.weight": norm}
    came = dict(decoder.values([("a.weight_scale_inv", a.scales), ("b.weight", b.codes)]))
    decoder.end()
    assert list(came) == ["a.weight", "b.weight"]
    assert all(torch.equal(came[name], held[name].dequantize(torch.bfloat16)) for name in held)


def test_codes_without_scales_are_an_error() -> None:
    held = quantize(torch.randn(128, 256), SQUARE)
    decoder = Decoder(torch.bfloat16)
    list(decoder.values([("a.weight", held.codes)]))
    with pytest.raises(ValueError, match=r"a\.weight came without its scales; send `weight` and `weight_scale_inv` in one update"):
        decoder.end()
    decoder.end()  # the next update begins anew
    with pytest.raises(ValueError, match=r"a\.weight_scale_inv has shape \(2, 1\), but a\.weight in 128x128 blocks needs \(1, 2\)"):
        list(decoder.values([("a.weight", held.codes), ("a.weight_scale_inv", held.scales.T)]))
