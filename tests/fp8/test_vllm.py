"""vLLM on a CPU takes the codes: loaded from the files, and updated by the weight sync while it lives."""

from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue

import numpy as np
import policies
import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("vllm", reason="vllm is not installed: `make install`")
if not torch.cpu._is_amx_tile_supported():
    pytest.skip("vLLM's CPU kernels for block-FP8 weights need AMX, which this CPU has not", allow_module_level=True)

from rl.config import Fp8Config, PolicyConfig
from rl.engines.base import Event, Request, Sampling
from rl.engines.vllm import VllmEngine
from rl.engines.weights import read_manifest
from rl.fp8.convert import fp8_model
from rl.fp8.folder import engine_policy
from rl.policy import checkpoint_views
from rl.sync import WeightSync

PROMPTS = [[2, 3, 4], [5, 6, 7, 8, 9, 10], [11], [12, 13] * 20]
# vLLM fuses q, k and v, and takes blocks of 128 rows alone but for the last: 4 key heads of 32.
KEEP = ["lm_head", "gate", "q_proj", "k_proj", "v_proj"]


class Learner:
    """A policy that is sent as it is."""

    def __init__(self, folder: Path, config: Fp8Config):
        self.model = fp8_model(folder, config, torch.device("cpu"), attention_name="sdpa")

    def export(self) -> Iterator[tuple[str, torch.Tensor]]:
        return checkpoint_views(self.model)

    def logp(self, prompt: list[int], token_ids: np.ndarray) -> np.ndarray:
        ids = torch.tensor([*prompt, *token_ids.tolist()])
        with torch.no_grad():
            logp = self.model(ids[None, :-1]).logits[0].float().log_softmax(-1)
        return logp.gather(1, ids[1:, None])[len(prompt) - 1 :, 0].numpy()


def sample(engine: VllmEngine, mailbox: "SimpleQueue[Event]") -> list:
    sampling = Sampling(16)
    engine.submit([Request("p", "g", 0, i, 100 + i, np.array(prompt, np.int32), sampling) for i, prompt in enumerate(PROMPTS)])
    return sorted((mailbox.get(timeout=60).completion for _ in PROMPTS), key=lambda c: c.index)


@pytest.mark.slow
@pytest.mark.parametrize("make", [policies.tiny_qwen3_moe, policies.tiny_deepseek_v3])
def test_an_engine_that_was_updated_with_codes_equals_a_fresh_one(make, tmp_path: Path) -> None:
    """And both compute what the learner computes without quantised activations, but for BF16."""
    recipe = PolicyConfig(path="", precision="fp8", fp8=Fp8Config(keep=KEEP, quantize_activations=False))
    old, new = (
        engine_policy(recipe, make(tmp_path / f"made{seed}", seed=seed, dtype=torch.bfloat16), tmp_path / f"fp8-{seed}") for seed in (0, 1)
    )
    found = {}
    for name, begins_with in (("updated", old), ("fresh", new)):
        mailbox: SimpleQueue[Event] = SimpleQueue()
        engine = VllmEngine(name, begins_with, log_path=tmp_path / f"{name}.log", max_model_len=128, slots=4, dtype="bfloat16")
        engine.start(mailbox)
        sync = WeightSync([engine], read_manifest(begins_with))
        try:
            if name == "updated":
                before = sample(engine, mailbox)
                sync.push(Learner(new, recipe.fp8), version=1)
                in_bf16 = sum(2 * t.numel() for n, t in load_file(new / "model.safetensors").items() if not n.endswith("_scale_inv"))
                print(f"{make.__name__}: {sync.stats.bytes:,} bytes a sync, {sync.stats.bytes / in_bf16:.3f} of BF16")
            found[name] = sample(engine, mailbox)
        finally:
            engine.close()
            sync.close()
    for updated, fresh, first in zip(found["updated"], found["fresh"], before, strict=True):
        assert updated.token_ids.tolist() == fresh.token_ids.tolist() != first.token_ids.tolist()
        assert np.abs(updated.engine_logp - fresh.engine_logp).max() == 0.0
        assert set(updated.policy_version.tolist()) == {1}
    ours = Learner(new, recipe.fp8)
    distance = np.mean(np.concatenate([np.abs(c.engine_logp - ours.logp(PROMPTS[c.index], c.token_ids)) for c in found["fresh"]]))
    print(f"{make.__name__}: mean |d log-prob| between vLLM and the learner without quantised activations {distance:.4f}")
    assert distance < 0.05
