"""The time estimate against what NeMo-RL publishes, with one set of rates for all; and by hand.

Published: docs/about/performance-summary.md of NVIDIA-NeMo/RL, v0.6, "H100 BF16 Benchmarks"; settings from the recipes it names
(examples/configs/recipes/llm/performance/grpo-{deepseek-v3-64n8g,qwen3-30ba3b-4n8g}{,-async-1off}.yaml and grpo_math_1B.yaml).
"""

from dataclasses import replace
from math import ceil
from pathlib import Path

import pytest
from torch.distributed.pipelining import ScheduleDualPipeV
from transformers import DistributedConfig
from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config

from rl.sizes import Sizes, sizes_of
from rl.step_time import H100, Work, step_time

CONFIGS = Path(__file__).resolve().parents[2] / "recipes" / "configs"
PROMPT = 105
"""Not published: what tokens / sec / GPU x GPUs x seconds / completions gives beyond the mean completion, 103 to 106 on-policy."""


@pytest.fixture(scope="module")
def deepseek() -> Sizes:
    return sizes_of(CONFIGS / "deepseek_v3.json")


@pytest.fixture(scope="module")
def qwen() -> Sizes:
    return sizes_of(CONFIGS / "qwen3_30b_a3b.json")


def deepseek_v3(sampled: float, gpus: int, ahead: bool) -> Work:
    """32 prompts x 16, 1,536 tokens at most, BF16. Engines of 32 GPUs; PP 16, EP 16, activations computed again, a reference (KL .01)."""
    learned = 512 * (PROMPT + sampled)
    return Work(
        completions=512, group_size=16, prompt=PROMPT, sampled=sampled, longest=1536 - PROMPT, gpus_a_node=8,
        engines=gpus // 32, slots=256, tensor_parallel=32, weight_bytes=2, element_bytes=2,
        learner_gpus=gpus, learned=learned, forwards=3 + 1 + 1 + 1, expert_parallel=16, stages=16,
        passes_in_flight=ceil(learned / (gpus // 16) / 1536), sync_rate=H100.between, ahead=ahead,
    )  # fmt: skip


def qwen3_30b(sampled: float, gpus: int, stages: int, ahead: bool) -> Work:
    """64 prompts x 32 in four updates, 4,096 tokens at most, BF16. Engines of 2 GPUs; EP 8, a reference (KL .01)."""
    learned = 2048 * (PROMPT + sampled)
    return Work(
        completions=2048, group_size=32, prompt=PROMPT, sampled=sampled, longest=4096 - PROMPT, gpus_a_node=8,
        engines=gpus // 2, slots=256, tensor_parallel=2, weight_bytes=2, element_bytes=2,
        learner_gpus=gpus, learned=learned, forwards=3 + 1 + 1, expert_parallel=8, stages=stages,
        passes_in_flight=ceil(learned / 4 / (gpus // stages) / 4096), sync_rate=H100.between if ahead else H100.within, ahead=ahead,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("model", "work", "estimated", "published"),
    [
        ("deepseek", deepseek_v3(697, 512, False), 53.4, 111),
        ("deepseek", deepseek_v3(710, 256, True), 53.8, 64.1),
        ("qwen", qwen3_30b(3203, 32, 1, False), 127.3, 192),
        ("qwen", qwen3_30b(3201, 16, 2, True), 100.3, 152),
    ],
    ids=[
        "DeepSeek-V3 on-policy, 512",
        "DeepSeek-V3 one off, 256 and 256",
        "Qwen3-30B-A3B on-policy, 32",
        "Qwen3-30B-A3B one off, 16 and 16",
    ],
)
def test_the_estimate_of_published_steps_is_what_the_recipes_state(
    model: str, work: Work, estimated: float, published: float, request: pytest.FixtureRequest
) -> None:
    found = step_time(work, request.getfixturevalue(model)).total_s
    assert found == pytest.approx(estimated, abs=0.06)
    assert 1.19 < published / found < 2.08, "what `--dry-run` says of it"


def test_phases_add_up_by_hand(qwen: Sizes) -> None:
    work = replace(
        qwen3_30b(3203, 32, 1, False), engines=8, slots=100, tensor_parallel=4, longest=1000.0, sampled=1000.0, completions=1600,
        learned=1e6, expert_parallel=1, offloaded_bytes=25e9, sync_rate=10e9,
    )  # fmt: skip
    found = step_time(work, qwen)
    times = {term.name: term.seconds for term in (*found.rollout, *found.learn, *found.sync)}
    # 200 completions an engine, 100 at once: twice 1,000 steps. All experts are met; half of 1,000 tokens and the prompt are read.
    met = 1 - (1 - 8 / 128) ** 100
    read = 2 * (qwen.total - 28_991_029_248 * (1 - met)) / 4 + 100 * (105 + 500) * 2 * 4 * 128 * 48 * 2 / 4
    assert times["decoding"] == pytest.approx(2000 * read / (3.35e12 * 0.7))
    assert times["joins and host"] == pytest.approx(2000 * (2 * 48 * 10e-6 + 2e-3))
    attention = 48 * 32 * (128 + 128)
    assert times["arithmetic"] == pytest.approx(1e6 * 5 * (2 * 3_353_032_704 + 2 * attention * 1105 / 2) / (32 * 0.2 * 989e12))
    assert times["weights"] == pytest.approx(2 * qwen.total / 10e9) and times["optimizer to host and back"] == 2.0
    assert found.total_s == pytest.approx(sum(times.values()))
    ahead = step_time(replace(work, ahead=True), qwen)
    assert ahead.total_s == pytest.approx(max(found.rollout_s, found.learn_s) + found.sync_s)


def test_fsdp_gathers_what_arithmetic_does_not_hide(deepseek: Sizes) -> None:
    work = replace(deepseek_v3(697, 256, False), stages=1, expert_parallel=1, trained_passes=2, other_passes=1)
    learn = step_time(work, deepseek).learn
    times = {term.name: term.seconds for term in learn}
    assert sum(times.values()) == pytest.approx((2 * (2 + 2 + 4) + 2) * 671_026_404_352 / 50e9)


def test_parameters_of_deepseek_v3_are_the_published_ones(deepseek: Sizes) -> None:
    """671B, 37B a token (arXiv:2412.19437, section 4.2), by hand from its widths; latents of 576 a token and layer."""
    d, experts, layers = 7168, 256, 61
    attention = d * 1536 + 1536 + 1536 * 128 * 192 + d * 576 + 512 + 512 * 128 * 256 + 128 * 128 * d + 2 * d
    expert = 3 * d * 2048
    moe = attention + (experts + 1) * expert + experts * d
    outside = 2 * 129280 * d + d
    total = outside + 3 * (attention + 3 * d * 18432) + 58 * moe
    assert deepseek.total == total and abs(total / 671e9 - 1) < 1e-3
    assert deepseek.active == total - 58 * (experts - 8) * expert and abs(deepseek.active / 37e9 - 1) < 0.02
    assert (deepseek.routed, deepseek.expert_layer, deepseek.expert_layers) == (58 * experts * expert, experts * expert, 58)
    assert (deepseek.kv_token, deepseek.attention) == (576 * layers, layers * 128 * (192 + 128))


def test_what_the_512_gpu_recipe_names_is_there() -> None:
    assert DistributedConfig(fsdp_size=32, ep_size=32, ep_plan={"layers.*.mlp.experts": "ep_dispatch_experts"}).efsdp_size == 1
    assert DeepseekV3Config.base_model_ep_plan and ScheduleDualPipeV.__doc__
    with pytest.raises(ValueError, match="FSDP with pipeline parallelism is not supported"):
        DistributedConfig(fsdp_size=2, pp_size=2)
