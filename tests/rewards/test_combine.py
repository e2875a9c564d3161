"""Weights, gates and failures, by hand."""

import pytest

from rewards.combine import Outcome, combine
from rewards.config import PartConfig

ONE, ZERO, HALF = Outcome(1.0), Outcome(0.0), Outcome(0.5)
NONE = Outcome(None, "unscored")
ERROR = Outcome(None, "error", "gate: it broke")
LATE = Outcome(None, "timeout", "answer: no answer within 1 s")


@pytest.mark.parametrize(
    ("answer", "length", "value", "status"),
    [
        (ONE, HALF, 1.1, "ok"),
        (ZERO, HALF, 0.1, "ok"),
        (NONE, HALF, 0.1, "ok"),
        (ONE, NONE, 1.0, "ok"),
        (NONE, NONE, None, "unscored"),
        (LATE, HALF, None, "timeout"),
        (NONE, ERROR, None, "error"),
    ],
)
def test_unscored_parts_leave_the_sum_and_failed_ones_fail_the_score(answer, length, value, status):
    parts = [PartConfig(name="answer"), PartConfig(name="length", weight=0.2)]
    score = combine(parts, {"answer": answer, "length": length})
    assert (score.value, score.status) == (value, status)
    assert score.parts == {"answer": answer.value, "length": length.value}


@pytest.mark.parametrize(
    ("gate", "answer", "value", "status"),
    [
        (ONE, ONE, 1.0, "ok"),
        (Outcome(2.0), ONE, 1.0, "ok"),
        (Outcome(0.999), ONE, 0.0, "ok"),
        (ZERO, ONE, 0.0, "ok"),
        (ZERO, NONE, 0.0, "ok"),
        (NONE, ONE, None, "unscored"),
        (ONE, NONE, None, "unscored"),
        (ERROR, ONE, None, "error"),
        (ZERO, LATE, None, "timeout"),
    ],
)
def test_a_gate_passes_at_1_and_may_be_no_part(gate, answer, value, status):
    score = combine([PartConfig(name="answer", requires="gate")], {"answer": answer, "gate": gate})
    assert (score.value, score.status) == (value, status)


def test_a_part_of_weight_0_is_logged_and_judges_nothing():
    parts = [PartConfig(name="answer"), PartConfig(name="length", weight=0.0)]
    assert combine(parts, {"answer": NONE, "length": ONE}).status == "unscored"
    assert combine(parts, {"answer": ONE, "length": HALF}).parts == {"answer": 1.0, "length": 0.5}


def test_a_failed_score_says_everything_that_failed():
    parts = [PartConfig(name="answer"), PartConfig(name="gate")]
    assert combine(parts, {"answer": LATE, "gate": ERROR}).detail == "answer: no answer within 1 s; gate: it broke"
