"""The arithmetic task: working by hand, splits that never meet, and a demonstrator that errs as often as it is told."""

import random
import re
from pathlib import Path

import pytest

from data.arithmetic import ArithmeticOptions, demonstrate, demonstrations, rows
from data.recipe import InputError
from rewards.worker import import_function

CALCULATOR = str(Path(__file__).resolve().parents[2] / "recipes" / "tools" / "calculator.py")
ALL_KINDS = [{"operation": operation, "digits": digits} for operation in ("add", "subtract") for digits in (1, 2, 3, 6)]


def perfect(a: int, b: int, **options) -> str:
    return demonstrate(ArithmeticOptions(**options), a, b, random.Random(0))


def answer_of(completion: str) -> int:
    return int(re.fullmatch(r"<think>.+</think><answer>(-?\d+)</answer>", completion)[1])


def operands(prompt: str) -> tuple[int, int]:
    a, b = re.fullmatch(r"(\d+)[+-](\d+)=", prompt).groups()
    return int(a), int(b)


def true_answer(prompt: str) -> int:
    a, b = operands(prompt)
    return a + b if "+" in prompt else a - b


def test_sums_are_worked_by_columns_from_the_right_with_the_carry_written_out():
    assert perfect(47, 85) == "<think>7+5=12;4+8+1=13</think><answer>132</answer>"
    assert perfect(12, 34) == "<think>2+4=6;1+3=4</think><answer>46</answer>"
    assert perfect(999, 1, digits=3) == "<think>9+1=10;9+0+1=10;9+0+1=10</think><answer>1000</answer>"


def test_differences_borrow_a_ten_and_write_no_leading_zeros():
    assert perfect(85, 47, operation="subtract") == "<think>15-7=8;8-4-1=3</think><answer>38</answer>"
    assert perfect(85, 84, operation="subtract") == "<think>5-4=1;8-8=0</think><answer>1</answer>"
    assert perfect(500, 101, operation="subtract", digits=3) == ("<think>10-1=9;10-0-1=9;5-1-1=3</think><answer>399</answer>")


def test_a_forgotten_carry_spoils_the_result_that_is_then_copied_rightly():
    forgetful = ArithmeticOptions(carry_error=1.0)
    assert demonstrate(forgetful, 47, 85, random.Random(0)) == "<think>7+5=12;4+8=12</think><answer>122</answer>"
    assert demonstrate(forgetful, 12, 34, random.Random(0)) == "<think>2+4=6;1+3=4</think><answer>46</answer>"


def test_a_miscopied_result_is_off_by_one_or_ten():
    careless = ArithmeticOptions(answer_error=1.0)
    rng = random.Random(0)
    results = {answer_of(demonstrate(careless, 47, 85, rng)) for _ in range(100)}
    assert results == {122, 131, 133, 142}


@pytest.mark.parametrize("options", ALL_KINDS)
def test_the_perfect_demonstrator_is_always_right(options):
    for row in demonstrations(options, 2000, seed=3):
        assert answer_of(row["completion"]) == true_answer(row["prompt"]), row
        for column in re.search("<think>(.+)</think>", row["completion"])[1].split(";"):
            terms, result = column.split("=")
            numbers = [int(term) for term in re.findall(r"[+-]?\d+", terms)]
            assert sum(numbers) == int(result), row


@pytest.mark.parametrize("options", ALL_KINDS)
def test_answers_are_true_and_ids_name_the_problem(options):
    for split in ("train", "test"):
        made = rows(options, split)
        assert all(row["answer"] == str(true_answer(row["prompt"])) for row in made)
        assert all(row["id"] + "=" == row["prompt"] for row in made)
        assert len({row["id"] for row in made}) == len(made)


@pytest.mark.parametrize("options", ALL_KINDS)
def test_no_held_out_pair_is_trained_on_in_either_order(options):
    held_out = {frozenset(operands(row["prompt"])) for row in rows(options, "test")}
    trained = {frozenset(operands(row["prompt"])) for row in rows(options, "train")}
    demonstrated = {frozenset(operands(row["prompt"])) for row in demonstrations(options, 5000, seed=1)}
    assert held_out and not held_out & trained
    assert demonstrated <= trained


