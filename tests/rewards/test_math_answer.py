"""Exact answers: what equals what, what is never an answer, and every gold of GSM8K against itself and its neighbour."""

import json
import time
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards.answers import find_answer, find_golds
from rewards.expressions import compare_expressions
from rewards.math_answer import math_answer, verdict_on
from rewards.numbers import Number, Verdict, compare, exact
from rewards.think_format import think_format

EQUAL, DIFFERENT, UNKNOWN = Verdict.EQUAL, Verdict.DIFFERENT, Verdict.UNKNOWN


@pytest.mark.parametrize(
    ("answer", "gold", "verdict"),
    [
        ("18", "18", EQUAL),
        ("018", "18", EQUAL),
        ("18.00", "18", EQUAL),
        ("$18", "18", EQUAL),
        (r"\$18.00 per day", "18", EQUAL),
        ("18 dollars.", "$18", EQUAL),
        ("18 apples", "18", EQUAL),
        (r"18 \text{ cm}", "18", EQUAL),
        ("1,234,567", "1234567", EQUAL),
        ("1{,}234", "1234", EQUAL),
        ("1,23", "123", DIFFERENT),
        ("\u221218", "-18", EQUAL),
        ("-18", "18", DIFFERENT),
        ("1/2", "0.5", EQUAL),
        (r"\dfrac{-1}{2}", "-0.5", EQUAL),
        (r"\frac12", "0.5", EQUAL),
        ("0.333333", "1/3", DIFFERENT),
        ("50%", "50", EQUAL),
        (r"50\%", "0.5", EQUAL),
        ("51%", "50", DIFFERENT),
        ("x = 18", "18", EQUAL),
        ("7 + 11 = 18", "18", EQUAL),
        ("**18**", "18", EQUAL),
        ("18 or 19", "18", DIFFERENT),
        ("18 or 19 or 20", "18", DIFFERENT),
        ("18, 19", "18", DIFFERENT),
        ("18 and 19", "18", DIFFERENT),
        ("1 8", "18", DIFFERENT),
        ("11_2", "11", DIFFERENT),
        ("11_{2}", "11_2", EQUAL),
        ("6 inches", "6 cm", DIFFERENT),
        ("6 in", "6 inches", EQUAL),
        ("banana", "18", DIFFERENT),
        ("", "18", DIFFERENT),
        ("9" * 5000, "18", DIFFERENT),
        ("60 minutes", "1 hour", UNKNOWN),
        ("1.5 million", "1.5", UNKNOWN),
        ("eighteen", "18", EQUAL),
        ("two hundred and five", "205", EQUAL),
        ("1.5 million", "1,500,000", EQUAL),
        ("two three", "23", UNKNOWN),
        ("nineteen", "18", DIFFERENT),
        ("2x = 18", "18", UNKNOWN),
        ("x >= 18", "18", UNKNOWN),
        ("18!", "18", UNKNOWN),
        ("1 1/2", "1.5", EQUAL),
        (r"-2\frac{1}{4}", "-2.25", EQUAL),
        (r"11,\! 111,\! 100", "11111100", EQUAL),
        ("3/0", "3", UNKNOWN),
    ],
)
def test_plain_numbers_compare_exactly(answer, gold, verdict):
    assert compare(answer, gold) is verdict


@given(st.integers(-(10**12), 10**12), st.integers(1, 10**6), st.integers(-(10**12), 10**12), st.integers(1, 10**6))
def test_two_fractions_are_equal_exactly_if_their_cross_products_are(a, b, c, d):
    assert compare(f"{a}/{b}", f"{c}/{d}") is (EQUAL if a * d == c * b else DIFFERENT)
    assert exact(f"{a:,}") == Number(Fraction(a))


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("<think>7+5=12, carry 1 ...</think><answer>132</answer>", "132"),
        ("<answer>1</answer> no, <answer>2</answer>", "2"),
        (r"<answer>so \boxed{5}</answer>", "5"),
        (r"\boxed{1} then \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        ("9 * 2 = 18\n#### 18\n", "18"),
        ("#### Solution\n3 * 6\n**Answer:** 18\n", "18"),
        ("Q: how many?\nA: 18", "18"),
        ("18", "18"),
        ("<answer>132", None),
        ("I think it is 18.", None),
        ("<think>#### 18", None),
        ("<think><answer>18</answer></think>", None),
        ("<think>a</think><think>#### 18", None),
    ],
)
def test_an_answer_is_marked_as_one_and_stands_after_the_reasoning(completion, answer):
    assert find_answer(completion) == answer


