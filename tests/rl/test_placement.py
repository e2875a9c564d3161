"""Turns on a shared GPU: engines and learner as entries of a ledger that refuses what a GPU would refuse."""

import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import rl.engines.lives
import rl.engines.make
from data.values import Completion
from rl.config import OptimizerConfig, PolicyConfig, RolloutConfig
from rl.engines.base import Died, EngineDead, Finished, Mailbox, Part, Request, Sampling, WeightChunk
from rl.engines.make import make_engines
from rl.engines.server import Server
from rl.engines.weights import TensorSpec
from rl.estimate import beside
from rl.optim import AdamW
from rl.placement import ColocatedStream, ColocatedSync, Turns
from rl.pool import RolloutPool
from rl.ranks import Ranks

NEEDS = {"weights": 4, "kv_cache": 3}
ROOM = 10
"""Of the GPU; beside the learner's weights (2) there is room for an engine (7), or for optimizer and activations (4 and 4)."""


class Gpu:
    """Its memory, and all that happened to it in order."""

    def __init__(self) -> None:
        self.held = {"learner": 2}
        self.trace: list[str] = []

    def take(self, what: str, amount: int) -> None:
        assert what not in self.held, f"{what} was taken twice"
        self.held[what] = amount
        assert sum(self.held.values()) <= ROOM, f"out of memory: {self.held}"
        self.trace.append(f"+{what}")

    def give(self, what: str) -> None:
        del self.held[what]
        self.trace.append(f"-{what}")


def requests(position: int, size: int) -> list[Request]:
    prompt = np.array([1], np.int32)
    return [Request(f"p{position}", f"g{position}", 0, i, i, prompt, Sampling(1), position) for i in range(size)]


class SleepyEngine:
    """Samples one token at once; its memory is the GPU's."""

    slots = 4
    whole_groups = False

    def __init__(self, gpu: Gpu, name: str = "engine"):
        self.gpu = gpu
        self.name = name
        self.parts: set[str] = set()
        self.starts = 0
        self.slow_start_s = 0.0
        self.answers = True
        self.gone = True

    def _take(self, part: str) -> None:
        self.gpu.take(part, NEEDS[part])
        self.parts.add(part)

    def _give_all(self) -> None:
        for part in sorted(self.parts):
            self.gpu.give(part)
        self.parts = set()

    def _alive(self) -> None:
        if self.gone:
            raise EngineDead(f"engine {self.name} is gone")

    def start(self, mailbox: Mailbox) -> None:
        time.sleep(self.slow_start_s)
        self.mailbox = mailbox
        self.starts += 1
        self.version = 0
        self.gone = False
        for part in NEEDS:
            self._take(part)

    def submit(self, requests: Sequence[Request]) -> None:
        self._alive()
        assert self.parts == NEEDS.keys(), "asked for completions in its sleep"
        if self.answers:
            self.gpu.trace.append("sample")
            for r in requests:
                self.mailbox.put(Finished(self.name, self._completion(r)))

    def _completion(self, r: Request) -> Completion:
        one = np.ones(1)
        return Completion(
            r.prompt_id, r.group_id, r.index, r.attempt, r.seed, one.astype(np.int32), one.astype(np.uint8),
            -one.astype(np.float32), np.full(1, self.version, np.int32), "stop", self.name,
        )  # fmt: skip

    def sleep(self) -> None:
        self._alive()
        self._give_all()

    def wake(self, part: Part) -> None:
        self._alive()
        if part not in self.parts:
            self._take(part)

    def begin_update(self, version: int) -> None:
        self._alive()
        assert "weights" in self.parts, "nowhere to load to"
        self.next_version = version

    def load(self, chunk: WeightChunk) -> None:
        self.gpu.trace.append("load")

    def end_update(self) -> None:
        self.version = self.next_version

    def die(self) -> None:
        self._give_all()
        self.gone = True
        self.mailbox.put(Died(self.name, "killed by SIGKILL"))

    def close(self) -> None:
        self._give_all()


class Optimizer:
    """Moves nothing but an entry of the ledger."""

    def __init__(self, gpu: Gpu):
        self.gpu = gpu
        self.state: dict[str, Any] = {}
        gpu.take("optimizer", 4)

    def move_state(self, device: torch.device | str) -> None:
        self.gpu.take("optimizer", 4) if device != "cpu" else self.gpu.give("optimizer")


