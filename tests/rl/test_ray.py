"""Engines on a Ray cluster of this machine: they give what engines of this process give, and one that is killed loses no group."""

import importlib.util
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import policies
import psutil
import pytest

import rl.engines.lives
import rl.engines.remote
from data.recipe import InputError
from data.values import Completion
from rl.config import PolicyConfig, RolloutConfig
from rl.engines.base import Engine, EngineDead, Request, Sampling
from rl.engines.make import make_engines
from rl.engines.weights import read_manifest
from rl.pool import RolloutPool
from rl.sync import WeightSync

pytestmark = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed: `pip install -e '.[ray]'`")

GROUPS, GROUP, TOKENS = 6, 4, 16
TRIES = 3
"""Starts of Ray, which gives itself 30 s: less than it needs on a busy machine."""
Done = dict[str, Completion]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("policies")
    for seed in (0, 1):
        policies.tiny_qwen3_moe(folder / f"p{seed}", seed=seed)
    for _ in range(TRIES):
        try:
            engines_of(folder, "ray")
            break
        except EngineDead as error:
            reason = str(error)
    else:
        pytest.skip(f"in {TRIES} tries: {reason}")
    yield folder
    import ray  # after the engines' own import of it, which says how it is to listen

    ray.shutdown()


def engines_of(folder: Path, placement: str, engine: str = "hf") -> list[Engine]:
    rollout = RolloutConfig(engine=engine, engines=2, slots=8, placement=placement)  # type: ignore[arg-type]
    policy = folder / "p0"
    return make_engines(rollout, PolicyConfig(path=str(policy)), policy, 64, folder, manifest=read_manifest(policy))


def sample(engines: list[Engine], folder: Path, fifth: Callable[[], None] = lambda: None) -> tuple[Done, list[str]]:
    """Completions of all groups with the second policy's weights; `fifth` is called when five have come."""
    sync = WeightSync(engines, read_manifest(folder / "p0"))
    got: list[Completion] = []
    said: list[str] = []
    prompts = np.random.default_rng(0).integers(2, 60, (GROUPS, 5)).astype(np.int32)
    groups = [[Request(f"p{p}", f"g{p}", 0, i, 100 * p + i, prompts[p], Sampling(TOKENS), p) for i in range(GROUP)] for p in range(GROUPS)]

    def seen(completion: Completion) -> None:
        got.append(completion)
        if len(got) == 5:
            fifth()

    with RolloutPool(engines, say=said.append) as pool:
        pool.catch_up = sync.replay
        sync.push(policies.Checkpoint(folder / "p1"), version=1)
        pool.collect(groups, seen)
        deadline = time.monotonic() + 60
        while pool.metrics()["engines/alive"] < 2 and time.monotonic() < deadline:
            pool.poll(0.05)
    sync.close()
    assert len(got) == GROUPS * GROUP
    return {completion.id: completion for completion in got}, said


@pytest.mark.slow
def test_two_engines_by_ray_give_the_local_pools_completions_also_when_one_is_killed(folder: Path, monkeypatch) -> None:
    monkeypatch.setattr(rl.engines.lives, "BACKOFF_s", 0.01)
    monkeypatch.setattr(rl.engines.remote, "RETRY_s", 0.2)
    wanted, _ = sample(engines_of(folder, "split"), folder)
    engines = engines_of(folder, "ray")
    import ray

    listening = {c.laddr.ip for p in psutil.Process().children(recursive=True) for c in p.net_connections("inet") if c.status == "LISTEN"}
    assert listening and listening <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}  # this machine's alone

    def kill() -> None:
        pid = ray.get(engines[0].transport.actor.pid.remote())  # type: ignore[attr-defined]
        os.kill(pid, signal.SIGKILL)

    for fifth in (lambda: None, kill):
        got, said = sample(engines, folder, fifth)
        assert got.keys() == wanted.keys()
        for name, completion in got.items():
            assert completion.token_ids.tolist() == wanted[name].token_ids.tolist()
            assert completion.engine_logp.tobytes() == wanted[name].engine_logp.tobytes()
            assert completion.policy_version.tolist() == [1] * len(completion.token_ids)
        assert [line.split(",")[0] for line in said] == (["engine engine-0 died", "engine engine-0 is back"] if fifth is kill else []), said


@pytest.mark.slow
def test_two_vllm_engines_by_ray_give_the_local_pools_tokens(folder: Path) -> None:
    pytest.importorskip("vllm", reason="vllm is not installed: `make install`")
    here, _ = sample(engines_of(folder, "split", "vllm"), folder)
    got, said = sample(engines_of(folder, "ray", "vllm"), folder)
    assert got.keys() == here.keys() and said == []
    for name, completion in got.items():
        assert completion.token_ids.tolist() == here[name].token_ids.tolist()
        assert completion.policy_version.tolist() == [1] * len(completion.token_ids)
        # Which completions share a batch is a matter of time, and with it the last bits of a matrix product.
        assert np.abs(completion.engine_logp - here[name].engine_logp).max() < 1e-5


def test_a_cluster_without_room_is_one_line(folder: Path) -> None:
    rollout = RolloutConfig(engine="hf", engines=10_000, placement="ray")
    with pytest.raises(InputError, match=r"^rollout.placement: 10000 engines need 10000 CPUs of the Ray cluster, and it has \d+;"):
        make_engines(rollout, PolicyConfig(path=str(folder / "p0")), folder / "p0", 64, folder)