def test_a_prompt_that_opens_the_reasoning_needs_its_end():
    opened = "<|user|>2+2<|assistant|><think>\n"
    assert verdict_on("<answer>4</answer>", ["4"], opened) is DIFFERENT
    assert verdict_on("two and two</think><answer>4</answer>", ["4"], opened) is EQUAL
    assert verdict_on("<answer>4</answer>", ["4"], "reason in <think>, please: 2+2") is EQUAL


def test_gold_is_the_answer_column_then_the_solution_from_its_marker_on():
    assert find_golds({"answer": "9 * 2 = 18\n#### 18", "solution": "3"}) == [" 18"]
    assert find_golds({"answer": None, "solution": r"so \boxed{7}"}) == ["7"]
    assert find_golds({"answer": 132}) == ["132"]
    assert find_golds({"answer": ["1", r"\boxed{2}"]}) == ["1", "2"]
    assert find_golds({"other": 1}) == find_golds({"answer": ""}) == []
    with pytest.raises(ValueError, match="column 'answer' holds"):
        find_golds({"answer": {"value": 1}})


@pytest.mark.parametrize(
    ("answer", "gold", "verdict"),
    [
        (r"\sqrt{324}", "18", EQUAL),
        (r"2\cdot 9", "18", EQUAL),
        ("13+", "13", DIFFERENT),
        ("18x", "18", DIFFERENT),
        ("p - q", "p-q", EQUAL),
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\pi/2)", EQUAL),
        ("(3,4)", "(4,3)", DIFFERENT),
        ("9^{9^{9^{9}}}", "18", UNKNOWN),
        ("3*x-1*y+13=0", "3x+4y+14=0", UNKNOWN),
        (r"\frac{1}{2004!}", r"\frac{1}{2006!}", UNKNOWN),
    ],
)
def test_math_verify_is_asked_for_expressions_and_only_where_it_can_be_trusted(answer, gold, verdict):
    assert compare(answer, gold) is UNKNOWN
    assert compare_expressions(answer, gold) is verdict


@pytest.mark.parametrize(
    ("completion", "gold", "asked", "wanted"),
    [
        # says nothing, or what was asked
        (r"\boxed{0=0}", "x=5", "", DIFFERENT),
        (r"\boxed{y=y}", "y=2x+1", "", DIFFERENT),
        (r"\boxed{0\cdot x+0\cdot y=0}", "3x-y+13=0", "", DIFFERENT),
        (r"\boxed{2x=10}", "x=5", "Solve 2x=10.", UNKNOWN),
        ("<answer>57+75</answer>", "132", "57+75=", DIFFERENT),
        (r"\boxed{57 \times 75 = 57\cdot75}", "4275", r"What is $57 \cdot 75$?", DIFFERENT),
        (r"\boxed{\sin^2 x+\cos^2 x}", "1", r"Simplify $\sin^2x + \cos^2x$.", DIFFERENT),
        (r"\boxed{\sqrt{50}}", r"5\sqrt2", r"Simplify $\sqrt{50}$.", UNKNOWN),
        ("<answer>75+57</answer>", "132", "57+75=", UNKNOWN),
        ("<answer>18+x-x</answer>", "18", "", UNKNOWN),
        ("<answer>7+7</answer>", "14", "57+75=", UNKNOWN),
        # guesses
        (r"\boxed{18} or \boxed{19}", "19", "", DIFFERENT),
        ("#### 17, 18, 19 = 18", "18", "", DIFFERENT),
        ("#### 18–20", "18", "", DIFFERENT),
        ("#### 18 is wrong", "18", "", UNKNOWN),
        ("#### 18 two", "18", "", UNKNOWN),
        # right, however it is written
        ("<answer>57+75=132</answer>", "132", "57+75=", EQUAL),
        (r"\boxed{5\sqrt{2}}", r"5\sqrt2", r"A square with side $5\sqrt{2}$", EQUAL),
        (r"\boxed{2^{10}-1}", "1023", "", EQUAL),
        (r"\boxed{3} and $x=\boxed{5}$", "5, 3", "", EQUAL),
        ("#### 1.8e1", "18", "", EQUAL),
        ("#### 18th", "18", "", EQUAL),
        (r"\boxed{18^{\text{th}}}", "18", "", EQUAL),
        (r"\boxed{18\text{ cm}^2}", "18", "", EQUAL),
        (r"\boxed{\color{red}{18}} ✓", "18", "", EQUAL),
        ("#### 18€", "18", "", EQUAL),
        ("#### 1½", "1.5", "", EQUAL),
        ("#### x²+1", "x^2+1", "", EQUAL),
        ("#### \uff083\uff0c4\uff09", "(3,4)", "", EQUAL),
        ("#### 18\u200b", "18", "", EQUAL),
        (r"\boxed{0.1\overline{6}}", "1/6", "", EQUAL),
        (r"\boxed{\log_2 8}", "3", "", EQUAL),
        ("#### one and a half", "1.5", "", EQUAL),
        ("#### a dozen", "12", "", EQUAL),
        ("#### 3 to 4", "3:4", "", EQUAL),
        ("#### 6 pm", "6:00 p.m.", "", EQUAL),
        (r"\boxed{\{18\}}", "18", "", EQUAL),
        (r"\boxed{\text{no real solutions}}", r"\emptyset", "", UNKNOWN),
        # costs nothing and breaks nothing
        ("#### " + "-" * 499 + "9", "18", "", UNKNOWN),
        ("#### ^" + " " * 50000 + "x", "18", "", DIFFERENT),
        ("#### x" + " ." * 50000, "18", "", DIFFERENT),
    ],
)
def test_an_answer_is_neither_paid_for_what_it_does_not_say_nor_refused_for_how_it_says_it(completion, gold, asked, wanted):
    assert verdict_on(completion, [gold], asked) is wanted