class Sharing:
    """A colocated run without a model: what `rl.train` calls, on one GPU."""

    def __init__(self, gpu: Gpu, engines: Sequence[SleepyEngine]):
        self.gpu = gpu
        ranks = Ranks()
        learner: Any = SimpleNamespace(optim=Optimizer(gpu), ranks=ranks, model=SimpleNamespace(parameters=list), sharded=None)
        turns = Turns(learner, RolloutConfig(placement="colocate"))
        turns.offloads, turns.ranks = True, SimpleNamespace(device="cuda", barrier=lambda: None)  # type: ignore[assignment]
        turns.learner_ends()  # as open_run: before engines start
        self.pool = RolloutPool(engines)
        self.position = 0
        group_stream: Any = SimpleNamespace(next=self.sample, pool=self.pool)
        self.stream = ColocatedStream(ranks, group_stream, turns)
        self.sync = ColocatedSync(engines, {"w": TensorSpec("float32", (2,))}, turns)
        self.pool.catch_up = self.sync.replay
        self.versions: list[int] = []

    def __enter__(self) -> "Sharing":
        self.pool.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.close()
        self.sync.close()

    def sample(self, count: int) -> Any:
        self.position += 1
        found: list[Completion] = []
        self.pool.collect([requests(self.position, count)], found.append)
        self.versions = sorted({int(c.policy_version[0]) for c in found})
        return []

    def step(self, version: int, learn: Callable[[], None] = lambda: None) -> None:
        self.stream.next(2)
        self.gpu.take("activations", 4)
        learn()
        self.gpu.give("activations")
        self.push(version)

    def push(self, version: int) -> None:
        self.sync.push(SimpleNamespace(export=self.export), version)

    def export(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield "w", torch.ones(2)


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rl.engines.lives, "BACKOFF_s", 0.001)


def test_no_side_takes_memory_before_the_other_has_given_its_own_back() -> None:
    gpu = Gpu()
    with Sharing(gpu, [SleepyEngine(gpu)]) as run:
        for version in (1, 2):
            gpu.trace.clear()
            run.step(version)
            assert run.versions == [version - 1]
            sampling = ["sample", "-kv_cache", "-weights"]
            learning = ["+optimizer", "+activations", "-activations", "-optimizer"]
            assert gpu.trace == [*sampling, *learning, "+weights", "load", "+kv_cache"]
        run.sample(2)  # an evaluation, in the engines' turn
        assert run.versions == [2]


def test_a_resumed_run_updates_engines_that_have_not_slept() -> None:
    gpu = Gpu()
    engine = SleepyEngine(gpu)
    with Sharing(gpu, [engine]) as run:
        run.sync.turns.learner_begins = lambda: None  # type: ignore[method-assign]
        run.sync.turns.optim.move_state = lambda device: None  # type: ignore[method-assign]
        gpu.trace.clear()
        run.push(5)
        run.sample(2)
        assert run.versions == [5] and gpu.trace == ["load", "sample"]


def test_an_engine_that_dies_asleep_comes_back_in_the_engines_turn_at_the_current_weights() -> None:
    gpu = Gpu()
    engine = SleepyEngine(gpu)
    with Sharing(gpu, [engine]) as run:
        run.step(1)
        run.step(2, learn=engine.die)
        assert engine.starts == 1, "a new life would take the memory in which the learner learns"
        run.step(3)
        assert engine.starts == 2 and run.versions == [2]


def test_a_life_that_begins_when_sampling_ends_is_put_to_sleep_too() -> None:
    gpus = Gpu(), Gpu()
    engines = SleepyEngine(gpus[0], "a"), SleepyEngine(gpus[1], "b")
    with Sharing(gpus[0], engines) as run:
        engines[1].answers, engines[1].slow_start_s = False, 0.3
        threading.Timer(0.1, engines[1].die).start()
        run.stream.next(8)
        assert engines[1].starts == 2 and not engines[1].parts, "it began, gave back what it took, and the learner may go on"
        engines[1].answers = True
        run.push(1)
        assert engines[1].parts == NEEDS.keys() and engines[1].version == 1


