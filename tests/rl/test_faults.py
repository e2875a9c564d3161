"""Engines on transformers that fail in the ways engines fail: what was asked for comes, once, the same as from engines that do not."""

import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import policies
import pytest
import torch

import rl.engines.hf
import rl.engines.lives
from data.values import Completion
from rl.engines.base import Request, Sampling
from rl.engines.hf import HfEngine
from rl.engines.weights import read_manifest
from rl.pool import RolloutPool
from rl.sync import WeightSync

GROUPS, GROUP, TOKENS = 6, 4, 16
Done = dict[str, Completion]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("policies")
    for seed in (0, 1):
        policies.tiny_qwen3(folder / f"p{seed}", seed=seed)
    return folder


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rl.engines.lives, "BACKOFF_s", 0.01)
    monkeypatch.setattr(rl.engines.hf, "CLOSE_s", 0.1)


def groups() -> list[list[Request]]:
    prompts = np.random.default_rng(0).integers(2, 60, (GROUPS, 5)).astype(np.int32)
    return [[Request(f"p{p}", f"g{p}", 0, i, 100 * p + i, prompts[p], Sampling(TOKENS), p) for i in range(GROUP)] for p in range(GROUPS)]


Hook = Callable[[int, torch.nn.Module, tuple[torch.Tensor, ...], torch.Tensor], torch.Tensor | None]


def sample(folder: Path, hook: Hook | None = None, stall_s: float = 60.0) -> tuple[Done, dict[str, float], list[str]]:
    """Completions of all groups from two engines with the second policy's weights; `hook` hears of each token with a count."""
    engines = [HfEngine(f"engine-{n}", str(folder / "p0"), torch.float32, slots=8) for n in range(2)]
    sync = WeightSync(engines, read_manifest(folder / "p0"))
    got: list[Completion] = []
    said: list[str] = []
    with RolloutPool(engines, stall_s=stall_s, say=said.append) as pool:
        pool.catch_up = sync.replay
        sync.push(policies.Checkpoint(folder / "p1"), version=1)
        if hook is not None:
            calls = iter(range(10**9))
            for engine in engines:
                engine.model.lm_head.register_forward_hook(lambda *what: hook(next(calls), *what))  # type: ignore[union-attr]
        pool.collect(groups(), got.append)
        deadline = time.monotonic() + 5
        while (numbers := pool.metrics() | {"engines/reasked": 0})["engines/alive"] < 2 and time.monotonic() < deadline:
            pool.poll(0.01)
    sync.close()
    assert len(got) == GROUPS * GROUP
    return {c.id: c for c in got}, numbers, said


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> Done:
    got, _, said = sample(folder)
    assert said == [] and len(got) == GROUPS * GROUP
    return got


def assert_same(got: Done, wanted: Done) -> None:
    assert got.keys() == wanted.keys()
    for name, completion in got.items():
        assert completion.token_ids.tolist() == wanted[name].token_ids.tolist()
        assert completion.engine_logp.tobytes() == wanted[name].engine_logp.tobytes()
        assert completion.policy_version.tolist() == [1] * len(completion.token_ids)


@pytest.mark.parametrize("error", [RuntimeError("a kernel failed"), torch.OutOfMemoryError("CUDA out of memory")])
def test_an_engine_that_raises_loses_no_group_and_changes_no_bit(folder: Path, undisturbed: Done, error: Exception) -> None:
    def fail(call: int, *_: object) -> None:
        if call in (5, 12, 30):  # in the middle of a group
            raise error

    got, numbers, said = sample(folder, fail)
    assert_same(got, undisturbed)
    assert sum(" died, " in line for line in said) == 3
    assert said[0].endswith(f" completions are asked again: {type(error).__name__}: {error}")
    assert sum(line.endswith("is back") for line in said) == 3 and numbers["engines/alive"] == 2


def test_an_engine_that_hangs_is_left_behind_and_changes_no_bit(folder: Path, undisturbed: Done) -> None:
    wake = threading.Event()

    def hang(call: int, *_: object) -> None:
        if call == 7:
            wake.wait(20)

    got, _, said = sample(folder, hang, stall_s=0.4)
    wake.set()
    assert_same(got, undisturbed)
    assert len(said) == 2 and "hung: no token for 0." in said[0] and said[1].endswith("is back")


def test_an_engine_that_gives_no_numbers_is_not_believed(folder: Path, undisturbed: Done) -> None:
    def spoil(call: int, module: torch.nn.Module, given: tuple[torch.Tensor, ...], logits: torch.Tensor) -> torch.Tensor | None:
        return logits * torch.nan if 3 <= call < 10 else None

    got, _, said = sample(folder, spoil)
    assert_same(got, undisturbed)
    assert "gave log-probs that are no numbers, for g" in said[0]


def test_spoilt_weights_are_replaced_by_those_of_the_checkpoint_and_the_last_update(folder: Path, undisturbed: Done) -> None:
    """An engine's own copy goes bad: a new life must not go on with it."""

    def spoil(call: int, module: torch.nn.Module, *_: object) -> None:
        if call == 4:
            with torch.no_grad():
                module.weight.mul_(torch.nan)  # the embedding too: they are tied

    got, _, _ = sample(folder, spoil)
    assert_same(got, undisturbed)
