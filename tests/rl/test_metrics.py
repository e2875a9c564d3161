"""The numbers of a step, by hand."""

from collections.abc import Sequence

import numpy as np
import pytest

from data.values import Completion, Group, Prompt, Score
from rl.metrics import length_bias


def group(lengths: Sequence[int], values: Sequence[float | None]) -> Group:
    def completion(index: int, tokens: int) -> Completion:
        ids, logp = np.zeros(tokens, np.int32), np.zeros(tokens, np.float32)
        return Completion("p", "g", index, 0, 0, ids, np.ones(tokens, np.uint8), logp, ids, "stop", "engine-0")

    completions = tuple(completion(index, tokens) for index, tokens in enumerate(lengths))
    scores = tuple(Score(value) if value is not None else Score(None, "error") for value in values)
    return Group("g", Prompt("p", "", "", np.zeros(1, np.int32)), 0, completions, scores)


def test_length_bias_is_the_mean_length_of_what_teaches_over_that_of_all_that_was_sampled() -> None:
    teaching, alike = group([9, 1, 3], [1.0, 0.0, 0.0]), group([1, 1, 5], [1.0, 1.0, 1.0])
    # A third group of 14 tokens failed and was not handed over: 13 tokens in 3 completions, against 34 tokens in 9.
    assert length_bias([teaching, alike], 13 + 7 + 14, 9) == {"completions/length_bias": pytest.approx((13 / 3) / (34 / 9))}
    assert length_bias([teaching], 13, 3) == {"completions/length_bias": 1.0}
    assert length_bias([alike], 7, 3) == {}
