"""Runs killed with -9 at named points and started again end as one that was never killed. All points: `tests/bench/kill.py`."""

import json
import subprocess
import time
from pathlib import Path

import pytest
from crash import CHECKOUT, POINTS, resolve
from killing import LIMIT_S, account_problems, command, differences, environment, forked, make_policy, make_recipe, started, voided


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_policy(tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="module")
def whole(policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbs."""
    folder = tmp_path_factory.mktemp("whole")
    assert forked(make_recipe(folder, policy)) == 0, (folder / "output.log").read_text()[-3000:]
    return folder / "run"


def test_every_named_point_is_around_a_function_that_there_is() -> None:
    assert len(POINTS) >= 40
    for name, point in POINTS.items():
        owner, attribute = resolve(point)
        assert callable(getattr(owner, attribute)), name


@pytest.mark.parametrize(
    "point",
    [
        "completions: after it, between sampling and scoring",
        "uses: after their transaction",
        "checkpoint: after the rename, before `contain`",
    ],
)
def test_killed_at_a_named_point_a_run_ends_as_if_it_was_not(point: str, policy: Path, whole: Path, tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, policy)
    assert forked(recipe, point) == -9
    assert forked(recipe) == 0, (tmp_path / "output.log").read_text()[-3000:]
    assert differences(tmp_path / "run", whole) == []
    assert voided(tmp_path / "run") > 0 or not point.startswith("uses")


def test_killed_again_and_again_it_still_does(policy: Path, whole: Path, tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, policy)
    for point in ("claim: before the recipe is renamed into place", "sync: before it:1", "checkpoint: before the rename", "end: after it"):
        assert forked(recipe, point) == -9, point
    assert forked(recipe) == 0
    assert differences(tmp_path / "run", whole) == []


@pytest.mark.slow
def test_two_ranks_of_which_one_is_killed_end_as_if_it_was_not(policy: Path, tmp_path: Path) -> None:
    whole = make_recipe(tmp_path / "whole", policy)
    assert started(whole, ranks=2) == 0, whole.with_name("output.log").read_text()[-3000:]
    recipe = make_recipe(tmp_path / "killed", policy)
    assert started(recipe, "checkpoint: after the optimizer@1", ranks=2) != 0
    assert started(recipe, ranks=2) == 0, recipe.with_name("output.log").read_text()[-3000:]
    assert differences(tmp_path / "killed" / "run", tmp_path / "whole" / "run") == []


@pytest.mark.slow
def test_two_ranks_that_are_asked_to_end_leave_a_checkpoint_to_go_on_from(policy: Path, tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, policy, checkpoint={"every": 0})
    with open(tmp_path / "output.log", "wb") as output:
        process = subprocess.Popen(command(recipe, ranks=2), cwd=CHECKOUT, env=environment(), stdout=output, stderr=output)
        metrics, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + LIMIT_S
        while not metrics.exists() or len(metrics.read_text().splitlines()) < 2:
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.02)
        process.terminate()
        assert process.wait(LIMIT_S) != 0
    assert json.loads((tmp_path / "run" / "exit.json").read_text())["code"] == 75
    assert started(recipe, ranks=2) == 0
    assert account_problems(tmp_path / "run") == []
    assert "going on from" in (tmp_path / "output.log").read_text()
