"""vLLM against the learner: log-probs of the same tokens under the same weights, whatever the architecture and the precision.

In FP32 both compute the same to rounding. In BF16 they may differ by what BF16 itself costs: the yardstick is transformers in BF16
against transformers in FP32, on the same tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Literal

import numpy as np
import policies
import pytest
import torch
from made import deepseek_v3_with_module, make_learner
from transformers import AutoModelForCausalLM

pytest.importorskip("vllm", reason="vllm is not installed: `make install`")

from data.values import Completion, Group, Prompt, Score
from rl.batch import items_of, pack
from rl.config import LossConfig, PolicyConfig, RolloutConfig
from rl.engines.base import Event, Finished, Pulse, Request, Sampling
from rl.engines.make import make_engines
from rl.engines.repairs import cpu_repairs
from rl.engines.vllm import VllmEngine
from rl.engines.weights import read_manifest
from rl.learner import Learner
from rl.sync import WeightSync

PROMPTS = [[2, 3, 4], [5, 6, 7, 8, 9, 10], [11, 12], [12, 13] * 70]
PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def plain_rope(path: Path, *, seed: int, dtype: torch.dtype) -> Path:
    """Under which vLLM's own settings are wrong by 0.04 on a CPU."""
    return deepseek_v3_with_module(path, seed=seed, dtype=dtype, rope_parameters=PLAIN_ROPE)


CASES: dict[str, tuple[Callable[..., Path], Literal["fp32", "bf16"]]] = {
    "qwen3-fp32": (policies.tiny_qwen3, "fp32"),
    "qwen3_moe-bf16": (policies.tiny_qwen3_moe, "bf16"),
    "deepseek_v3-fp32": (plain_rope, "fp32"),
    "deepseek_v3-bf16": (deepseek_v3_with_module, "bf16"),
}
"""Qwen3-MoE in fp32 is what `test_vllm_engine` is about. DeepSeek-V3 comes with its module, which vLLM is sent and leaves aside."""


@dataclass
class Sampled:
    """Completions of one prompt."""

    prompt: list[int]
    completions: list[Completion]


class Engine:
    """One engine that `make_engines` gives for a recipe, and what was said of it."""

    def __init__(self, policy: Path, precision: Literal["fp32", "bf16"], logs: Path) -> None:
        self.said: list[str] = []
        rollout, config = RolloutConfig(slots=16), PolicyConfig(path=str(policy), precision=precision)
        (self.engine,) = make_engines(rollout, config, policy, 256, logs, say=self.said.append)
        assert isinstance(self.engine, VllmEngine)
        self.mailbox: SimpleQueue[Event] = SimpleQueue()
        self.engine.start(self.mailbox)

    def sample(self, prompts: Sequence[list[int]], each: int, max_tokens: int, *, alone: bool = False) -> list[Sampled]:
        """`alone`: one completion after the other; else all in one batch."""
        found = [Sampled(prompt, []) for prompt in prompts]
        requests = [
            Request(f"p{p}", f"g{p}", 0, i, 1000 * p + i, np.array(prompt, np.int32), Sampling(max_tokens))
            for p, prompt in enumerate(prompts)
            for i in range(each)
        ]
        for batch in [[request] for request in requests] if alone else [requests]:
            for request in batch:
                self.engine.submit([request])
            for _ in batch:
                while isinstance(event := self.mailbox.get(timeout=60), Pulse):
                    pass
                assert isinstance(event, Finished), event
                found[int(event.completion.prompt_id[1:])].completions.append(event.completion)
        return found

    def everything(self) -> dict[str, list[Sampled]]:
        """Decoded in a batch and alone; and prefilled: the token after each beginning of what was decoded, likewise."""
        decoded = self.sample(PROMPTS, 4, 24)
        begun = [[*s.prompt, *c.token_ids[:cut].tolist()] for s in decoded for c in s.completions for cut in range(len(c.token_ids))]
        return {
            "decode, batch": decoded,
            "decode, alone": self.sample(PROMPTS, 2, 24, alone=True),
            "prefill, batch": self.sample(begun, 1, 1),
            "prefill, alone": self.sample(begun[::4], 1, 1, alone=True),
        }


