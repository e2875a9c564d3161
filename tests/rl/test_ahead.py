"""Whole tiny runs that sample ahead of the learner: nothing too old is trained, and after a kill every group has one end."""

from pathlib import Path
from typing import Any

import pytest
from killing import account_problems, forked, make_policy, make_recipe, rows, started

from data.journal import Journal

AHEAD: dict[str, dict[str, Any]] = {
    "one step ahead": {"max_staleness": 1},
    "in flight": {"max_staleness": 1, "in_flight": True},
    "slowest put off": {"max_staleness": 2, "oversample": 1.0, "engines": 2},
}


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_policy(tmp_path_factory.mktemp("policy") / "tiny")


@pytest.mark.parametrize("rollout", AHEAD.values(), ids=AHEAD)
def test_what_is_trained_is_not_too_old_and_the_account_closes(rollout: dict[str, Any], policy: Path, tmp_path: Path) -> None:
    assert forked(make_recipe(tmp_path, policy, rollout=rollout)) == 0, (tmp_path / "output.log").read_text()
    run = tmp_path / "run"
    steps = rows(run)[1:]
    assert len(steps) == 6 and account_problems(run) == []
    assert all(row["staleness/max"] <= rollout["max_staleness"] for row in steps)
    assert any(row["staleness/mean"] > 0 for row in steps), "engines sampled while the learner learned"
    assert steps[0]["staleness/max"] == 0.0 and steps[-1]["groups/ahead"] == 0.0
    older = [row["mismatch/older_tokens"] for row in steps if "mismatch/older_tokens" in row]
    assert max(older) > 0 and all("mismatch/older/kl" in row for row in steps if row.get("mismatch/older_tokens"))
    with Journal(run / "journal.sqlite", read_only=True) as journal:
        query = """SELECT max(use.step - version_min), min(use.step - version_max) FROM use JOIN completion USING (attempt)
                   WHERE void IS NULL AND reason = 'trained'"""
        age, youngest = journal._db.execute(query).fetchone()
    assert age <= rollout["max_staleness"] and youngest >= 0


@pytest.mark.parametrize(
    "crash",
    ["uses: before their transaction", "sync: weights written, no engine has them", "checkpoint: after the rename, before `contain`"],
)
def test_a_run_that_was_killed_goes_on_and_every_group_has_one_end(crash: str, policy: Path, tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, policy, rollout={"max_staleness": 2, "oversample": 1.0})
    assert forked(recipe, crash) == -9
    assert forked(recipe) == 0, (tmp_path / "output.log").read_text()
    run = tmp_path / "run"
    assert [row["step"] for row in rows(run)] == list(range(7))
    assert all(row["staleness/max"] <= 2 for row in rows(run)[1:])
    assert [problem for problem in account_problems(run) if not known_waste(run, problem)] == []


def known_waste(run: Path, problem: str) -> bool:
    """Tokens of groups that the lineage of the last checkpoint does not have are in the account, and in no step's metrics."""
    if problem.startswith("groups/aborted"):
        return True
    if not problem.startswith("tokens/sampled"):
        return False
    with Journal(run / "journal.sqlite", read_only=True) as journal:
        sums = journal.sums()
    metric = sum(row["tokens/sampled"] for row in rows(run)[1:])
    return sums.sampled - metric == sums.wasted.get("aborted", 0) + sums.wasted.get("resampled", 0)


TALK = """
async def talk(generate, prompt):
    turn = await generate(max_tokens=3)
    told = turn.token_ids + generate.encode("7")
    rest = await generate(told)
    return told + rest.token_ids, [1] * len(turn.token_ids) + [0] + [1] * len(rest.token_ids)
"""


@pytest.mark.parametrize("in_flight", [False, True], ids=["between turns", "in flight"])
def test_conversations_go_on_over_an_update(in_flight: bool, policy: Path, tmp_path: Path) -> None:
    (tmp_path / "tool.py").write_text(TALK)
    rollout = {"max_staleness": 1, "in_flight": in_flight, "conversation": f"{tmp_path / 'tool.py'}:talk"}
    assert forked(make_recipe(tmp_path, policy, rollout=rollout)) == 0, (tmp_path / "output.log").read_text()
    steps = rows(tmp_path / "run")[1:]
    assert account_problems(tmp_path / "run") == []
    assert max(row["staleness/max"] for row in steps) == 1.0
    assert all(row["conversation/failed"] == 0.0 for row in steps) and max(row["conversation/turns"] for row in steps) > 1.0


@pytest.mark.slow
def test_two_ranks_learn_from_what_was_sampled_ahead(policy: Path, tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, policy, rollout={"max_staleness": 1, "in_flight": True})
    assert started(recipe, ranks=2) == 0, (tmp_path / "output.log").read_text()
    assert account_problems(tmp_path / "run") == []
    assert max(row["staleness/max"] for row in rows(tmp_path / "run")[1:]) == 1.0
