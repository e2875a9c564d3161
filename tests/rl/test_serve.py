"""`python -m rl.serve` as processes: a run with servers is the run without, and nothing is left of a server that ends, however it does."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import numpy as np
import policies
import psutil
import pytest
from safetensors.torch import load_file

from data.values import Completion
from rl.config import PolicyConfig, RolloutConfig
from rl.engines.base import Engine, Request, Sampling
from rl.engines.make import make_engines
from rl.engines.weights import read_manifest
from rl.metrics import without_times
from rl.pool import RolloutPool
from rl.sync import WeightSync

CHECKOUT = Path(__file__).resolve().parents[2]
RECIPE = """
run: {name: RUN, seed: 3, output_dir: OUT}
policy: {path: POLICY}
prompts: {path: PROMPTS}
rollout: {engine: hf, group_size: 4, max_tokens: 24}
rewards: {plugins: ["PLUGIN:digits"], parts: [{name: digits}]}
learner: {steps: 6, prompts_per_step: 4, lr: 3.0e-3, warmup_steps: 0, threads: 1}
checkpoint: {every: 0}
"""
PLUGIN = """
def digits(completions, **columns):
    return [sum(c.isdigit() for c in text) / 24 for text in completions]
"""
ENGINES = ("engines/", "tokens/lost")
"""Metrics that say what became of engines, and nothing of the policy."""


class Server:
    """A process that serves; ready when it is made."""

    def __init__(self, recipe: Path, port: int = 0) -> None:
        command = [sys.executable, "-m", "rl.serve", str(recipe), "--port", str(port)]
        self.process = subprocess.Popen(command, cwd=CHECKOUT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert self.process.stdout is not None
        self.said = self.process.stdout.readline()
        self.url = self.said.split(": ")[0]
        assert self.url.startswith("http://127.0.0.1:"), self.said + self.process.stdout.read()

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])

    def ready(self) -> "Server":
        while httpx.get(f"{self.url}/health", trust_env=False).json()["state"] == "loading":
            assert self.process.poll() is None
            time.sleep(0.1)
        return self

    def family(self) -> list[psutil.Process]:
        """It and all that it started."""
        me = psutil.Process(self.process.pid)
        return [me, *me.children(recursive=True)]

    def end(self, how: signal.Signals) -> tuple[int, str]:
        self.process.send_signal(how)
        said, _ = self.process.communicate(timeout=60)
        return self.process.returncode, said


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    made: list[Server] = []

    def start(recipe: Path, port: int = 0) -> Server:
        made.append(Server(recipe, port))
        return made[-1]

    yield start
    for server in made:
        if server.process.poll() is None:
            server.end(signal.SIGKILL)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    policies.tiny_qwen3_moe(tmp_path / "policy", seed=0)
    (tmp_path / "plugin.py").write_text(PLUGIN)
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": str(100 + 7 * i)}) + "\n" for i in range(24)))
    text = RECIPE.replace("OUT", str(tmp_path / "out")).replace("POLICY", str(tmp_path / "policy"))
    text = text.replace("PLUGIN", str(tmp_path / "plugin.py")).replace("PROMPTS", str(tmp_path / "prompts.jsonl"))
    path = tmp_path / "recipe.yaml"
    path.write_text(text.replace("RUN", "local"))
    return path


def train(recipe: Path, *overrides: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "rl.train", str(recipe), *overrides]
    return subprocess.Popen(command, cwd=CHECKOUT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def ended(process: subprocess.Popen[str]) -> str:
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said[-3000:]
    return said


def rows(folder: Path) -> list[dict[str, object]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in without_times(json.loads(line)).items() if not k.startswith(ENGINES)} for line in lines]


def same_weights(a: Path, b: Path) -> bool:
    left, right = (load_file(folder / "final" / "model.safetensors") for folder in (a, b))
    return left.keys() == right.keys() and all(left[name].numpy().tobytes() == right[name].numpy().tobytes() for name in left)


def listens_on(process: psutil.Process) -> set[str]:
    return {c.laddr.ip for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN}


@pytest.mark.slow
def test_a_run_with_two_servers_of_which_one_is_killed_is_the_local_run_bit_for_bit(recipe: Path, serve) -> None:
    servers = [serve(recipe), serve(recipe)]
    assert [listens_on(psutil.Process(server.process.pid)) for server in servers] == [{"127.0.0.1"}] * 2
    local = train(recipe, "rollout.engines=2")
    ended(local)
    out = recipe.parent / "out"
    process = train(recipe, "run.name=remote", f"rollout.servers=[{servers[0].url}, {servers[1].url}]")
    metrics = out / "remote" / "metrics.jsonl"
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 3:
        assert process.poll() is None, process.communicate()[0][-3000:]
        time.sleep(0.01)
    servers[0].end(signal.SIGKILL)
    serve(recipe, servers[0].port)
    said = ended(process)
    assert "engine engine-0 died" in said
    assert rows(out / "remote") == rows(out / "local")
    assert same_weights(out / "remote", out / "local")
    code, said = servers[1].end(signal.SIGTERM)
    assert (code, said.splitlines()[-1]) == (0, f"{servers[1].url}: ended")


def requests(sampling: Sampling) -> list[list[Request]]:
    prompts = np.random.default_rng(0).integers(2, 60, (4, 7)).astype(np.int32)
    return [[Request(f"p{p}", f"g{p}", 0, i, 100 * p + i, prompts[p], sampling, p) for i in range(4)] for p in range(4)]


def sample(engines: list[Engine], first: Path, second: Path) -> list[Completion]:
    """Completions by the policy that the engines were made for, and then the same requests by another one's weights."""
    got: list[list[Completion]] = []
    sync = WeightSync(engines, read_manifest(first))
    with RolloutPool(engines) as pool:
        for version in (0, 1):
            if version:
                sync.push(policies.Checkpoint(second), version)
            got.append([])
            pool.collect(requests(Sampling(24)), got[-1].append)
            assert {v for c in got[-1] for v in c.policy_version.tolist()} == {version}
    sync.close()
    return [c for some in got for c in sorted(some, key=lambda c: c.id)]


@pytest.mark.slow
def test_a_vllm_server_gives_what_vllm_here_gives_and_leaves_nothing_behind(recipe: Path, serve, tmp_path: Path) -> None:
    pytest.importorskip("vllm", reason="vllm is not installed: `make install`")
    recipe.write_text(recipe.read_text().replace("engine: hf", "engine: vllm, slots: 8"))
    server = serve(recipe).ready()
    policy, other = tmp_path / "policy", policies.tiny_qwen3_moe(tmp_path / "other", seed=7)
    made = {}
    for name, servers in (("here", []), ("there", [server.url])):
        rollout = RolloutConfig(engine="vllm", slots=8, servers=servers)
        engines = make_engines(rollout, PolicyConfig(path=str(policy)), policy, 512, tmp_path, manifest=read_manifest(policy))
        made[name] = sample(engines, policy, other)
    before, after = made["here"][:16], made["here"][16:]
    assert sum(a.token_ids.tolist() != b.token_ids.tolist() for a, b in zip(before, after, strict=True)) > 8
    for here, there in zip(made["here"], made["there"], strict=True):
        assert here.id == there.id and here.token_ids.tolist() == there.token_ids.tolist()
        assert here.engine_logp.tobytes() == there.engine_logp.tobytes()
    family = server.family()
    assert len(family) > 2  # vLLM's process, and what guards it
    assert server.end(signal.SIGTERM)[0] == 0
    _, alive = psutil.wait_procs(family, timeout=10)
    assert not alive