def learner_distance(learner: Learner, sampled: list[Sampled]) -> float:
    """Mean |d log-prob| between the engine and the learner, whose batch is packed and shares prompts."""
    groups = [
        Group(f"g{n}", Prompt(f"p{n}", "", "", np.array(s.prompt, np.int32)), 0, tuple(s.completions), (Score(1.0),) * len(s.completions))
        for n, s in enumerate(sampled)
    ]
    work, normaliser = items_of(groups, torch.ones(len(groups), len(sampled[0].completions)), False, skip_zero=False)
    batch = pack(work, normaliser, temperature=1.0, max_tokens=24)
    logp_N, _ = learner._logp(learner.model, batch, grad=False)
    return float((logp_N.double() - batch.engine_logp_N.double()).abs().mean())


def noise_of_bf16(policy: Path, sampled: list[Sampled]) -> float:
    """Mean |d log-prob| of the same tokens between transformers in BF16 and in FP32, row by row."""
    models = [AutoModelForCausalLM.from_pretrained(policy, dtype=dtype).eval() for dtype in PRECISIONS.values()]
    found = []
    for s in sampled:
        for c in s.completions:
            ids = torch.tensor([*s.prompt, *c.token_ids.tolist()])
            with torch.no_grad():
                rows = [model(ids[None, :-1]).logits[0].float().log_softmax(-1) for model in models]
            one, other = (row.gather(1, ids[1:, None])[len(s.prompt) - 1 :, 0] for row in rows)
            found.append((one - other).abs())
    return float(torch.cat(found).mean())


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_engine_agrees_with_the_learner_before_and_after_a_sync(case: str, tmp_path: Path) -> None:
    make, precision = CASES[case]
    old, new = (make(tmp_path / name, seed=seed, dtype=PRECISIONS[precision]) for seed, name in enumerate(("old", "new")))
    one = Engine(old, precision, tmp_path / "logs")
    sync = WeightSync([one.engine], read_manifest(old))
    try:
        found = {"old": one.everything()}
        learner = make_learner(new, LossConfig(), dtype=PRECISIONS[precision])
        sync.push(learner, version=1)
        found["new"] = one.everything()
    finally:
        one.engine.close()
        sync.close()
    before = make_learner(old, LossConfig(), dtype=PRECISIONS[precision])
    for policy, of, weights in ((before, "old", old), (learner, "new", new)):
        noise = noise_of_bf16(weights, found[of]["decode, batch"]) if precision == "bf16" else 0.0
        bound = 2 * noise if precision == "bf16" else 1e-5
        distances = {how: learner_distance(policy, sampled) for how, sampled in found[of].items()}
        print(f"{case}, {of} weights: {', '.join(f'{how} {d:.2e}' for how, d in distances.items())}; bound {bound:.2e}")
        assert all(distance < bound for distance in distances.values()), distances
    assert learner_distance(before, found["new"]["decode, batch"]) > 0.05, "the weights did not change"
    assert len(one.said) == (make is plain_rope) + ("deepseek" in case and torch.cpu._is_amx_tile_supported()), one.said


def test_settings_known_to_be_wrong_are_repaired_and_a_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    latent = {"kv_lora_rank": 512}
    for rope in ({}, {"rope_parameters": PLAIN_ROPE}, {"rope_scaling": {"type": "linear", "factor": 2.0}}):
        without_kernel, attention = cpu_repairs(latent | rope)
        assert without_kernel.settings == {"compilation_config": {"custom_ops": ["all", "-rotary_embedding"]}}
        assert attention.settings == {"attention_config": {"backend": "CPU_MLA"}}
        assert "rotary_embedding" in without_kernel.says and "kv_b_proj" in attention.says
        assert "\n" not in without_kernel.says + attention.says
    published = cpu_repairs(latent | {"rope_scaling": {"type": "yarn", "factor": 40}})
    assert [bool(repair.says) for repair in published] == [False, True]
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert not any(repair.says for repair in cpu_repairs(latent | {"rope_parameters": {"rope_type": "yarn"}}))
    assert cpu_repairs({"model_type": "qwen3_moe"}) == []
