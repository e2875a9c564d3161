"""vLLM on a CPU takes the codes, from the files and from the weight sync while it lives, and computes from their values."""

from collections.abc import Callable, Iterator
from pathlib import Path
from queue import SimpleQueue

import numpy as np
import policies
import published
import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("vllm", reason="vllm is not installed: `make install`")

from data.values import Completion
from rl.config import Fp8Config, PolicyConfig
from rl.engines.base import Event, Finished, Pulse, Request, Sampling
from rl.engines.vllm import VllmEngine
from rl.engines.weights import read_manifest
from rl.fp8.convert import fp8_model
from rl.fp8.folder import engine_policy
from rl.policy import checkpoint_views
from rl.sync import WeightSync

PROMPTS = [[2, 3, 4], [5, 6, 7, 8, 9, 10], [11], [12, 13] * 20]


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


def sample(engine: VllmEngine, mailbox: "SimpleQueue[Event]") -> list[Completion]:
    sampling = Sampling(16)
    engine.submit([Request("p", "g", 0, i, 100 + i, np.array(prompt, np.int32), sampling) for i, prompt in enumerate(PROMPTS)])
    found: list[Completion] = []
    while len(found) < len(PROMPTS):
        match mailbox.get(timeout=60):
            case Finished(completion=completion):
                found.append(completion)
            case Pulse():
                pass
            case other:
                raise AssertionError(other)
    return sorted(found, key=lambda c: c.index)


def published_in_codes(path: Path, *, seed: int, dtype: torch.dtype) -> Path:
    """With its multi-token prediction module, which a vLLM that drafts nothing passes over, in files and updates alike."""
    published.write(path, fp8=True, seed=seed)
    policies.character_tokenizer(published.V).save_pretrained(path)
    return path


MAKERS = [policies.tiny_qwen3_moe, policies.tiny_deepseek_v3]


def policies_of(make: Callable[..., Path], recipe: PolicyConfig, folder: Path) -> list[Path]:
    """Two policies in codes; kv_a_proj_with_mqa has 576 rows, and k_proj 64: fused with its neighbours it is no whole number of blocks."""
    made = [make(folder / f"made{seed}", seed=seed, dtype=torch.bfloat16) for seed in (0, 1)]
    return [engine_policy(recipe, one, folder / f"fp8-{one.name}") for one in made]


def distance(found: list[Completion], ours: Learner) -> float:
    """Mean |d log-prob|."""
    return float(np.mean(np.concatenate([np.abs(c.engine_logp - ours.logp(PROMPTS[c.index], c.token_ids)) for c in found])))


@pytest.mark.slow
@pytest.mark.parametrize("make", MAKERS)
def test_an_engine_that_was_updated_with_codes_equals_a_fresh_one(make: Callable[..., Path], tmp_path: Path) -> None:
    recipe = PolicyConfig(path="", precision="fp8", fp8=Fp8Config(quantize_activations=False))
    old, new = policies_of(make, recipe, tmp_path)
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
                assert sync.stats is not None and sync.stats.bytes < 0.6 * in_bf16  # embedding and head are not in codes
            found[name] = sample(engine, mailbox)
        finally:
            engine.close()
            sync.close()
    for updated, fresh, first in zip(found["updated"], found["fresh"], before, strict=True):
        assert updated.token_ids.tolist() == fresh.token_ids.tolist() != first.token_ids.tolist()
        assert np.abs(updated.engine_logp - fresh.engine_logp).max() < 1e-6
        assert set(updated.policy_version.tolist()) == {1}
    apart = distance(found["fresh"], Learner(new, recipe.fp8))
    print(f"{make.__name__}: mean |d log-prob| between vLLM and the learner without quantised activations {apart:.4f}")
    assert apart < 0.05  # BF16 alone: in FP32 it is the same, see below


@pytest.mark.slow
@pytest.mark.parametrize("make", [*MAKERS, published_in_codes])
def test_an_engine_in_fp32_has_the_values_of_the_learner(make: Callable[..., Path], tmp_path: Path) -> None:
    """With every tensor in a chunk of its own, so that codes and scales never come together."""
    recipe = PolicyConfig(path="", precision="fp8", fp8=Fp8Config(rest="fp32", quantize_activations=False))
    old, new = policies_of(make, recipe, tmp_path)
    mailbox: SimpleQueue[Event] = SimpleQueue()
    engine = VllmEngine("engine", old, log_path=tmp_path / "engine.log", max_model_len=128, slots=4, dtype="float32")
    engine.start(mailbox)
    sync = WeightSync([engine], read_manifest(old))
    assert sync.file is not None
    sync.file._chunk_bytes = 1
    try:
        assert distance(sample(engine, mailbox), Learner(old, recipe.fp8)) < 1e-5
        sync.push(Learner(new, recipe.fp8), version=1)
        assert distance(sample(engine, mailbox), Learner(new, recipe.fp8)) < 1e-5
    finally:
        engine.close()
        sync.close()
