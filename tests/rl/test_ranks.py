"""Several ranks (gloo) give the gradients of one; groups cross between ranks without loss."""

import json
import os
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import policies
import pytest
import torch
from made import NoFloat32, deepseek_v3_with_module, distance, gradients, make_groups, make_learner, step_numbers
from rank_cases import CASES, groups_of, settings_of
from safetensors.torch import load_file

from data.values import Completion, Group
from rl.ranks import decode_groups, encode_groups

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return policies.tiny_qwen3_moe(tmp_path_factory.mktemp("policy") / "qwen3_moe", seed=0)


@pytest.fixture(scope="module", params=["qwen3_moe", "deepseek_v3"])
def policy(request: pytest.FixtureRequest, moe: Path) -> Path:
    return moe if request.param == "qwen3_moe" else deepseek_v3_with_module(moe.parent / request.param, seed=0)


FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
}
TORCHRUN = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]


@pytest.fixture(scope="module")
def of_two(policy: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, torch.Tensor]]:
    """Gradients of two ranks, by case."""
    out = tmp_path_factory.mktemp("ranks") / "grads.pt"
    done = subprocess.run(
        [sys.executable, *TORCHRUN, str(HERE / "two_ranks.py"), str(policy), str(out)],
        env={**os.environ, "PYTHONPATH": f"{HERE.parent}:{HERE.parent.parent}", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return torch.load(out, weights_only=True)


@pytest.mark.parametrize("sharding", ["replicated", "sharded"])
@pytest.mark.parametrize("case", CASES)
def test_two_ranks_give_the_gradients_of_one(policy: Path, of_two: dict[str, dict[str, torch.Tensor]], case: str, sharding: str) -> None:
    loss = CASES[case][1]
    with NoFloat32():
        learner = make_learner(policy, loss, reference=policy if loss.kl_coef else None, **settings_of(case, policy))
        one = gradients(learner, groups_of(case, policy))
    assert distance(of_two[f"{case}, {sharding}"], one) < 1e-10


def test_layers_gathered_in_bf16_add_up_in_fp32(policy: Path, of_two: dict[str, dict[str, torch.Tensor]]) -> None:
    groups, settings = groups_of("spread", policy), settings_of("spread", policy)
    exact, one = (
        gradients(make_learner(policy, CASES["spread"][1], dtype=dtype, **settings), groups) for dtype in (torch.float32, torch.bfloat16)
    )
    two = of_two["spread, sharded in bf16"]
    assert {g.dtype for g in two.values()} == {torch.float32}
    assert distance(two, exact) < 1.1 * distance(one, exact), (distance(two, exact), distance(one, exact))


def test_two_ranks_count_the_load_and_the_mismatch_of_one(policy: Path, of_two: dict[str, dict[str, torch.Tensor]]) -> None:
    with NoFloat32():
        one = step_numbers(make_learner(policy, CASES["routers"][1], **settings_of("routers", policy)), groups_of("routers", policy))
    two = of_two["numbers"]
    assert two.keys() == one.keys() and {"mismatch/ratio_p99", "mismatch/flipped_routes"} < two.keys()
    assert ("mtp/acceptance" if "deepseek" in policy.name else "moe/loss") in two
    assert torch.equal(two.pop("load"), one.pop("load"))
    assert {name: float(x) for name, x in two.items()} == pytest.approx({name: float(x) for name, x in one.items()}, rel=1e-9)


def test_groups_cross_between_ranks_bit_by_bit() -> None:
    groups = make_groups([[1, None, 0], [0.1, 0.2, 0.3]])
    first = groups[0].completions[0]
    tokens = len(groups[0].prompt.token_ids) + len(first.token_ids)
    routed = Completion(**{
        **vars(first),
        "routes": np.arange(tokens * 6, dtype=np.uint8).reshape(tokens, 2, 3),
        "routes_valid": np.arange(tokens) % 2 == 0,
    })  # fmt: skip
    groups[0] = Group(groups[0].id, groups[0].prompt, 0, (routed, *groups[0].completions[1:]), groups[0].scores)
    header, arrays = encode_groups(groups)
    flat = torch.from_numpy(np.frombuffer(b"".join(np.ascontiguousarray(a).tobytes() for a in arrays), dtype=np.uint8).copy())

    again = decode_groups(json.loads(header), flat)
    for a, b in zip(groups, again, strict=True):
        assert (a.id, a.prompt.id, a.attempt) == (b.id, b.prompt.id, b.attempt)
        assert [(s.value, s.status) for s in a.scores] == [(s.value, s.status) for s in b.scores]
        assert np.array_equal(a.prompt.token_ids, b.prompt.token_ids)
        for c, d in zip(a.completions, b.completions, strict=True):
            for name, value in vars(c).items():
                other = getattr(d, name)
                same = np.array_equal(value, other) and value.dtype == other.dtype if isinstance(value, np.ndarray) else value == other
                assert same, name


def tiny_run(folder: Path, policy: Path, name: str) -> Path:
    """A recipe of four steps."""
    (folder / "plugin.py").write_text("def zeros(completions, **columns):\n    return [t.count('5') + 0.1 * len(t) for t in completions]\n")
    (folder / "prompts.jsonl").write_text("".join(f'{{"prompt": "{a}{b}"}}\n' for a in "0123" for b in "456"))
    recipe = {
        "run": {"name": name, "output_dir": str(folder)}, "policy": {"path": str(policy)},
        "prompts": {"path": str(folder / "prompts.jsonl")},
        "rollout": {"engine": "hf", "group_size": 4, "max_tokens": 5},
        "rewards": {"plugins": [f"{folder / 'plugin.py'}:zeros"], "parts": [{"name": "zeros"}]},
        "learner": {"steps": 4, "prompts_per_step": 4, "lr": 1e-3, "warmup_steps": 0, "threads": 1},
        "eval": {"every": 0}, "checkpoint": {"every": 2},
    }  # fmt: skip
    (folder / f"{name}.yaml").write_text(json.dumps(recipe))
    return folder / f"{name}.yaml"


@pytest.mark.parametrize("sharding", [{}, FSDP2], ids=["replicated", "sharded"])
def test_a_run_on_two_ranks_ends_as_on_one_and_goes_on_after_a_stop(moe: Path, tmp_path: Path, sharding: dict[str, str]) -> None:
    """Replicated: as one rank, but for rounding. Sharded: stopped after step 2 and resumed, the same bits."""

    def run(name: str, ranks: int, *overrides: str) -> dict[str, torch.Tensor]:
        recipe = tiny_run(tmp_path, moe, name)
        launch = TORCHRUN if ranks > 1 else []
        done = subprocess.run(
            [sys.executable, *launch, "-m", "rl.train", str(recipe), *overrides],
            env={**os.environ, "PYTHONPATH": str(HERE.parent.parent), "OMP_NUM_THREADS": "1", **(sharding if ranks > 1 else {})},
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-1500:]
        return load_file(tmp_path / name / "final" / "model.safetensors")

    two = run("two", 2)
    if not sharding:
        one, start = run("one", 1), load_file(moe / "model.safetensors")
        moved = sum((one[k] - start[k]).square().sum() for k in one) ** 0.5
        assert sum((one[k] - two[k]).square().sum() for k in one) ** 0.5 < 1e-3 * moved
        return
    for steps in (2, 4):
        run("two", 2, f"run.output_dir={tmp_path / 'again'}", f"learner.steps={steps}")
    again = load_file(tmp_path / "again" / "two" / "final" / "model.safetensors")
    assert all(torch.equal(two[k], again[k]) for k in two)


@pytest.mark.parametrize("ranks", [1, 2])
def test_one_of_several_ranks_leaves_without_the_interpreters_teardown(ranks: int) -> None:
    """What was registered for the end runs, what was printed is out; only what aborts a rank that is done is left out."""
    program = (
        "import atexit, sys\n"
        "from rl.command import leave\n"
        "class Threads:\n"
        "    def __del__(self, end=sys.stderr): print('teardown', file=end)\n"
        "kept = Threads()\n"
        "atexit.register(print, 'registered')\n"
        "print('done', end=' ')\n"
        "leave(3)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent.parent), "WORLD_SIZE": str(ranks)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (3, "done registered\n")
    assert done.stderr == ("teardown\n" if ranks == 1 else "")


@pytest.mark.slow
def test_two_nodes_end_with_the_weights_of_two_ranks_of_one(moe: Path, tmp_path: Path) -> None:
    """Two agents with the accelerate config for two nodes, on one machine; engine and learner take turns, as a node has it to itself."""
    path, environment = tiny_run(tmp_path, moe, "nodes"), {**os.environ, "PYTHONPATH": str(HERE.parent.parent), "OMP_NUM_THREADS": "1"}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = HERE.parent.parent / "recipes" / "accelerate_2nodes.yaml"
    launch = ["-m", "accelerate.commands.launch", "--config_file", str(config), "--num_processes", "2", "--main_process_port", str(port)]
    train = ["-m", "rl.train", str(path), "rollout.placement=colocate"]
    with ExitStack() as stack:
        agents = []
        for node in ("0", "1"):
            out = stack.enter_context((tmp_path / f"node-{node}.txt").open("w"))
            command = [sys.executable, *launch, "--machine_rank", node, *train]
            agents.append(subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT))
            stack.callback(agents[-1].kill)
        codes = [agent.wait(timeout=400) for agent in agents]
    said = [(tmp_path / f"node-{node}.txt").read_text() for node in ("0", "1")]
    assert codes == [0, 0], "\n".join(text[-4000:] for text in said)
    assert "step 4/4" in said[0] and "step" not in said[1], "the first rank alone speaks, and it is on the first node"
    done = subprocess.run(
        [sys.executable, *TORCHRUN, "-m", "rl.train", str(path), f"run.output_dir={tmp_path / 'one'}"],
        env=environment | FSDP2, capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-1500:]
    two, one = (load_file(folder / "nodes" / "final" / "model.safetensors") for folder in (tmp_path, tmp_path / "one"))
    assert two.keys() == one.keys() and all(torch.equal(two[k], one[k]) for k in two)
