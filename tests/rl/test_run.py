"""Whole tiny runs with the hf engine: the reward rises, two runs are the same bits, and a run that was killed goes on as if it was not."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from made import deepseek_v3_with_module
from safetensors.torch import load_file

from data.journal import Journal
from rewards.versions import META
from rl.metrics import without_times
from sft.init import init_policy

CHECKOUT = Path(__file__).resolve().parents[2]
RECIPE = """
run: {name: RUN, seed: 3, output_dir: OUT}
policy: {path: POLICY}
prompts: {task: arithmetic, options: {digits: 1}}
rollout: {engine: hf, group_size: 4, max_tokens: 6}
rewards: {plugins: ["PLUGIN:digits"], parts: [{name: digits}]}
learner: {steps: 6, prompts_per_step: 4, lr: 3.0e-3, warmup_steps: 0, steps_per_batch: 2, threads: 1}
eval: {every: 3, prompts: {task: arithmetic, options: {digits: 1}, split: test, limit: 5}, samples: 2, greedy: false}
checkpoint: {every: 2, keep: 2}
"""
PLUGIN = """
def digits(completions, **columns):
    return [sum(c.isdigit() for c in text) / 6 for text in completions]
"""


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("policy") / "tiny"
    architecture = {
        "model_type": "qwen3_moe", "hidden_size": 128, "intermediate_size": 128, "moe_intermediate_size": 128,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "num_experts": 4,
        "num_experts_per_tok": 2, "max_position_embeddings": 128,
    }  # fmt: skip
    model, tokenizer = init_policy(architecture, "characters", seed=0)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def recipe(folder: Path, policy: Path, name: str, **changes: str) -> Path:
    (folder / "plugin.py").write_text(PLUGIN)
    text = RECIPE.replace("RUN", name).replace("OUT", str(folder / "out")).replace("POLICY", str(policy))
    text = text.replace("PLUGIN", str(folder / "plugin.py"))
    for old, new in changes.items():
        text = text.replace(old, new)
    path = folder / f"{name}.yaml"
    path.write_text(text)
    return path


def command(path: Path, *overrides: str) -> list[str]:
    return [sys.executable, "-m", "rl.train", str(path), *overrides]


def run(path: Path, *overrides: str) -> str:
    done = subprocess.run(command(path, *overrides), cwd=CHECKOUT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def rows(folder: Path) -> list[dict[str, object]]:
    return [without_times(json.loads(line)) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "final" / "model.safetensors")


def same_weights(a: Path, b: Path) -> bool:
    left, right = weights(a), weights(b)
    return left.keys() == right.keys() and all(torch.equal(left[k].view(torch.uint8), right[k].view(torch.uint8)) for k in left)


@pytest.fixture(scope="module")
def whole(policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    run(recipe(folder, policy, "run"))
    return folder / "out" / "run"


def test_the_reward_rises(whole: Path) -> None:
    rewards = [float(row["reward"]) for row in rows(whole)[1:]]  # type: ignore[arg-type]
    assert rewards[-1] > rewards[0] + 0.1, rewards


def test_the_account_of_a_run_closes(whole: Path) -> None:
    with Journal(whole / "journal.sqlite", read_only=True) as journal:
        sums = journal.sums()
    steps = rows(whole)[1:]
    assert sums.open == 0
    assert sums.sampled == sum(int(r["tokens/sampled"]) for r in steps)  # type: ignore[call-overload]
    assert sums.trained == sum(int(r["tokens/trained"]) for r in steps)  # type: ignore[call-overload]
    assert sum(sums.groups.values()) == 24


def test_two_runs_are_the_same_bits(policy: Path, whole: Path, tmp_path: Path) -> None:
    run(recipe(tmp_path, policy, "run"))
    again = tmp_path / "out" / "run"
    assert rows(again) == rows(whole)
    assert same_weights(again, whole)


def test_taking_turns_changes_no_bit_and_is_said_once(policy: Path, whole: Path, tmp_path: Path) -> None:
    """Colocated on a CPU, stopped after step 2 and resumed, with evaluations between: the bits of the run that nothing interrupts."""
    path = recipe(tmp_path, policy, "run", **{"{engine: hf,": "{engine: hf, placement: colocate,"})
    said = run(path, "learner.steps=2")
    assert said.count("placement colocate: engines stand still while the learner learns; there is no GPU") == 1
    run(path)
    again = tmp_path / "out" / "run"
    assert [row for row in rows(again) if row["step"] > 2] == [row for row in rows(whole) if row["step"] > 2]
    assert same_weights(again, whole)


def test_a_killed_run_ends_where_one_ends_that_was_not(policy: Path, whole: Path, tmp_path: Path) -> None:
    """Killed with -9 somewhere after its first checkpoint, and started again with the same command."""
    path = recipe(tmp_path, policy, "run")
    folder = tmp_path / "out" / "run"
    process = subprocess.Popen(command(path), cwd=CHECKOUT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while not (folder / "metrics.jsonl").exists() or len((folder / "metrics.jsonl").read_text().splitlines()) < 4:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert (folder / "checkpoints" / "step-2").is_dir() and not (folder / "final").exists()
    said = run(path)
    assert "going on from" in said
    assert rows(folder) == rows(whole)
    assert same_weights(folder, whole)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_end_it_leaves_a_checkpoint_and_a_code_to_start_again_on(number: int, policy: Path, whole: Path, tmp_path: Path) -> None:
    path = recipe(tmp_path, policy, "run")
    folder = tmp_path / "out" / "run"
    process = subprocess.Popen(
        command(path, "checkpoint.every=0"), cwd=CHECKOUT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 200
    while not (folder / "metrics.jsonl").exists() or len((folder / "metrics.jsonl").read_text().splitlines()) < 2:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 75 and "start again" in said
    assert json.loads((folder / "exit.json").read_text())["code"] == 75
    assert list((folder / "checkpoints").glob("step-*"))
    run(path)
    assert rows(folder) == rows(whole)
    assert same_weights(folder, whole)


def test_a_second_ctrl_c_ends_it_at_once_with_a_line(policy: Path, tmp_path: Path) -> None:
    """It waits for a reward that hangs: the first is heard, and would be obeyed when the step is done."""
    path = recipe(tmp_path, policy, "run")
    plugin = tmp_path / "hangs.py"
    plugin.write_text("import time\ndef hangs(completions, **columns):\n    time.sleep(600)\n")
    slow = [f"rewards.plugins=[{plugin}:hangs]", "rewards.parts=[{name: hangs, timeout_s: 900}]"]
    process = subprocess.Popen(command(path, *slow), cwd=CHECKOUT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    folder, deadline = tmp_path / "out" / "run", time.monotonic() + 200
    while not (folder / "journal.sqlite").exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    time.sleep(3.0)
    os.kill(process.pid, signal.SIGINT)
    assert process.stderr is not None
    first = ""
    while "asked to end" not in first:  # two that come before Python has seen the first are one
        line = process.stderr.readline()
        assert line, first
        first += line
    assert process.poll() is None
    os.kill(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    said = first + said
    assert process.returncode == 130, said
    assert "Ctrl-C again ends it at once" in said and "ended at once; start again" in said and "Traceback" not in said
    assert json.loads((folder / "exit.json").read_text())["code"] == 130


def test_the_end_of_the_launcher_leaves_a_checkpoint_too(policy: Path, tmp_path: Path) -> None:
    path = recipe(tmp_path, policy, "run")
    folder = tmp_path / "out" / "run"
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1"]
    process = subprocess.Popen(
        [*launcher, "--mixed_precision=no", "--dynamo_backend=no", *command(path, "checkpoint.every=0", "learner.steps=200")[1:]],
        cwd=CHECKOUT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 200
    while not (folder / "metrics.jsonl").exists() or len((folder / "metrics.jsonl").read_text().splitlines()) < 2:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    process.terminate()
    process.wait()
    while not (folder / "exit.json").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert json.loads((folder / "exit.json").read_text())["code"] == 75
    assert list((folder / "checkpoints").glob("step-*"))


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(policy: Path, whole: Path, tmp_path: Path) -> None:
    path = recipe(tmp_path, policy, "run")
    folder = tmp_path / "out" / "run"
    run(path, "learner.steps=4")
    weights_file = folder / "checkpoints" / "step-4" / "model.safetensors"
    data = bytearray(weights_file.read_bytes())
    data[-1] ^= 1
    weights_file.write_bytes(data)
    said = run(path)
    assert "step-4: damaged (model.safetensors is not what was written)" in said and "going on from" in said
    assert (folder / "checkpoints" / "damaged-step-4").is_dir()
    assert rows(folder) == rows(whole)
    assert same_weights(folder, whole)


def test_another_policy_in_the_same_folder_is_not_gone_on_with(policy: Path, tmp_path: Path) -> None:
    mine = tmp_path / "policy"
    shutil.copytree(policy, mine)
    path = recipe(tmp_path, mine, "run")
    run(path, "learner.steps=1")
    data = bytearray((mine / "model.safetensors").read_bytes())
    data[-3] ^= 1
    (mine / "model.safetensors").write_bytes(data)
    done = subprocess.run(command(path), cwd=CHECKOUT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("policy: not what ") and "run.name" in done.stderr


def test_a_run_that_goes_on_with_another_reward_function_says_so_and_keeps_both_versions(policy: Path, tmp_path: Path) -> None:
    path = recipe(tmp_path, policy, "run")
    assert "has changed" not in run(path, "learner.steps=1")
    (tmp_path / "plugin.py").write_text(PLUGIN.replace("/ 6", "/ 7"))
    assert "rewards: 'digits' has changed since this run was last scored" in run(path, "learner.steps=2")
    assert "has changed" not in run(path, "learner.steps=3")
    with Journal(tmp_path / "out" / "run" / "journal.sqlite", read_only=True) as journal:
        before, now = journal.meta(META)["digits"].split()
    assert before != now


def test_a_finished_run_prints_its_result_again(whole: Path) -> None:
    path = whole.parent.parent / "run.yaml"
    before = (whole / "metrics.jsonl").read_text()
    assert "finished before" in run(path)
    assert (whole / "metrics.jsonl").read_text() == before


def test_micro_batches_and_a_kl_term_run(policy: Path, tmp_path: Path) -> None:
    path = recipe(tmp_path, policy, "kl")
    run(path, "learner.steps=2", "learner.micro_tokens=40", "loss.kl_coef=0.01", "policy.precision=bf16", "log.trackers=[tensorboard]")
    found = rows(tmp_path / "out" / "kl")
    assert float(found[1]["kl"]) >= 0.0 and float(found[2]["kl"]) > 0.0  # type: ignore[arg-type]
    assert list((tmp_path / "out" / "kl" / "trackers").rglob("events*"))


def test_an_adapter_goes_on_after_a_stop(policy: Path, tmp_path: Path) -> None:
    lora = ("policy.lora={rank: 4, alpha: 8}", "loss.kl_coef=0.01", "eval.every=2")
    whole = recipe(tmp_path, policy, "whole")
    run(whole, *lora)
    parts = recipe(tmp_path, policy, "parts")
    parts.write_text(parts.read_text().replace("name: parts", "name: whole").replace(str(tmp_path / "out"), str(tmp_path / "again")))
    run(parts, *lora, "learner.steps=4")
    assert "going on from" in run(parts, *lora)
    a, b = tmp_path / "out" / "whole", tmp_path / "again" / "whole"
    assert rows(a) == rows(b)
    assert same_weights(a, b)
    start, end = load_file(policy / "model.safetensors"), weights(a)
    moved = {name for name in start if not torch.equal(start[name], end[name])}
    assert any("experts" in name for name in moved) and "lm_head.weight" not in moved


def test_dynamic_sampling_fills_the_batch_with_groups_that_teach(policy: Path, tmp_path: Path) -> None:
    """Half of the prompts teach nothing, by a reward that is 0 for even answers."""
    path = recipe(tmp_path, policy, "run")
    (tmp_path / "plugin.py").write_text(
        "def digits(completions, answer, **columns):\n"
        "    return [sum(c.isdigit() for c in text) * (int(gold) % 2) / 6 for text, gold in zip(completions, answer)]\n"
    )
    run(path, "rollout.resample_zero_groups=true", "rollout.max_resamples=6", "learner.steps=3")
    steps = rows(tmp_path / "out" / "run")[1:]
    assert [row["groups/trained"] for row in steps] == [4, 4, 4]
    assert all(row["groups/sampled"] == 4 + row["groups/zero_advantage"] for row in steps)  # type: ignore[operator]
    assert sum(int(row["groups/zero_advantage"]) for row in steps) > 3  # type: ignore[call-overload]
    with Journal(tmp_path / "out" / "run" / "journal.sqlite", read_only=True) as journal:
        sums = journal.sums()
    assert sums.open == 0 and sums.wasted["zero_advantage"] > 0
    assert sums.groups["trained"] == 12


def test_dynamic_sampling_ends_within_its_bound_where_nothing_teaches(policy: Path, tmp_path: Path) -> None:
    """4 prompts and two further rounds of 4; the last round is the step, and all of it is counted as waste."""
    path = recipe(tmp_path, policy, "run")
    (tmp_path / "plugin.py").write_text("def digits(completions, **columns):\n    return [0.0] * len(completions)\n")
    run(path, "rollout.resample_zero_groups=true", "rollout.max_resamples=2", "learner.steps=1")
    row = rows(tmp_path / "out" / "run")[1]
    assert (row["groups/sampled"], row["groups/zero_advantage"], row["groups/trained"]) == (12, 12, 0)
    assert row["tokens/trained"] == 0 and row["tokens/wasted"] == row["tokens/sampled"]
    assert row["grad_norm"] == 0.0


@pytest.mark.slow
def test_routing_bias_replayed_routes_and_the_mtp_module_go_on_after_a_stop_to_the_bit(tmp_path: Path) -> None:
    policy = deepseek_v3_with_module(tmp_path / "policy", seed=0)
    (tmp_path / "prompts.jsonl").write_text("".join(f'{{"prompt": "{a}{b}"}}\n' for a in "0123" for b in "456"))
    path = recipe(tmp_path, policy, "run", **{"{task: arithmetic, options: {digits: 1}}": f"{{path: {tmp_path / 'prompts.jsonl'}}}"})
    routing = ["loss.replay=rollout", "learner.router.bias_step=0.01", "learner.router.sequence_loss=0.001", "eval.prompts=null"]
    routing.append("learner.mtp.weight=0.3")
    run(path, *routing, "learner.steps=4")
    out = tmp_path / "out" / "run"
    out.rename(tmp_path / "whole")
    for steps in (2, 4):
        run(path, *routing, f"learner.steps={steps}")
    assert same_weights(out, tmp_path / "whole") and rows(out) == rows(tmp_path / "whole")
    last = rows(out)[-1]
    assert last["replay/live_tokens"] == 0.0 and last["mismatch/older_tokens"] == 0.0 and last["moe/max_violation"] > 0.0
    assert 0.0 < last["mtp/acceptance"] < 1.0
    names = [f"step-{n}.npz" for n in (1, 2, 3, 4)]
    assert sorted(p.name for p in (out / "router").iterdir()) == names
    for name in names:
        with np.load(out / "router" / name) as ours, np.load(tmp_path / "whole" / "router" / name) as wanted:
            assert np.array_equal(ours["load"], wanted["load"]) and np.array_equal(ours["bias"], wanted["bias"])
            bias = ours["bias"]
    final = weights(out)["model.layers.1.mlp.gate.e_score_correction_bias"]
    assert np.array_equal(bias[0], final.numpy()), "final/ holds the bias after the last step"
