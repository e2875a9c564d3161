"""Weights, gates and failures, by hand."""

import pytest

from rewards.combine import Outcome, combine, combine_group
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


@pytest.mark.parametrize(("clip", "value"), [((None, 0.8), 0.8), ((1.5, 2.0), 1.5), ((0.0, 2.0), 1.0), ((None, None), 1.0)])
def test_a_clip_bounds_what_is_summed_and_not_what_is_logged(clip, value):
    score = combine([PartConfig(name="answer", clip=clip)], {"answer": ONE})
    assert (score.value, score.parts) == (value, {"answer": 1.0})


def test_a_clip_does_not_lift_what_a_gate_has_set_to_0():
    parts = [PartConfig(name="answer", requires="gate", clip=(0.5, 1.0))]
    assert combine(parts, {"answer": ONE, "gate": ZERO}).value == 0.0


def test_parts_are_normalised_within_their_group_before_they_are_summed():
    # answer: mean 1/2, std 1/2 over the two that were judged and did not fail; length: all equal, so it says nothing
    parts = [PartConfig(name="answer"), PartConfig(name="length", weight=3.0)]
    group = [{"answer": o, "length": Outcome(100.0)} for o in (ONE, ZERO, LATE)] + [{"answer": NONE, "length": Outcome(100.0)}]
    scores = combine_group(parts, group, normalize=True)
    high = 0.5 / (0.5 + 1e-4)
    assert [score.value for score in scores] == [pytest.approx(high), pytest.approx(-high), None, 0.0]
    assert [score.status for score in scores] == ["ok", "ok", "timeout", "ok"]
    assert scores[0].parts == {"answer": 1.0, "length": 100.0}


def test_normalisation_gives_parts_of_any_size_the_same_voice():
    parts = [PartConfig(name="small"), PartConfig(name="large")]
    group = [{"small": Outcome(s), "large": Outcome(v)} for s, v in ((0.0, 1000.0), (1.0, 0.0))]
    assert [round(score.value, 6) for score in combine_group(parts, group, normalize=True)] == pytest.approx([0.0, 0.0], abs=1e-3)
    assert [score.value for score in combine_group(parts, group)] == [1000.0, 1.0]


def test_a_shadow_is_logged_and_changes_no_score_even_if_it_fails():
    group = [{"answer": ONE, "shadow": Outcome(0.25)}, {"answer": ZERO, "shadow": Outcome(None, "error", "shadow: it broke")}]
    first, second = combine_group([PartConfig(name="answer")], group, shadows=["shadow"])
    assert (first.value, first.parts) == (1.0, {"answer": 1.0, "shadow": 0.25})
    assert (second.value, second.status, second.detail) == (0.0, "ok", "(shadow) shadow: it broke")
