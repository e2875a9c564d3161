"""Whatever the schedule of sampling, scoring, learning, syncing and deaths: every group has one end, and the same as undisturbed."""

import random
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from schedules import Shape, check

from data.journal import Journal
from rl.ahead import AheadStream
from rl.stream import GroupStream

SHAPES = st.builds(
    Shape,
    steps=st.integers(1, 6),
    per_step=st.integers(1, 4),
    group_size=st.integers(2, 4),
    engines=st.integers(1, 3),
    whole_groups=st.booleans(),
    resample_zero_groups=st.booleans(),
    every=st.integers(1, 3),
    keep=st.integers(1, 2),
)


@settings(max_examples=25, deadline=None)
@given(shape=SHAPES, seed=st.integers(0, 2**32))
def test_after_any_schedule_of_deaths_every_group_has_the_end_it_would_have_had(shape: Shape, seed: int) -> None:
    check(shape, random.Random(seed))


AHEAD = st.builds(
    Shape,
    steps=st.integers(1, 6),
    per_step=st.integers(1, 4),
    engines=st.integers(1, 3),
    whole_groups=st.booleans(),
    resample_zero_groups=st.booleans(),
    max_staleness=st.integers(1, 3),
    in_flight=st.booleans(),
    oversample=st.sampled_from([0.0, 0.5, 1.0]),
    every=st.integers(1, 3),
)


@settings(max_examples=25, deadline=None)
@given(shape=AHEAD, seed=st.integers(0, 2**32))
def test_ahead_of_the_learner_no_token_is_too_old_and_every_group_has_one_end(shape: Shape, seed: int) -> None:
    check(shape, random.Random(seed))


def test_a_token_that_is_too_old_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check itself, on a stream that drops nothing and waits for nobody."""
    monkeypatch.setattr(AheadStream, "_drop_stale", lambda self: None)
    monkeypatch.setattr(AheadStream, "_due", lambda self, count: [])
    with pytest.raises(AssertionError, match="ages"):
        for seed in range(40):
            check(Shape(max_staleness=1, in_flight=True, oversample=1.0), random.Random(seed))


def test_the_schedules_hold_deaths_of_both_kinds_and_resumes() -> None:
    rng = random.Random(0)
    seen = sum((check(Shape(), rng) for _ in range(4)), start=check(Shape(), rng))
    for what in ("death of the run", "death of an engine", "another life", "damaged checkpoint", "checkpoint", "use"):
        assert seen[what] >= 1, (what, seen)


def test_a_group_that_is_forgotten_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check itself, on a journal that forgets what became of the second group of each prompt."""
    real = Journal.use
    monkeypatch.setattr(Journal, "use", lambda self, group, *rest: None if group.endswith("/1") else real(self, group, *rest))
    with pytest.raises(AssertionError, match="a group has no end"):
        check(Shape(), random.Random(0))


def test_a_group_that_is_given_to_two_steps_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check itself, on a run that begins at another prompt when it goes on."""

    class Forgetful(GroupStream):
        def restore(self, step: int, state: Mapping[str, Any]) -> None:
            super().restore(step, {"position": max(0, state.get("position", 0) - 1)})

    monkeypatch.setattr("schedules.GroupStream", Forgetful)
    with pytest.raises(AssertionError, match=r"was \w+ in step \d+, and is now"):
        for seed in range(5):
            check(Shape(), random.Random(seed))
