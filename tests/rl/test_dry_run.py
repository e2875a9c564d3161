"""`--dry-run` and its estimate: every recipe passes offline, and each number is one that can be had by hand."""

import json
import socket
import sys
from collections import namedtuple
from itertools import pairwise
from pathlib import Path
from typing import Any

import made
import policies
import pytest
import torch
import transformers
import yaml

import rl.train
import sft.table
import sft.train
from data.recipe import InputError, parse
from rl.advantage import group_advantage
from rl.attention import layout_of
from rl.config import AdvantageConfig, LossConfig, TrainRecipe
from rl.estimate import GB, KEPT, Machine, Place, colocated_share, learner_ranks, pass_tokens, places
from rl.policy import DTYPES
from rl.sizes import sizes_of

CHECKOUT = Path(__file__).resolve().parents[2]
QWEN3_30B = CHECKOUT / "recipes" / "configs" / "qwen3_30b_a3b.json"
RECIPES = [path for path in sorted((CHECKOUT / "recipes").glob("*.yaml")) if "compute_environment" not in yaml.safe_load(path.read_text())]


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the recipes and nothing else, no network, and no way to read weights."""
    (tmp_path / "recipes").symlink_to(CHECKOUT / "recipes")
    monkeypatch.chdir(tmp_path)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a dry run reads no weights and needs no network")

    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    return tmp_path


def dry_run(monkeypatch: pytest.MonkeyPatch, module: Any, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["command", *arguments, "--dry-run"])
    return module.main()


def gsm8k(**changes: Any) -> TrainRecipe:
    values = yaml.safe_load((CHECKOUT / "recipes" / "gsm8k_8gpu.yaml").read_text())
    values["learner"]["lr"] = float(values["learner"]["lr"])
    for key, value in changes.items():
        section, _, name = key.partition("__")
        values[section][name] = value
    return parse(values, TrainRecipe, "test")


EIGHT = Machine(gpus=8, gpu_bytes=80 * GB, nodes=1, ram_bytes=0, ranks=1)


def parts(place: Place) -> dict[str, float]:
    return {part.name: part.bytes for part in place.parts}


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_dry_runs_offline_in_a_fresh_checkout(
    path: Path, fresh: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = rl.train if "rewards" in yaml.safe_load(path.read_text()) else sft.train
    assert dry_run(monkeypatch, module, f"recipes/{path.name}") == 0
    assert sorted(entry.name for entry in fresh.iterdir()) == ["recipes"], "a dry run leaves nothing"
    assert f"name: {path.stem}" in capsys.readouterr().out


def test_what_is_not_there_yet_is_listed_with_the_command_that_makes_it(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert dry_run(monkeypatch, rl.train, "recipes/quickstart.yaml", "eval.prompts={path: later.jsonl}") == 0
    out = capsys.readouterr().out
    assert (
        "policy.path: no folder 'outputs/quickstart_sft/final'; made by: accelerate launch -m sft.train recipes/quickstart_sft.yaml" in out
    )
    assert f"eval.prompts.path: no file 'later.jsonl'; paths are relative to the working folder, {fresh}" in out
    assert "prompts: 7,113 rows from task arithmetic" in out


def test_a_mistake_in_the_inputs_is_one_line_and_exit_code_2(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (fresh / "prompts.jsonl").write_text('{"prompt": "1+1="}\n{"prompt": \n')
    assert dry_run(monkeypatch, rl.train, "recipes/quickstart.yaml", "prompts={path: prompts.jsonl}") == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("prompts.jsonl:2: not valid JSON") and captured.err.count("\n") == 1
    assert not captured.out


@pytest.mark.parametrize(
    ("module", "recipe", "said"),
    [
        (sft.train, "5_final", "data: no file 'outputs/pipeline_curate/curated/train.parquet'; made by: python -m sft.curate"),
        (sft.table, "6_table", "policies: no folder 'outputs/pipeline_final/final'; made by: accelerate launch -m sft.train"),
    ],
)
def test_what_the_pipeline_makes_later_is_not_there_yet(
    module: Any, recipe: str, said: str, fresh: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert dry_run(monkeypatch, module, f"recipes/pipeline/{recipe}.yaml") == 0
    assert said in capsys.readouterr().out


SHARDED = {"ACCELERATE_USE_FSDP": "true"}
REFUSED: dict[str, tuple[str, list[str], dict[str, str], str]] = {
    "prompts without what the reward judges by": (
        "quickstart", ["policy.path=./policy", "prompts={path: rows.jsonl}"], {},
        "rewards.parts: math_answer judges by answer or solution, and no prompt has either",
    ),
    "a conversation that is no async function": (
        "tool", ["rollout.conversation=./talk.py:talk"], {}, "rollout.conversation: ./talk.py:talk is no async function",
    ),
    "routes of vLLM on a CPU": ("quickstart_dsv3", ["loss.replay=rollout"], {}, "loss.replay: vLLM returns the experts it chose on a GPU"),
    "an adapter with FSDP": ("quickstart", ["policy.lora={rank: 4}"], SHARDED, "policy.lora: adapters with FSDP are not there yet"),
    "BF16 masters with FSDP": (
        "quickstart", ["policy.precision=bf16", "learner.optimizer.masters=bf16"], SHARDED, "learner.optimizer.masters: what FSDP shards",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_run_would_refuse_a_dry_run_does(
    case: str, fresh: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, changes, environment, said = REFUSED[case]
    (fresh / "talk.py").write_text("def talk(generate, prompt):\n    return []\n")
    (fresh / "rows.jsonl").write_text('{"prompt": "1+2=", "result": "3"}\n')
    policies.tiny_qwen3_moe(fresh / "policy", seed=0)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert dry_run(monkeypatch, rl.train, f"recipes/{recipe}.yaml", *changes) == 2
    assert capsys.readouterr().err.startswith(said)


def test_with_a_policy_prompts_are_counted_in_its_tokens(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    policies.tiny_qwen3_moe(fresh / "policy", seed=0)
    rows = [{"prompt": "12=", "answer": "3"}, {"prompt": "3456=", "answer": "18"}]
    (fresh / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = ["policy.path=./policy", "prompts={path: prompts.jsonl}", "eval.prompts=null", "rollout.engine=hf"]
    assert dry_run(monkeypatch, rl.train, "recipes/quickstart.yaml", *changes) == 0
    out = capsys.readouterr().out
    assert "prompts: 2 from prompts.jsonl, the longest of 5 tokens" in out
    assert '"3456="  (5 tokens)  answer "18"' in out
    assert "a step: 32 prompts x 8 = 256 completions, at most 256 x 48 = 12,288 tokens sampled" in out
    # A group: 5 prompt tokens, and 47 of each of 8 completions.
    assert "a group has at most 381 tokens, a pass 3,048" in out
    assert "no input is missing" in out and "memory: fits" in out


def test_a_recipe_that_cannot_fit_says_by_how_much(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert dry_run(monkeypatch, rl.train, "recipes/gsm8k_8gpu.yaml") == 0
    assert "memory: fits" in capsys.readouterr().out
    assert dry_run(monkeypatch, rl.train, "recipes/gsm8k_8gpu.yaml", "hardware.gpus=6") == 0
    out = capsys.readouterr().out
    assert "does not fit, 7.26 GB too much" in out and "memory: does not fit; what helps: more GPUs" in out
    assert dry_run(monkeypatch, rl.train, "recipes/gsm8k_8gpu.yaml", "rollout.engines=8") == 0
    assert "memory: does not fit: rollout: 8 engines on 1 GPUs each leave none of 8 to the learner" in capsys.readouterr().out
    assert dry_run(monkeypatch, rl.train, "recipes/gsm8k_8gpu.yaml", "rollout.engines=5", "rollout.tensor_parallel=2") == 2
    assert "need 10 GPUs, and there are 8; lower one of the two" in capsys.readouterr().err


def test_deepseek_v3_says_what_it_lacks(fresh: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert dry_run(monkeypatch, rl.train, "recipes/deepseek_v3_512gpu.yaml") == 0
    out = capsys.readouterr().out
    assert "256 of 512 GPUs learn" in out and "together                   127.816 GB   does not fit, 47.82 GB too much" in out
    assert "256 of 512 GPUs sample" in out and "fits, 1.75 GB are left" in out
    assert (
        "experts spread over 8 GPUs, 1.51 GB would be left on each that learns: transformers has that (DistributedConfig(ep_size=8))" in out
    )
    assert "time: 393 s a step" in out and "16.10 TB of weights and gradients through each GPU" in out


# --- sizes ------------------------------------------------------------------------------------------------------------


def test_parameters_of_qwen3_30b_a3b_by_hand() -> None:
    hidden, vocabulary, layers, experts, chosen, width = 2048, 151936, 48, 128, 8, 768
    attention = hidden * (32 * 128) * 2 + hidden * (4 * 128) * 2 + 2 * 128
    around = attention + hidden * experts + 2 * hidden
    outside = 2 * vocabulary * hidden + hidden
    sizes = sizes_of(QWEN3_30B)
    assert sizes.total == outside + layers * (around + experts * 3 * hidden * width) == 30_532_122_624
    assert sizes.active == outside + layers * (around + chosen * 3 * hidden * width) == 3_353_032_704
    # The model card says 30.5B and 3.3B.
    assert abs(sizes.total / 30.5e9 - 1) < 0.01
    assert abs(sizes.active / 3.3e9 - 1) < 0.02
    assert (sizes.layers, sizes.root, sizes.context) == (layers, outside, 40960)
    assert sizes.kv_token == 2 * 4 * 128 * layers


def test_mla_keeps_latents_and_a_dense_layer_has_no_experts(tmp_path: Path) -> None:
    sizes = sizes_of(policies.tiny_deepseek_v3(tmp_path / "policy", seed=0, layers=3) / "config.json")
    assert (sizes.kv_token, sizes.kv_split) == ((512 + 64) * 3, 1)
    # 2 of 8 experts in each of two MoE layers, each of three matrices of 128 x 128.
    assert sizes.total - sizes.active == 2 * 6 * 3 * 128 * 128


def test_a_file_that_is_no_config_is_a_mistake_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "no_such_model"}')
    with pytest.raises(InputError, match="no config of a model") as caught:
        sizes_of(tmp_path / "config.json")
    assert "\n" not in str(caught.value)


# --- memory -----------------------------------------------------------------------------------------------------------


def test_parts_of_a_learner_gpu_add_up_by_hand() -> None:
    recipe, sizes = gsm8k(), sizes_of(QWEN3_30B)
    learner, engine = places(recipe, sizes, EIGHT, 1408)
    assert (learner_ranks(recipe, EIGHT), learner.room_bytes, engine.room_bytes) == (7, 80 * GB, pytest.approx(0.92 * 80 * GB))
    found = parts(learner)
    # FSDP2 keeps masters alone; a layer's BF16 weights are made of them where it is gathered.
    state = [found.pop(name) for name in ("weights, fp32 masters", "gradients, fp32", "two moments, bf16")]
    assert sum(state) == pytest.approx((4 + 4 + 2 + 2) * 30_532_122_624 / 7)
    layer = (30_532_122_624 - sizes.root) / 48
    assert found.pop("gathered") == pytest.approx(2 * (2 * sizes.root + 3 * layer))
    tokens = 384 + 8 * 1023  # the longest group; micro_tokens is less
    assert found.pop("layer inputs") == 4 * tokens * 2048 * 48
    # Of a token: queries, keys, values, what comes out; norms; router; and of 8 experts gate and up, their product, down.
    outputs = 4096 + 512 + 512 + 2048 + (2 * 128 + 2 * 2048) + 128 + 8 * (2 * 768 + 768 + 2048)
    assert found.pop("activations") == found.pop("gradients of activations") == pytest.approx(KEPT["bf16"] * 2 * tokens * outputs)
    assert found.pop("output head") == 6 * 4 * 2**24
    assert not found
    assert learner.used_bytes == pytest.approx(sum(part.bytes for part in learner.parts))
    assert learner.left_bytes == pytest.approx(80 * GB - learner.used_bytes)


def test_parts_of_an_engine_gpu_add_up_by_hand() -> None:
    _, engine = places(gsm8k(rollout__slots=16), sizes_of(QWEN3_30B), EIGHT, 1400)
    found = parts(engine)
    assert found["weights"] == 2 * 30_532_122_624
    assert found["KV cache"] == 16 * 1408 * 2 * 2 * 4 * 128 * 48, "whole blocks of 16 tokens"


def test_fp32_moments_do_not_fit_and_checkpointing_is_needed() -> None:
    sizes = sizes_of(QWEN3_30B)
    left = places(gsm8k(), sizes, EIGHT, 1408)[0].left_bytes
    fp32 = places(gsm8k(learner__optimizer={"moments": "fp32"}), sizes, EIGHT, 1408)[0].left_bytes
    assert left - fp32 == pytest.approx(4 * 30_532_122_624 / 7) and fp32 < 0 < left
    assert places(gsm8k(policy__activation_checkpointing=False), sizes, EIGHT, 1408)[0].left_bytes < 0


def test_an_adapter_has_state_and_frozen_weights_have_none() -> None:
    lora = {"rank": 8, "targets": ["q_proj", "v_proj"]}
    recipe = gsm8k(policy__lora=lora, loss__kl_coef=0.1)
    sizes = sizes_of(QWEN3_30B, recipe.policy.lora)
    assert sizes.adapter == 48 * 8 * ((2048 + 4096) + (2048 + 512))
    found = parts(places(recipe, sizes, EIGHT, 1408)[0])
    assert found["weights, bf16"] == 2 * sizes.total / 7
    assert found["adapter, fp32"] + found["gradients, fp32"] + found["two moments, bf16"] == (4 + 4 + 4) * sizes.adapter / 7
    assert "masters, fp32" not in found and "reference" not in found


def test_masters_are_what_the_optimizer_keeps() -> None:
    one, sizes = Machine(gpus=2, gpu_bytes=80 * GB, nodes=1, ram_bytes=0, ranks=1), sizes_of(QWEN3_30B)
    found = {
        masters: parts(places(gsm8k(learner__optimizer={"masters": masters}), sizes, one, 1408)[0]) for masters in ("fp32", "bf16")
    }  # fmt: skip
    assert found["fp32"]["masters, fp32"] == 4 * sizes.total
    assert "masters, bf16" not in found["bf16"], "BF16 weights are their own"
    eight = parts(places(gsm8k(policy__precision="fp8", learner__optimizer={"masters": "bf16"}), sizes, one, 1408)[0])
    assert eight["masters, bf16"] == 2 * sizes.total


def test_a_kl_term_keeps_a_reference_unless_there_is_an_adapter() -> None:
    sizes = sizes_of(QWEN3_30B)
    found = parts(places(gsm8k(loss__kl_coef=0.1), sizes, EIGHT, 1408)[0])
    assert found["reference"] == 4 * sizes.total / 7, "sharded like the policy, as FP32"


def test_engines_split_weights_and_leave_fewer_gpus_to_the_learner() -> None:
    recipe = gsm8k(rollout__engines=2, rollout__tensor_parallel=2)
    learner, engine = places(recipe, sizes_of(QWEN3_30B), EIGHT, 1408)
    assert learner_ranks(recipe, EIGHT) == 4
    assert parts(learner)["weights, fp32 masters"] == 4 * 30_532_122_624 / 4
    assert parts(engine)["weights"] == 30_532_122_624
    assert "4 of 8 GPUs sample" in engine.name


def test_on_a_cpu_every_rank_holds_the_whole_learner(tmp_path: Path) -> None:
    sizes = sizes_of(policies.tiny_qwen3_moe(tmp_path / "policy", seed=0) / "config.json")
    recipe = gsm8k(policy__precision="fp32", learner__optimizer={"moments": "fp32"})
    one, two = (places(recipe, sizes, Machine(0, 0, 1, 16 * GB, ranks), 1408)[0] for ranks in (1, 2))
    assert parts(one)["weights, fp32"] + parts(one)["gradients, fp32"] + parts(one)["two moments, fp32"] == 16 * sizes.total
    shared = sum(part.bytes for part in one.parts if part.name.startswith("engines") or part.name == "weight file")
    assert two.used_bytes - shared == pytest.approx(2 * (one.used_bytes - shared))
    assert "gathered" not in parts(one) and "attention scores" not in parts(one)


def test_in_turns_a_gpu_holds_engine_and_learner_and_the_optimizer_goes_where_it_has_to() -> None:
    n = 30_532_122_624
    sizes = sizes_of(QWEN3_30B)

    def turns(share: float, **moments: str) -> tuple[Place, Place]:
        recipe = gsm8k(
            rollout__placement="colocate", rollout__weights="file", rollout__engines=4, rollout__tensor_parallel=2,
            rollout__gpu_memory_utilization=share, learner__optimizer=moments,
        )  # fmt: skip
        assert learner_ranks(recipe, EIGHT) == 8
        learning, engine, sampling = places(recipe, sizes, EIGHT, 1408)
        assert parts(engine)["weights"] == 2 * n / 2 and engine.room_bytes == parts(sampling)["engine: its share"] == share * 80 * GB
        return learning, sampling

    learning, sampling = turns(0.55, moments="fp32")
    assert "30.53 GB of optimizer state are in host memory" in sampling.name
    found = parts(sampling)
    assert found["learner: weights, fp32 masters"] == 4 * n / 8 and not any("moments" in name for name in found)
    assert sampling.left_bytes == pytest.approx((1 - 0.55) * 80 * GB - 4 * n / 8 - 6 * 128 * 1536 * 2048 - 3 * GB)
    assert parts(learning)["two moments, fp32"] == 8 * n / 8 and "two processes" in parts(learning)

    stays = turns(0.55, moments="bf16", betas=(0.9, 0.95))[1]  # type: ignore[arg-type]
    assert "the optimizer's state stays" in stays.name and parts(stays)["learner: two moments, bf16"] == 4 * n / 8
    assert turns(0.8, moments="fp32")[1].left_bytes < 0, "masters and engine do not fit beside each other"


def test_the_share_of_an_engine_in_turns_lies_between_its_weights_and_the_learners() -> None:
    sizes, recipe = sizes_of(QWEN3_30B), gsm8k(rollout__engines=4, rollout__tensor_parallel=2, rollout__slots=1)
    shares = colocated_share(recipe, sizes, EIGHT, 1408)
    assert shares is not None
    least, most = shares
    for share, fits in ((least - 0.001, False), (least + 0.001, True), (most - 0.001, True), (most + 0.001, False)):
        turns = gsm8k(
            rollout__engines=4, rollout__tensor_parallel=2, rollout__placement="colocate", rollout__weights="file",
            rollout__gpu_memory_utilization=share, rollout__slots=1,
        )  # fmt: skip
        assert all(place.left_bytes >= 0 for place in places(turns, sizes, EIGHT, 1408)) == fits, share
    assert colocated_share(gsm8k(rollout__engines=1), sizes, EIGHT, 1408) is None, (
        "the weights of an engine and masters are too much for one"
    )


def test_a_pass_is_as_long_as_its_longest_group_or_micro_tokens() -> None:
    # 100 prompt tokens and 8 x 9 of completions: 172.
    assert pass_tokens(gsm8k(rollout__max_tokens=10, learner__micro_tokens=1000), 110) == (172, 1000)
    assert pass_tokens(gsm8k(rollout__max_tokens=10, learner__micro_tokens=100), 110) == (172, 172)
    few = gsm8k(rollout__max_tokens=10, learner__micro_tokens=1000, learner__prompts_per_step=4, learner__steps_per_batch=2)
    assert pass_tokens(few, 110) == (172, 344), "two groups for each optimizer step"


def kept_bytes(policy: Path, dtype: torch.dtype) -> tuple[int, int]:
    """What autograd keeps of a pass, parameters aside, and the tokens of the pass."""
    groups = made.make_groups([[1, 0, 0, 1] * 2] * 6)
    learner = made.make_learner(policy, LossConfig(), dtype=dtype)
    batch = next(iter(learner.batches(groups, group_advantage(groups, AdvantageConfig()))))[0]
    parameters = {p.untyped_storage().data_ptr() for p in learner.model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        learner.model.get_decoder()(
            input_ids=batch.tokens_T[None], position_ids=batch.position_T[None], use_cache=False, cohort=layout_of(batch)
        )
    return sum(t.untyped_storage().nbytes() for place, t in kept.items() if place not in parameters), len(batch.tokens_T)


@pytest.mark.parametrize("kind", ["qwen3_moe", "deepseek_v3"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_activations_are_what_autograd_keeps(kind: str, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(made, "MAX_TOKENS", 150)
    monkeypatch.setattr("torch.promote_types", lambda kind, other: kind)  # as on a GPU, where attention's core is in BF16 as well
    found, dtype = [], DTYPES[precision]
    for layers in (2, 4):
        policy = getattr(policies, f"tiny_{kind}")(tmp_path / str(layers), seed=0, layers=layers)
        kept, tokens = kept_bytes(policy, dtype)
        found.append((kept / tokens, sizes_of(policy / "config.json").kept_layers))
    ((kept_2, counted_2), (kept_4, counted_4)) = next(pairwise(found))
    factor = (kept_4 - kept_2) / (counted_4 - counted_2) / dtype.itemsize
    assert 0.8 * KEPT[precision] < factor < 1.01 * KEPT[precision], factor


def test_the_shared_memory_of_weight_updates_is_the_policy_in_its_precision(fresh: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    total = sizes_of(QWEN3_30B, None).total
    there = f"weight file: {2 * total / GB:.3f} GB of shared memory, through which updates reach the engines"
    assert dry_run(monkeypatch, rl.train, "recipes/gsm8k_8gpu.yaml") == 0
    assert "shared memory" not in capsys.readouterr().out, "NCCL needs none"
    assert dry_run(monkeypatch, rl.train, "recipes/gsm8k_8gpu.yaml", "rollout.weights=file") == 0
    assert f"{there}; /dev/shm has to hold it\n" in capsys.readouterr().out

    usage = namedtuple("usage", "total used free")
    for free, verdict in ((3 * total, "fits: "), (total, "does not fit: ")):
        monkeypatch.setattr("shutil.disk_usage", lambda place, free=free: usage(0, 0, free))
        assert dry_run(monkeypatch, rl.train, "recipes/gsm8k_8gpu.yaml", "hardware=null", "rollout.weights=file") == 0
        said = capsys.readouterr().out
        assert f"{there}; {verdict}" in said and f"/dev/shm has {free / GB:.2f} GB" in said
        assert ("enlarge /dev/shm" in said) == (free == total)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_an_option_may_stand_before_between_and_after_overrides(place: int, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    arguments = ["recipes/gsm8k_8gpu.yaml", "learner.steps=3", "run.seed=9"]
    arguments.insert(place + 1, "--dry-run")
    monkeypatch.setattr(sys, "argv", ["command", *arguments])
    assert rl.train.main() == 0
    said = capsys.readouterr().out
    assert "steps: 3\n" in said and "seed: 9\n" in said
