"""`rl.account`: the numbers of a run's journal are those of its metrics and of its files of completions, also after a death."""

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from killing import forked, make_policy, make_recipe, rows

import rl.account
from data.journal import Journal, Slot
from data.journal_sums import TRAINED
from data.values import Completion, Score


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_policy(tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="module")
def run(policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps with completions that fail, are not judged and are cut off, and groups that fail for it."""
    folder = tmp_path_factory.mktemp("run")
    recipe = make_recipe(folder, policy, loss={"mask_truncated": True})
    assert forked(recipe) == 0, (folder / "output.log").read_text()[-3000:]
    return folder / "run"


def account(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["rl.account", str(run), *options])
    code = rl.account.main()
    return code, *capsys.readouterr()


def as_json(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    code, out, _ = account(run, monkeypatch, capsys, "--json")
    assert code == 0
    return json.loads(out)


def test_the_account_is_the_sum_of_the_metrics(run, monkeypatch, capsys):
    found, steps = as_json(run, monkeypatch, capsys), rows(run)[1:]
    tokens = found["tokens"]
    for name in ("sampled", "trained"):
        assert tokens[name] == sum(row[f"tokens/{name}"] for row in steps)
    assert sum(tokens["wasted"].values()) == sum(row["tokens/wasted"] for row in steps)
    assert tokens["open"] == 0
    assert found["groups"].pop("open") == 0
    assert found["groups"] == {r: n for r in found["groups"] if (n := sum(row[f"groups/{r}"] for row in steps))}
    assert sum(found["groups"].values()) == sum(row["groups/sampled"] for row in steps)
    assert min(tokens["trained"], tokens["wasted"]["failed"], tokens["wasted"]["truncated"], found["groups"]["failed"]) > 0
    assert (found["steps"], found["steps_in_checkpoint"], found["provisional_uses"], found["void"]) == (6, 6, 0, {})


def test_the_files_of_completions_hold_every_token_under_its_reason(run, monkeypatch, capsys):
    found = as_json(run, monkeypatch, capsys)
    by_outcome: Counter[str] = Counter()
    for row in pq.read_table(run / "completions").to_pylist():
        by_outcome[row["outcome"]] += row["tokens"]
        assert row["outcome"] != "trained" or (row["status"] == "ok" and row["finish_reason"] == "stop")
    assert by_outcome.pop("trained") == found["tokens"]["trained"]
    assert dict(by_outcome) == found["tokens"]["wasted"]


def test_people_see_the_same_numbers(run, monkeypatch, capsys):
    found = as_json(run, monkeypatch, capsys)
    code, out, _ = account(run, monkeypatch, capsys, "--prompts", "3")
    assert code == 0
    table = {line.split()[0]: line.split() for line in out.splitlines() if line}
    assert out.startswith(f"{run}: 6 steps, a checkpoint contains 6 of them\n")
    assert table["trained"][1:3] == [str(found["groups"]["trained"]), f"{found['tokens']['trained']:,}"]
    assert table["truncated"][2] == f"{found['tokens']['wasted']['truncated']:,}"
    assert table["together"][1:3] == [str(sum(found["groups"].values())), f"{found['tokens']['sampled']:,}"]
    assert "right: digits is 1 or more" in out and "pass rate in steps" in out
    assert f"and {len(found['prompts']) - 3} prompts more" in out


def test_after_a_death_it_says_what_is_provisional_and_later_what_was_void(policy, tmp_path, monkeypatch, capsys):
    recipe = make_recipe(tmp_path, policy)
    assert forked(recipe, "uses: after their transaction") == -9
    dead = as_json(tmp_path / "run", monkeypatch, capsys)
    provisional = dead["provisional_uses"]
    assert (dead["steps"], dead["steps_in_checkpoint"], dead["void"]) == (3, 2, {})
    assert provisional >= 4
    assert f"{provisional} uses are provisional" in account(tmp_path / "run", monkeypatch, capsys)[1]
    assert forked(recipe) == 0
    found = as_json(tmp_path / "run", monkeypatch, capsys)
    assert sum(void["uses"] for void in found["void"].values()) == provisional
    assert found["tokens"]["open"] == 0 and found["provisional_uses"] == 0
    assert f"void: {provisional} uses of" in account(tmp_path / "run", monkeypatch, capsys)[1]


# --- by hand ----------------------------------------------------------------------------------------------------------


def answered(journal: Journal, position: int, prompt: str, step: int, verdicts: list[float | None]) -> None:
    """A group of one token a completion, trained in a step; None is a failed score."""
    attempt = journal.begin([Slot("run", position, prompt)], len(verdicts), step, step)[0]
    one = np.ones(1)
    journal.put_completions([
        Completion(prompt, attempt.group_id, i, 0, i, one.astype(np.int32), one.astype(np.uint8), -one.astype(np.float32),
                   one.astype(np.int32), "stop", "hf")
        for i in range(len(verdicts))
    ])  # fmt: skip
    scores = {i: Score(v, parts={"a b": v}) if v is not None else Score(None, "error", {"a b": None}) for i, v in enumerate(verdicts)}
    journal.put_scores(attempt.group_id, scores)
    journal.use(attempt.group_id, step, TRAINED)


def test_pass_rates_over_time_by_hand(tmp_path, monkeypatch, capsys):
    with Journal(tmp_path / "journal.sqlite") as journal:
        answered(journal, 0, "easy", 0, [1, 1, 1, 1])
        answered(journal, 1, "hard", 0, [0, 0, None, None])
        answered(journal, 2, "hard", 9, [1, 0, 0.5, 0])
        # beside the one who writes
        code, out, _ = account(tmp_path, monkeypatch, capsys)
        assert code == 0 and journal.account("a b").prompts["hard"] == journal.account().prompts["hard"]
    lines = [line.split() for line in out.splitlines()]
    assert lines[-7:] == [
        ["pass", "rate", "in", "steps", "1-2", "3-4", "5-6", "7-8", "9-10"],
        ["mean", "over", "prompts", "50", "%", "-", "-", "-", "25", "%"],
        ["prompts", "seen", "2", "0", "0", "0", "1"],
        ["never", "right", "1", "0", "0", "0", "0"],
        ["always", "right", "1", "0", "0", "0", "0"],
        ["hard", "0", "%", "-", "-", "-", "25", "%"],
        ["easy", "100", "%", "-", "-", "-", "-"],
    ]
    assert "10 steps, a checkpoint contains 0 of them, 3 uses are provisional" in out


def test_a_folder_that_is_no_run_is_one_line(tmp_path, monkeypatch, capsys):
    code, out, err = account(tmp_path / "none", monkeypatch, capsys)
    assert (code, out) == (2, "") and err == f"{tmp_path / 'none'}: no such folder; name a run's, such as outputs/quickstart\n"
    code, out, err = account(tmp_path, monkeypatch, capsys)
    assert (code, out) == (2, "") and err.count("\n") == 1 and "no journal here" in err
    assert list(tmp_path.iterdir()) == []


def test_sums_that_do_not_close_are_said(tmp_path, monkeypatch, capsys):
    with Journal(tmp_path / "journal.sqlite") as journal:
        answered(journal, 0, "p", 0, [1, 0])
        journal._db.execute("UPDATE completion SET sampled = 3 WHERE idx = 0")
        with pytest.raises(AssertionError, match=r"group 1: 2 tokens used, 2 trained, 0 masked, 4 sampled"):
            journal.contain(1, oldest=1)
    code, out, err = account(tmp_path, monkeypatch, capsys)
    assert (code, out) == (1, "") and "the account does not close" in err
