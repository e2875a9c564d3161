"""The numbers of a step, by hand."""

import pytest
from made import make_groups

from data.values import Group
from rl.metrics import length_bias


def lengths(group: Group) -> list[int]:
    return [len(c.token_ids) for c in group.completions]


def test_length_bias_is_the_mean_length_of_what_teaches_over_that_of_all_that_was_sampled() -> None:
    teaching, alike, failed = make_groups([[1.0, 0.0, 0.0], [1.0, 1.0, 1.0], [None, None, 0.0]])
    assert (lengths(teaching), lengths(alike), lengths(failed)) == ([9, 1, 3], [1, 1, 5], [1, 9, 4])
    tokens = 13 + 7 + 14
    # Only the first teaches: 13 tokens in 3 completions, against 34 tokens in 9.
    assert length_bias([teaching, alike], tokens, 9) == {"completions/length_bias": pytest.approx((13 / 3) / (34 / 9))}
    assert length_bias([teaching], 13, 3) == {"completions/length_bias": 1.0}
    assert length_bias([alike], 7, 3) == {}