@pytest.mark.parametrize(
    ("answer", "gold", "wanted"),
    [
        # thousands
        ("1,024", "2^{10}", EQUAL),
        ("3,628,800", "10!", EQUAL),
        ("1,025", "2^{10}", DIFFERENT),
        ("1,000", "x=1000", EQUAL),
        (r"24,000\pi", r"24000\pi", EQUAL),
        (r"24{,}000\pi", r"24000\pi", EQUAL),
        (r"24,\!000\pi", r"24000\pi", EQUAL),
        (r"24000\pi", r"24,000\pi", EQUAL),
        (r"24,001\pi", r"24000\pi", DIFFERENT),
        (r"12,000\sqrt{3}", r"12000\sqrt3", EQUAL),
        ("1,500x", "1500x", EQUAL),
        ("(1,000, 2)", "(1000,2)", EQUAL),
        ("2100", "(2,100)", DIFFERENT),
        ("-2100", "(-2,100)", DIFFERENT),
        ("(1,200)", "(1,300)", DIFFERENT),
        (r"6,235^\circ", r"(6,235^\circ)", UNKNOWN),
        # units of one letter
        (r"36\pi \text{ m}^2", r"36\pi", EQUAL),
        (r"37\pi \text{ m}^2", r"36\pi", DIFFERENT),
        (r"36\pi \text{ m}^2", r"36\pi\text{ cm}^2", DIFFERENT),
        (r"\sqrt{2} \text{ m}", r"\sqrt2", EQUAL),
        (r"2\pi \text{ m/s}", r"2\pi", EQUAL),
        (r"5\text{ m}^2", "5", EQUAL),
        (r"9.8 \text{ m/s}^2", "9.8", EQUAL),
        (r"10 \text{ N}", "10", EQUAL),
        (r"10 \text{ J}", "10", EQUAL),
        (r"10 \text{ V}", "10", EQUAL),
        (r"10\,\mathrm{N}", "10", EQUAL),
        (r"15 \Omega", "15", EQUAL),
        (r"3.0\times 10^8 \text{ m/s}", r"3 \times 10^8", EQUAL),
        ("10 N", "10", UNKNOWN),
        ("10 N", "11", DIFFERENT),
        (r"36\pi m^2", r"36\pi", UNKNOWN),
        (r"2\pi m/s", r"2\pi", UNKNOWN),
        ("10x", "10", DIFFERENT),
        ("5m", "5m", EQUAL),
        (r"\text{A}", "A", EQUAL),
        (r"\text{A}", r"\text{(A)}", EQUAL),
        # numbers in words, names and currencies
        ("eighteen dollars", "18", EQUAL),
        ("eighteen apples", "18", EQUAL),
        ("nineteen apples", "18", DIFFERENT),
        ("eighteen (19)", "18", UNKNOWN),
        ("two hours", "2", EQUAL),
        ("fifty percent", r"50\%", EQUAL),
        ("18 thousand dollars", "18000", EQUAL),
        ("negative 18", "-18", EQUAL),
        ("minus 18", "-18", EQUAL),
        ("18 = x", "18", EQUAL),
        ("19 = x", "18", DIFFERENT),
        ("18元", "18", EQUAL),
        ("¥500", "500", EQUAL),
        ("₹500", "500", EQUAL),
        # only the question can tell
        ("0, 1", "(0,1)", UNKNOWN),
        ("y=1,x=2", "1,2", UNKNOWN),
        ("x=2,y=1", "1,2", UNKNOWN),
        ("x=1,y=2", "1,2", EQUAL),
        *[(f"18 {word}", "18", UNKNOWN) for word in ("lakh", "crore", "twice", "doubled", "thrice", "tripled")],
        *[(f"18 {word}", "18", DIFFERENT) for word in ("mn", "bn")],
    ],
)
def test_the_same_value_in_another_dress_is_equal(answer, gold, wanted):
    assert verdict_on(rf"\boxed{{{answer}}}", [gold]) is wanted


