"""The table: differences are paired by prompt, and an evaluation is done once for the weights it is of."""

import json
import math
import sys

import pytest
from curation import prompts_file
from policies import tiny_qwen3_moe

import sft.table
from sft.table import paired

RECIPE = """
run: {name: table}
policies: [{name: first, path: first}, {name: the same, path: same}, {name: other, path: other}]
domains:
  - {name: numbers, prompts: {path: prompts.jsonl}, against: first}
  - {name: few, prompts: {path: prompts.jsonl, limit: 3}, against: other}
compare: the same
samples: 2
rollout: {engine: hf, max_tokens: 4}
rewards: {parts: [{name: regex, options: {pattern: '[0-9A-F]'}}], workers: 1}
threads: 1
"""


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, seed in (("first", 1), ("same", 1), ("other", 2)):
        tiny_qwen3_moe(tmp_path / name, seed=seed)
    prompts_file(tmp_path / "prompts.jsonl", 6)
    (tmp_path / "table.yaml").write_text(RECIPE)

    def run(*overrides):
        monkeypatch.setattr(sys, "argv", ["sft.table", "table.yaml", *overrides])
        code = sft.table.main()
        return code, *capsys.readouterr()

    return run


def test_a_paired_interval_is_that_of_the_differences():
    value, half = paired([0.5, -0.25, 0.25, 0.5])
    assert value == 0.25
    assert half == pytest.approx(1.959964 * math.sqrt((0.0625 + 0.25 + 0.0 + 0.0625) / 3) / 2)


def test_the_same_weights_differ_by_nothing_and_are_judged_once(command, tmp_path):
    code, output, errors = command()
    assert code == 0, errors
    assert "the same against first on numbers: +0.0 points, paired 95 % interval +0.0 to +0.0" in output
    assert "first on numbers …" in output
    held = json.loads((tmp_path / "outputs/table/other-few.json").read_text())
    assert held["evaluations"][0]["pass@1"]["value"] == pytest.approx(sum(held["right"].values()) / 3)
    compared = json.loads((tmp_path / "outputs/table/table.json").read_text())["comparisons"]
    assert compared[0]["holds"] is True
    same = json.loads((tmp_path / "outputs/table/the same-few.json").read_text())["right"]
    assert compared[1]["difference"] == pytest.approx(sum(same[p] - held["right"][p] for p in same) / 3)
    code, output, _ = command("margin=0.5")
    assert code == 0 and "…" not in output.split("pass@1")[0], "nothing is judged again"


def test_other_prompts_in_the_same_file_and_a_grader_that_changed_are_judged_anew(command, tmp_path):
    grader = "def grader(completions, **_):\n    return [{} for _ in completions]\n"
    (tmp_path / "mine.py").write_text(grader.format("0.0"))
    overrides = ["rewards.plugins=[./mine.py:grader]", "rewards.parts=[{name: grader}]"]
    assert command(*overrides)[0] == 0
    prompts_file(tmp_path / "prompts.jsonl", 7)
    code, output, errors = command(*overrides)
    assert code == 0, errors
    assert output.count("…") == 6
    held = tmp_path / "outputs/table/first-numbers.json"
    assert set(json.loads(held.read_text())["right"].values()) == {0.0} and len(json.loads(held.read_text())["right"]) == 7
    (tmp_path / "mine.py").write_text(grader.format("1.0"))
    command(*overrides)
    assert set(json.loads(held.read_text())["right"].values()) == {1.0}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("compare=fist", "no policy named 'fist'; did you mean 'first'?"),
        ("policies[2].path=./nothere", "policy.path: no folder 'nothere'"),
        ("domains[0].prompts.path=nothere.jsonl", "nothere.jsonl: no such file"),
    ],
)
def test_a_mistake_is_one_line_with_code_2(command, tmp_path, override, message):
    code, _, errors = command(override)
    assert code == 2 and message in errors
    assert len(errors.strip().splitlines()) == 1
    assert not (tmp_path / "outputs").exists()