@pytest.mark.parametrize(
    ("options", "train", "test"),
    [
        ({"digits": 2}, 7113, 987),
        ({"digits": 2, "operation": "subtract"}, 3069, 1026),
        ({"digits": 3}, 8192, 1000),
        ({"digits": 3, "operation": "subtract"}, 8192, 1000),
    ],
)
def test_each_split_has_enough_prompts_and_always_the_same(options, train, test):
    assert (len(rows(options, "train")), len(rows(options, "test"))) == (train, test)
    assert rows(options, "test") == rows({**options, "carry_error": 0.5}, "test")


def test_two_digit_sums_are_all_there():
    assert len(rows({}, "train")) + len(rows({}, "test")) == 90 * 90


def test_a_weak_demonstrator_is_right_as_often_as_its_two_errors_allow():
    # 45 of 100 pairs of last digits carry; a sum without a carry cannot lose one.
    made = demonstrations({"carry_error": 0.4, "answer_error": 0.35}, 20_000, seed=1)
    right = sum(answer_of(row["completion"]) == true_answer(row["prompt"]) for row in made) / len(made)
    assert right == pytest.approx((0.55 + 0.45 * 0.6) * 0.65, abs=0.02)


def test_the_demonstrator_asks_the_calculator_of_the_recipes_as_often_as_it_is_told():
    made = demonstrations({"digits": 5, "carry_error": 1.0, "calculator": 0.2}, 2000, seed=1)
    asked = [row for row in made if "tool_spans" in row]
    assert len(asked) / len(made) == pytest.approx(0.2, abs=0.03)
    calculator = import_function(CALCULATOR, "answer")
    for row in asked:
        ((begin, end),) = row["tool_spans"]
        said = row["completion"][begin:end]
        assert calculator(row["completion"][:begin]) == said == str(true_answer(row["prompt"])) == str(answer_of(row["completion"]))
    worked = [row for row in made if "tool_spans" not in row]
    assert sum(answer_of(row["completion"]) == true_answer(row["prompt"]) for row in worked) / len(worked) < 0.15


@pytest.mark.parametrize(("text", "said"), [
    ("<think><calc>12-30</calc>", "-18"), ("<calc>1+2</calc>3<calc>3+4</calc>", "7"), ("<calc>1+2+3</calc>", "?"),
    ("<calc>1*2</calc>", "?"), ("<calc>__import__('os')</calc>", "?"), ("<calc>" + "9" * 19 + "+1</calc>", "?"),
    ("<calc>٣+1</calc>", "?"), ("</calc>", "?"),
])  # fmt: skip
def test_the_calculator_reads_two_whole_numbers_and_evaluates_nothing(text, said):
    assert import_function(CALCULATOR, "answer")(text) == said


def test_demonstrations_follow_their_seed():
    weak = {"carry_error": 0.4, "answer_error": 0.3}
    assert demonstrations(weak, 300, seed=1) == demonstrations(weak, 300, seed=1)
    assert demonstrations(weak, 300, seed=1) != demonstrations(weak, 300, seed=2)
    assert demonstrations(weak, 300, seed=1)[:100] == demonstrations(weak, 100, seed=1)


@pytest.mark.parametrize(
    ("options", "split", "message"),
    [
        ({"digit": 2}, "train", "arithmetic options: digit: no such key; did you mean 'digits'?"),
        ({"digits": 0}, "train", "digits: 0 should be greater than or equal to 1"),
        ({"operation": "multiply"}, "train", "operation: \"multiply\" should be 'add' or 'subtract'"),
        ({}, "validation", "split: \"validation\" should be 'train' or 'test'"),
    ],
)
def test_a_wrong_option_is_one_line(options, split, message):
    with pytest.raises(InputError) as error:
        rows(options, split)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
