"""vLLM engines that are killed or stopped by signals, in the middle of sampling, of an update, of a start; and what outlives whom."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from policies import Checkpoint, tiny_qwen3_moe

pytest.importorskip("vllm", reason="vllm is not installed: `make install`")

from data.values import Completion
from rl.engines.base import Died, EngineDead, Request, Sampling
from rl.engines.vllm import VllmEngine, _Link
from rl.engines.weights import read_manifest
from rl.pool import RolloutPool
from rl.sync import WeightSync

STALL_s = 2.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("policies")
    for seed in (0, 1):
        tiny_qwen3_moe(folder / f"moe{seed}", seed=seed)
    return folder


class Rollouts:
    """Two engines, their pool and their sync; the engines were loaded with the first policy and updated to the second."""

    def __init__(self, folder: Path, logs: Path) -> None:
        self.said: list[str] = []
        self.engines = [
            VllmEngine(name, folder / "moe0", log_path=logs / f"{name}.log", max_model_len=256, slots=16, stall_s=STALL_s)
            for name in ("a", "b")
        ]
        self.sync = WeightSync(self.engines, read_manifest(folder / "moe0"))
        self.pool = RolloutPool(self.engines, stall_s=STALL_s, say=self.said.append)
        self.pool.catch_up = self.sync.replay

    def __enter__(self) -> "Rollouts":
        self.pool.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.close()
        self.sync.close()

    def signal(self, number: int, which: signal.Signals) -> None:
        os.kill(self.engines[number].pid, which)

    def submit(self, name: str, tokens: int = 100) -> None:
        for g in range(8):
            prompt = np.arange(2, 6 + g, dtype=np.int32)
            self.pool.submit([Request(f"p{g}", f"{name}/{g}", 0, i, 100 * g + i, prompt, Sampling(tokens), g) for i in range(4)])

    def collect(self) -> list[Completion]:
        got: list[Completion] = []
        while self.pool.open:
            got += self.pool.poll(0.1)
        return sorted(got, key=lambda c: (c.group_id, c.index))

    def wait_for(self, line: str, limit_s: float = 40.0) -> None:
        deadline = time.monotonic() + limit_s
        while line not in self.said:
            assert time.monotonic() < deadline, self.said
            self.pool.poll(0.05)


def assert_same(got: list[Completion], wanted: list[Completion], version: int) -> None:
    assert [(c.prompt_id, c.index) for c in got] == [(c.prompt_id, c.index) for c in wanted]
    assert [c.token_ids.tolist() for c in got] == [c.token_ids.tolist() for c in wanted]
    assert max(float(np.abs(a.engine_logp - b.engine_logp).max()) for a, b in zip(got, wanted, strict=True)) < 1e-5
    assert {int(v) for c in got for v in c.policy_version} == {version}


@pytest.mark.slow
def test_killed_and_hung_engines_lose_nothing_and_come_back_at_the_current_weights(folder: Path, tmp_path: Path) -> None:
    with Rollouts(folder, tmp_path) as rollouts:
        pool, said = rollouts.pool, rollouts.said
        rollouts.sync.push(Checkpoint(folder / "moe1"), version=1)
        rollouts.submit("undisturbed")
        wanted = rollouts.collect()
        assert said == []

        # In the middle of sampling: one is killed, the other hangs.
        rollouts.submit("killed")
        first = pool.poll(5.0)
        rollouts.engines[0].spec.log_path.unlink()  # the run's folder was removed, say: its death is heard of all the same
        rollouts.signal(0, signal.SIGKILL)
        rollouts.signal(1, signal.SIGSTOP)
        got = sorted(first + rollouts.collect(), key=lambda c: (c.group_id, c.index))
        assert_same(got, wanted, version=1)
        rollouts.wait_for("engine a is back")
        rollouts.wait_for("engine b is back")
        assert any("engine a died" in line and "killed by SIGKILL" in line for line in said)
        assert any("engine b died" in line and "hung: no token for 2." in line for line in said)
        numbers = pool.metrics()
        assert (numbers["engines/alive"], numbers["engines/restarts"]) == (2, 2) and numbers["engines/reasked"] >= 16
        assert [engine.health().version for engine in rollouts.engines] == [1, 1]

        # In the middle of an update: one hangs. The other gets it, and the first one when it is back.
        said.clear()
        rollouts.signal(0, signal.SIGSTOP)
        began = time.monotonic()
        rollouts.sync.push(Checkpoint(folder / "moe0"), version=2)
        assert STALL_s < time.monotonic() - began < 4 * STALL_s
        assert rollouts.engines[1].health().version == 2
        rollouts.wait_for("engine a is back")
        assert "it did not answer `begin_update` for 2 s" in said[0]
        assert rollouts.engines[0].health().version == 2

        # While it starts again: the next start follows.
        said.clear()
        rollouts.submit("again")
        pool.poll(5.0)
        rollouts.signal(0, signal.SIGKILL)
        while (link := rollouts.engines[0]._link) is None or link.ready.done():
            pool.poll(0.01)
        os.kill(link.pid, signal.SIGKILL)
        rollouts.wait_for("engine a is back")
        assert [line.split(",")[0] for line in said] == ["engine a died", "engine a died", "engine a is back"]
        rollouts.collect()
        rollouts.sync.push(Checkpoint(folder / "moe1"), version=3)
        rollouts.submit("last")
        assert_same(rollouts.collect(), wanted, version=3)


TRAINER = """
import sys
import time
from pathlib import Path

