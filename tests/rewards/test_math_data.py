"""Every gold of MATH-500 and of the MATH training rows: equal to itself, different from the next other one, and to the last row."""

import json
from fractions import Fraction

import pytest

from rewards.math_answer import math_answer
from rewards.numbers import exact, plain

DATA_ERRORS = {886: "no answer (null)", 1009: "no answer (null)"}
"""Rows of rllm_math/math_train.json that hold no gold, beside those whose gold is the empty text."""
SHAPES = [r"So it is \boxed{%s}.", "<think>hm</think><answer>%s</answer>", "so\n#### %s", "Answer: %s"]


@pytest.fixture(scope="module")
def golds(test_data) -> dict[str, list[str]]:
    math500 = [json.loads(line)["answer"] for line in (test_data / "math500" / "test.jsonl").open()]
    rllm = [row["answer"] for row in json.loads((test_data / "rllm_math" / "math_train.json").read_text())]
    assert (len(math500), len(rllm)) == (500, 7474)
    assert {i for i, gold in enumerate(rllm) if gold is None} == set(DATA_ERRORS)
    assert sum(gold == "" for gold in rllm) == 2
    return {"math500": math500, "rllm": [gold for gold in rllm if gold]}


@pytest.mark.parametrize("name", ["math500", "rllm"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_gold_equals_itself(golds, name, shape):
    rows = golds[name]
    assert math_answer(rows, [shape % gold for gold in rows], answer=rows) == [1.0] * len(rows)


@pytest.mark.parametrize("name", ["math500", "rllm"])
def test_every_gold_differs_from_the_next_other_one(golds, name):
    rows = golds[name]
    keys = [key_of(gold) for gold in rows]
    others = [
        next(rows[(i + n) % len(rows)] for n in range(1, len(rows)) if keys[(i + n) % len(rows)] != key) for i, key in enumerate(keys)
    ]
    assert math_answer(rows, [rf"\boxed{{{other}}}" for other in others], answer=rows) == [0.0] * len(rows)


def key_of(gold: str) -> Fraction | str:
    """What a gold says if its unit, its percent sign and the name before it are not minded, as a judge does not either."""
    number = exact(plain(gold).rpartition("=")[2].strip())
    return number.value if number and not number.base else "".join(plain(gold).split())


def test_a_row_without_a_gold_is_unscored_not_wrong():
    assert math_answer(["q", "q"], [r"\boxed{1}"] * 2, answer=["", None]) == [None, None]