@pytest.mark.parametrize(
    ("one", "other", "wanted"),
    [
        ("36m", r"36\text{ m}", EQUAL),
        ("36 m^2", r"36\text{ m}^2", EQUAL),
        ("2s", r"2\text{ s}", EQUAL),
        ("5g", r"5\text{ g}", EQUAL),
        ("5L", r"5\text{ L}", EQUAL),
        ("9.8 m/s^2", r"9.8\text{ m/s}^2", EQUAL),
        ("9.8 m/s^2", r"9.8\text{ m/s^2}", EQUAL),
        ("20m/s", r"20\text{ m/s}", EQUAL),
        (r"36\pi m^2", r"36\pi\text{ m}^2", EQUAL),
        ("36π m", r"36\pi\text{ m}", EQUAL),
        ("5 N", r"5\,\mathrm{N}", EQUAL),
        ("5 N", r"5\text{ N}", EQUAL),
        ("-5 N", r"-5\text{ N}", EQUAL),
        ("3A", r"3\text{ A}", EQUAL),
        ("5K", r"5\text{ K}", EQUAL),
        (r"\sqrt{2}m", r"\sqrt2\text{ m}", EQUAL),
        (r"$5\sqrt{3}$ m", r"5\sqrt3\text{ m}", EQUAL),
        ("5m", "5 meters", EQUAL),
        ("37m", r"36\text{ m}", DIFFERENT),
        ("5 s", r"5\text{ m}", DIFFERENT),
        ("7s", r"5\text{ m}", DIFFERENT),
        ("5 N", r"5\text{ J}", DIFFERENT),
        ("36 m^2", r"36\text{ m}", DIFFERENT),
        ("9.8 m^2", r"9.8\text{ m/s}^2", DIFFERENT),
        ("5x", r"5\text{ m}", DIFFERENT),
    ],
)
def test_a_letter_is_the_unit_that_the_other_side_names(one, other, wanted):
    assert verdict_on(rf"\boxed{{{one}}}", [other]) is wanted
    assert verdict_on(rf"\boxed{{{other}}}", [one]) is wanted


@pytest.mark.parametrize(
    "answer", ["(" * 60 + "1,2" + ")" * 60, "(" * 60, "[(" * 50 + "1", r"\{" * 60, "(2," * 60, "(1," * 60 + "2" + ")" * 60]
)
@pytest.mark.parametrize("gold", ["5", r"2\pi", "(1,2)"])
def test_brackets_nested_too_deep_cost_nothing(answer, gold):
    verdict_on(r"\boxed{5x}", [r"2\pi"])  # loads mpmath
    began = time.process_time()
    verdict_on(f"#### {answer}", [gold])
    assert time.process_time() - began < 0.05