def test_engines_are_not_put_to_sleep_over_their_work() -> None:
    gpu = Gpu()
    engine = SleepyEngine(gpu)
    engine.answers = False
    with Sharing(gpu, [engine]) as run:
        run.pool.submit(requests(0, 2))
        with pytest.raises(AssertionError, match="over 2 completions"):
            run.pool.sleep()


# --- inside of an engine's process ------------------------------------------------------------------------------------


class TableCore:
    """Notes what it is told."""

    def __init__(self) -> None:
        self.requests: dict[str, Request] = {}
        self.told: list[str] = []

    def add(self, request: Request) -> None:
        self.requests[request.id] = request

    def begin_update(self) -> None:
        self.told.append("begin")

    def end_update(self, version: int) -> None:
        self.told.append(f"end {version}")

    def sleep(self) -> None:
        self.told.append("sleep")

    def wake(self, part: Part) -> None:
        self.told.append(f"wake {part}")


def test_a_server_wakes_in_two_steps_around_an_update() -> None:
    core = TableCore()
    server = Server(None, core)  # type: ignore[arg-type]
    for _ in range(2):  # awake, nothing happens
        server.wake("weights")
        server.wake("kv_cache")
    server.sleep()
    server.sleep()
    with pytest.raises(AssertionError, match="the weights sleep"):
        server.begin_update(1)
    server.wake("weights")
    with pytest.raises(AssertionError, match="weights that it has lost"):
        server.wake("kv_cache")
    server.begin_update(1)
    server.end_update()
    with pytest.raises(AssertionError, match="sleeps"):
        server.submit(requests(0, 1))
    server.wake("kv_cache")
    server.submit(requests(0, 1))
    assert core.told == ["sleep", "wake weights", "begin", "end 1", "wake kv_cache"]
    with pytest.raises(AssertionError, match="over its work"):
        server.sleep()


# --- where engines are, and what the learner gives up -----------------------------------------------------------------


def test_engines_are_on_the_learners_gpus_or_behind_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)

    def devices(placement: str) -> list[tuple[int, ...]]:
        rollout = RolloutConfig(engines=3, tensor_parallel=2, placement=placement)  # type: ignore[arg-type]
        engines: Any = make_engines(rollout, PolicyConfig(path="p"), tmp_path, 64, tmp_path)
        assert all(engine.spec.sleeps == (placement == "colocate") for engine in engines)
        return [engine.spec.devices for engine in engines]

    assert devices("split") == [(2, 3), (4, 5), (6, 7)]
    assert devices("colocate") == [(0, 1), (2, 3), (4, 5)]


def test_the_optimizer_stays_where_there_is_room_for_both() -> None:
    assert beside(17e9, 0.75, 80e9)  # 17 + 60 + 3
    assert not beside(17.1e9, 0.75, 80e9)


@pytest.mark.parametrize(
    "config", [{}, {"moments": "bf16", "betas": (0.9, 0.95)}, {"masters": "bf16"}], ids=["fp32", "bf16 moments", "bf16 masters"]
)
def test_an_optimizer_that_went_and_came_back_is_the_same_to_the_bit(config: dict[str, Any]) -> None:
    def train(moving: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        torch.manual_seed(0)
        p = torch.nn.Parameter(torch.randn(8, 16).to(torch.bfloat16))
        optim = AdamW([("p", p)], OptimizerConfig(**config))
        optim.state["p"]["exp_avg"][0, 0] = float("nan")  # no arithmetic on the way would keep its bits
        for _ in range(4):
            (p.float() * torch.randn(8, 16)).sum().backward()
            optim.step(1e-2)
            before = [weakref.ref(tensor) for tensor in optim.state["p"].values()]
            if moving:
                optim.move_state("cpu")
                gc.collect()
                assert all(tensor() is None for tensor in before), "what went is held no longer"
                optim.move_state(p.device)
        return p.detach(), optim.state_dict()

    (here, state), (there, moved) = train(False), train(True)
    assert torch.equal(here.view(torch.uint8), there.view(torch.uint8)) and state.keys() == moved.keys()
    assert all(torch.equal(state[name].view(torch.uint8), moved[name].view(torch.uint8)) for name in state)
