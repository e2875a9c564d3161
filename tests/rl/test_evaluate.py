"""Evaluation: its estimators against enumeration and by hand, and the command on a tiny policy."""

import json
import math
import sys
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

import policies
import pytest

import rl.evaluate
from rl.engines.base import EngineDead
from rl.evaluation import estimate, majority, pass_at_k

RECIPE = """
run: {name: tiny, seed: 5}
policy: {path: POLICY}
prompts: {path: prompts.jsonl}
rollout: {engine: hf, max_tokens: 6, temperature: 1.0}
rewards: {parts: [{name: math_answer}]}
learner: {threads: 1}
eval: {samples: 3, temperature: 0.8, prompts: {path: prompts.jsonl}}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a policy, prompts and a recipe, and a temporary folder of its own."""
    policy = policies.tiny_qwen3_moe(tmp_path / "policy", seed=0)
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"{i}=", "answer": str(i)}) + "\n" for i in range(4)))
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("POLICY", str(policy)))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def evaluate(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["command", "recipe.yaml", *arguments])
    return rl.evaluate.main()


def without_times(path: Path) -> dict[str, Any]:
    values = json.loads(path.read_text())
    for one in values["evaluations"]:
        del one["seconds"]
    return values


# --- estimators -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 4, 7])
def test_pass_at_k_is_the_share_of_all_choices_of_k_that_hold_a_right_one(n: int) -> None:
    for c in range(n + 1):
        right = [i < c for i in range(n)]
        for k in range(1, n + 1):
            choices = [any(chosen) for chosen in combinations(right, k)]
            assert pass_at_k(n, c, k) == pytest.approx(fmean(choices), abs=1e-12)


def test_the_majority_decides_and_ties_share() -> None:
    assert majority(["7", "7", "8"], [True, True, False]) == 1.0
    assert majority(["7", "8", "8"], [True, False, False]) == 0.0
    assert majority(["7", "7", "8", "8", "9"], [True, True, False, False, False]) == 0.5
    assert majority(["7", "8", "9"], [True, False, False]) == pytest.approx(1 / 3)
    assert majority([" 7", "7 ", "8"], [True, True, False]) == 1.0, "blanks make no other answer"


def test_a_completion_without_an_answer_has_no_vote() -> None:
    assert majority([None, None, "7"], [False, False, True]) == 1.0
    assert majority([None, None], [False, False]) == 0.0


def test_an_interval_is_over_prompts() -> None:
    found = estimate([1.0, 0.0, 1.0, 1.0])
    # Mean 3/4; squares of the deviations 3/16 + 9/16 = 12/16, over 3: a variance of 1/4.
    assert found.value == 0.75
    assert found.half == pytest.approx(1.959964 * 0.5 / 2)
    assert str(found) == "75.0 % ± 49.0"
    assert estimate([1.0]).half == math.inf


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_gives_the_same_numbers_twice(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(monkeypatch, "--out", "a.json") == 0
    out = capsys.readouterr().out
    assert "pass@1" in out and "maj@3" in out and "greedy" in out
    assert evaluate(monkeypatch, "--out", "b.json") == 0
    a, b = without_times(folder / "a.json"), without_times(folder / "b.json")
    assert a == b
    warm, greedy = a["evaluations"]
    assert (warm["prompts"], warm["samples"], warm["temperature"], greedy["samples"], greedy["temperature"]) == (4, 3, 0.8, 1, 0.0)
    assert {"pass@1", "pass@2", "pass@3", "maj@3"} <= warm.keys()
    assert warm["unscored"] == 0 and 1 <= warm["mean_length"] <= 6 and warm["entropy"] > 0
    assert evaluate(monkeypatch, "run.seed=6", "--out", "c.json") == 0
    assert without_times(folder / "c.json")["evaluations"] != a["evaluations"], "another seed samples otherwise"
    left = sorted(entry.name for entry in folder.iterdir())
    assert left == ["a.json", "b.json", "c.json", "policy", "prompts.jsonl", "recipe.yaml", "temporary"], "no run folder"
    assert not any((folder / "temporary").iterdir()), "logs of what went well are removed"


def test_without_held_out_prompts_it_takes_those_of_training(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = ["eval.prompts=null", "prompts.limit=2", "eval.greedy=false", "eval.samples=1"]
    assert evaluate(monkeypatch, *changes, "--out", "a.json") == 0
    (only,) = without_times(folder / "a.json")["evaluations"]
    assert (only["prompts"], only["samples"]) == (2, 1)
    assert "2 prompts" in capsys.readouterr().out


def test_a_mistake_is_one_line_and_exit_code_2(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for changes, line in (
        (["eval.sample=3"], "override 'eval.sample=3': eval.sample: no such key; did you mean 'samples'?"),
        (["policy.path=./nowhere"], "policy.path: no folder 'nowhere'"),
        (["--out", "no/such/folder.json"], "--out: no folder 'no/such'"),
        (["rollout.max_model_len=6"], "rollout.max_tokens: 6 leaves no room for a prompt in a context of 6 tokens"),
    ):
        assert evaluate(monkeypatch, *changes) == 2
        captured = capsys.readouterr()
        assert captured.err.startswith(line) and captured.err.count("\n") == 1, captured.err
        assert not captured.out
    assert not any((folder / "temporary").iterdir())


def test_a_dead_engine_is_exit_code_1_and_its_logs_are_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def dead(*_: Any, **__: Any) -> None:
        raise EngineDead("engine engine-0 is gone: killed by SIGKILL")

    monkeypatch.setattr("rl.engines.make.make_engines", dead)
    assert evaluate(monkeypatch, "--out", "a.json") == 1
    error = capsys.readouterr().err
    (logs,) = (folder / "temporary").iterdir()
    assert "engine engine-0 is gone: killed by SIGKILL" in error and f"logs are in {logs}" in error
    assert not (folder / "a.json").exists()


def test_a_dry_run_says_how_much_would_be_sampled(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(monkeypatch, "--dry-run", "--out", "a.json") == 0
    out = capsys.readouterr().out
    assert "evaluation: 4 prompts x 4 completions, at most 96 tokens sampled" in out
    assert not (folder / "a.json").exists()