@pytest.mark.parametrize(
    ("answer", "gold", "asked", "wanted"),
    [
        ("|57+75|", "132", "What is 57+75?", DIFFERENT),
        ("(57+75)^1", "132", "What is 57+75?", DIFFERENT),
        (r"\sqrt{(57+75)^2}", "132", "What is 57+75?", DIFFERENT),
        (r"\binom{57+75}{1}", "132", "What is 57+75?", DIFFERENT),
        ("57+75+0! -1", "132", "What is 57+75?", DIFFERENT),
        ("57+75 = x", "132", "What is 57+75?", DIFFERENT),
        (r"57+75 \text{ cm}", "132", "What is 57+75?", DIFFERENT),
        (r"|57\cdot 75|", "4275", r"What is $57 \times 75$?", DIFFERENT),
        ("57/3", "19", "What is 57/3?", DIFFERENT),
        ("57/3", "19", "", EQUAL),
        ("18 km/h", "18", "It goes at 18 km/h.", EQUAL),
        ("|75+57|", "132", "What is 57+75?", UNKNOWN),
        (r"\sqrt{(7+7)^2}", "14", "", UNKNOWN),
        ("2^{10}-1", "1023", "", EQUAL),
        (r"3\times 10^8", "300000000", "", EQUAL),
        (r"\binom{10}{2}", "45", "", EQUAL),
        (r"\sqrt{3^2+4^2}", "5", "", EQUAL),
    ],
)
def test_arithmetic_that_is_left_to_do_is_no_answer(answer, gold, asked, wanted):
    assert verdict_on(rf"\boxed{{{answer}}}", [gold], asked) is wanted


def test_math_answer_scores_1_0_and_none():
    completions = [r"\boxed{18}", r"\boxed{19}", "18 or 19", r"\boxed{1.5 million}"]
    assert math_answer(["q"] * 4, completions, answer=["18", "18", "18", "1.5"]) == [1.0, 0.0, 0.0, None]
    assert math_answer(["q"], ["18"]) == [None]
    chat = [[{"role": "assistant", "content": "#### 18"}]]
    assert math_answer([[{"role": "user", "content": "q"}]], chat, solution=["#### 18"]) == [1.0]


@pytest.mark.parametrize("shape", [r"The result is \boxed{{{}}}.", "<think>hm</think><answer>{}</answer>", "so\n#### {}", "Answer: {}"])
def test_every_gold_of_gsm8k_equals_itself_and_differs_from_the_next_other_one(test_data, shape):
    rows = [json.loads(line)["answer"] for line in (test_data / "gsm8k" / "test.jsonl").open()]
    golds = [find_golds({"answer": row})[0].strip() for row in rows]
    assert len(golds) == 1319
    values = [int(gold.replace(",", "")) for gold in golds]
    others = [next(golds[(i + n) % 1319] for n in range(1, 1319) if values[(i + n) % 1319] != values[i]) for i in range(1319)]
    assert math_answer(rows, [shape.format(gold) for gold in golds], answer=rows) == [1.0] * 1319
    assert math_answer(rows, [shape.format(gold) for gold in others], answer=rows) == [0.0] * 1319


def test_the_worked_solutions_of_gsm8k_score_1_as_completions(test_data):
    rows = [json.loads(line)["answer"] for line in (test_data / "gsm8k" / "test.jsonl").open()]
    assert math_answer(rows, rows, answer=rows) == [1.0] * 1319


@pytest.mark.parametrize(
    ("completion", "prompt_text", "reward"),
    [
        ("<think>a</think>b", "", 1.0),
        ("\n<think>a</think>\nb", "", 1.0),
        ("a</think>b", "<assistant><think>\n", 1.0),
        ("a</think>b", "", 0.0),
        ("<think>a</think>b", "<assistant><think>\n", 0.0),
        ("<think>a</think> \n", "", 0.0),
        ("<think>a", "", 0.0),
        ("b", "", 0.0),
        ("x<think>a</think>b", "", 0.0),
        ("<think>a</think>b<think>c</think>d", "", 0.0),
        ("<think><think>a</think>b", "", 0.0),
        ("<think>a</think>b</think>c", "", 0.0),
    ],
)
def test_think_format_is_one_section_and_then_an_answer(completion, prompt_text, reward):
    assert think_format(["q"], [completion], prompt_texts=[prompt_text]) == [reward]