from rl.engines.vllm import VllmEngine
from rl.pool import RolloutPool

if __name__ == "__main__":
    policy, logs = map(Path, sys.argv[1:3])
    engines = [VllmEngine(n, policy, log_path=logs / f"{n}.log", max_model_len=128, slots=4) for n in ("a", "b")]
    if sys.argv[3] == "apart":
        engines[1] = VllmEngine("b", policy, log_path=logs / "b.log", max_model_len=128, slots=4, asynchronous=True)
    with RolloutPool(engines) as pool:
        print(engines[0].pid, engines[1].pid, flush=True)
        time.sleep(60)
"""


@pytest.mark.slow
@pytest.mark.parametrize("how, core", [(signal.SIGKILL, "apart"), (signal.SIGINT, "inside"), (signal.SIGTERM, "inside")])
def test_no_process_outlives_the_trainer(folder: Path, tmp_path: Path, how: signal.Signals, core: str) -> None:
    """Neither an engine nor what it started nor the fork server; not even one that is stopped and reads nothing any more."""
    (tmp_path / "trainer.py").write_text(TRAINER)
    command = [sys.executable, str(tmp_path / "trainer.py"), str(folder / "moe0"), str(tmp_path), core]
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, preexec_fn=hears_ctrl_c
    ) as trainer:
        engine_pids = [int(pid) for pid in trainer.stdout.readline().split()]
        family = descendants(trainer.pid)
        # Two engines with their guards, the fork server and its resource tracker, and the engine core that one keeps apart.
        assert set(engine_pids) < set(family) and len(family) >= 6 + (core == "apart")
        for pid in engine_pids:
            os.kill(pid, signal.SIGSTOP)
        trainer.send_signal(how)
        said = trainer.stderr.read()
    deadline = time.perf_counter() + 10
    while left := [pid for pid in family if Path(f"/proc/{pid}").exists()]:
        assert time.perf_counter() < deadline, f"{left} of {family} outlived the trainer"
        time.sleep(0.05)
    assert said.count("Traceback") == (how == signal.SIGINT)


def hears_ctrl_c() -> None:
    """A shell's background job, as tests may be, ignores Ctrl-C, and what it starts inherits that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def descendants(pid: int) -> list[int]:
    children = [int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()]
    return children + [further for child in children for further in descendants(child)]


def test_an_engine_that_dies_in_the_middle_of_a_message_is_dead_and_whoever_asked_it_is_told(tmp_path: Path) -> None:
    """More than the pipe holds was being sent when it was killed, and its reader comes late."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()

    def engine() -> None:
        ours.close()
        os.setsid()
        theirs.recv()
        theirs.send(b"x" * 10_000_000)

    process = context.Process(target=engine)
    process.start()
    theirs.close()
    link: Any = object.__new__(_Link)
    spec = SimpleNamespace(name="a", stall_s=STALL_s, max_model_len=0, log_path=tmp_path / "a.log")
    vars(link).update(
        spec=spec, mailbox=SimpleQueue(), ready=Future(), waiting={}, calls=0, outbox=SimpleQueue(), heard=time.monotonic(), silent=None,
        reason=None, closed=False, lock=threading.Lock(), pipe=ours, process=process, pid=process.pid,
    )  # fmt: skip
    link.ready.set_result(None)
    link.writer, link.reader = (threading.Thread(target=work, daemon=True) for work in (link._write, link._read))
    link.writer.start()
    answer = link.call("pause")
    time.sleep(0.5)  # it sends, and nobody reads
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    link.reader.start()
    with pytest.raises(EngineDead, match="killed by SIGKILL"):
        answer.result(timeout=20)
    assert isinstance(link.mailbox.get(timeout=20), Died)
