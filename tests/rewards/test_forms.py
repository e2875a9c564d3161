"""Answers that are no plain numbers: what equals what, in every shape; and what must never pass."""

import time

import pytest

from rewards.compare import compare_forms
from rewards.math_answer import math_answer, verdict
from rewards.numbers import Verdict

EQUAL, DIFFERENT, UNKNOWN = Verdict.EQUAL, Verdict.DIFFERENT, Verdict.UNKNOWN


@pytest.mark.parametrize(
    ("answer", "gold", "expected"),
    [
        # scalars, by value
        (r"\frac{\sqrt 3}{3}", r"\frac{1}{\sqrt{3}}", EQUAL),
        (r"11\sqrt2", r"\sqrt{242}", EQUAL),
        (r"\frac9{19}", "9/19", EQUAL),
        (r"\tan 15^\circ", r"2-\sqrt{3}", EQUAL),
        (r"\cos\frac{\pi}{2}", "0", EQUAL),
        ("1.41421356237", r"\sqrt{2}", DIFFERENT),
        (r"\binom{5}{2}\pi", r"10\pi", EQUAL),
        (r"3 \sec \frac{1}{2} \theta", r"3\sec(\theta/2)", EQUAL),
        (r"\log_2 8 + x", "x+3", EQUAL),
        (r"|{-3}|x", "3x", EQUAL),
        ("6+9i", "9i + 6", EQUAL),
        (r"\sqrt[3]{-8} x", "-2x", EQUAL),
        ("(x+1)^2", "x^2+2x+1", EQUAL),
        ("(x+1)^2", "x^2+2x-1", DIFFERENT),
        (r"\sqrt{x^2}", "x", UNKNOWN),
        ("-x^2", "(-x)^2", DIFFERENT),
        (r"864 \mbox{ inches}^2", "864", EQUAL),
        (r"15\pi\text{ cm}^2", r"15\pi\text{ m}^2", DIFFERENT),
        (r"137 \frac{1}{2}", r"\frac{275}{2}", EQUAL),
        (r"\frac{1}{2004!}", r"\frac{1}{2006!}", DIFFERENT),
        # lists, sets, plus-minus
        ("3, 5, 7", r"7,\; 5,\; 3", EQUAL),
        (r"6, 8\text{, and }10", "10, 8, 6", EQUAL),
        (r"x=5 \text{ or } x=7", "5, 7", EQUAL),
        (r"1 \pm \sqrt{19}", r"1+\sqrt{19}, 1-\sqrt{19}", EQUAL),
        (r"\{1\pm\sqrt{5},-2\}", r"\{-2, 1-\sqrt{5}, 1+\sqrt{5}\}", EQUAL),
        ("1, 2, 3", "1, 2", DIFFERENT),
        ("1, 1, 2", "1, 2", UNKNOWN),
        (r"\sqrt2 \text{ or } \sqrt3", r"\sqrt2", DIFFERENT),
        # tuples, intervals, unions
        ("(8, -2)", "(8,-2)", EQUAL),
        ("(-2,8)", "(8,-2)", DIFFERENT),
        ("[0,1)", "(0,1)", DIFFERENT),
        ("(1,2)", "1,2", UNKNOWN),
        (r"(3,\infty)\cup(-\infty,2)", r"(-\infty, 2) \cup (3, \infty)", EQUAL),
        (r"x \in [-2,7]", "[-2,7]", EQUAL),
        (r"-2 \le x \le 7", "[-2,7]", EQUAL),
        ("x > 3", r"(3,\infty)", EQUAL),
        ("x > 3", r"[3,\infty)", DIFFERENT),
        (r"x<2 \text{ or } x>3", r"(-\infty,2)\cup(3,\infty)", EQUAL),
        (r"(-\infty,2)\cup(3,\infty)", r"x<2 \text{ or } x>3", EQUAL),
        (r"x<2 \text{ or } x>4", r"(-\infty,2)\cup(3,\infty)", DIFFERENT),
        ("x<2, x>3", r"(-\infty,2)\cup(3,\infty)", UNKNOWN),
        (r"x > 2 \text{ and } x \le 5", "(2,5]", EQUAL),
        (r"x > 2 \text{ and } x < 6", "(2,5)", DIFFERENT),
        (r"x<2 \text{ or } 3<x", r"(-\infty,2)\cup(3,\infty)", EQUAL),
        (r"x<a \text{ or } x>b", r"(-\infty,a)\cup(b,\infty)", EQUAL),
        (r"1<x<2 \text{ or } x>2 \text{ and } x<3", r"(1,2)\cup(2,3)", EQUAL),
        (r"x<2 \text{ or } y>3", r"(-\infty,2)\cup(3,\infty)", UNKNOWN),
        (r"x<2 \text{ or } y>3", r"x < 2\text{ or }y > 3", EQUAL),
        (r"x > 2 \text{ and } y < 5", "(2,5)", UNKNOWN),
        (r"\{x | x > 2\}", r"(2,\infty)", EQUAL),
        (r"\{x \mid x > 2\}", r"(2,\infty)", EQUAL),
        (r"(2,\infty)", r"\left\{x \in \mathbb{R} : x > 2\right\}", EQUAL),
        (r"\{x | x > 3\}", r"(2,\infty)", DIFFERENT),
        ("P(1,2)", "(1,2)", EQUAL),
        ("(1,2)", "P(1,3)", DIFFERENT),
        ("C(5,2)", "10", UNKNOWN),
        (r"45^\circ", r"\pi/4", EQUAL),
        (r"\frac{\pi}{4}", r"45^\circ", EQUAL),
        (r"46^\circ", r"\pi/4", DIFFERENT),
        (r"\sin 30^\circ", "1/2", EQUAL),
        (r"132^\circ", r"7\text{ hours}", DIFFERENT),
        # matrices, equations, ratios, bases, words
        (r"\left[\begin{matrix}\frac12\\-3\end{matrix}\right]", r"\begin{pmatrix} 1/2 \\ -3 \end{pmatrix}", EQUAL),
        (r"\begin{pmatrix} 1 & 2 \end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", DIFFERENT),
        ("y = 2x + 3", "2x - y + 3 = 0", EQUAL),
        ("3*x-1*y+13=0", "3x+4y+14=0", DIFFERENT),
        ("2x+3", "y = 2x + 3", EQUAL),
        ("2x = 18", "18", DIFFERENT),
        ("2x = 18", "9", UNKNOWN),
        ("6:8", "3:4", UNKNOWN),
        ("9:24", "9:25", DIFFERENT),
        ("2516_8", "2516_{8}", EQUAL),
        ("11_2", "3", UNKNOWN),
        ("-37_8", "-31", UNKNOWN),
        ("-37_8", "31", DIFFERENT),
        ("0_7", "16", DIFFERENT),
        ("C", r"\text{(C)}", EQUAL),
        ("B", r"\text{(C)}", DIFFERENT),
        ("evelyn", r"\text{Evelyn}", EQUAL),
        ("Carla", r"\text{Evelyn}", DIFFERENT),
        ("grey", r"\text{gray}", UNKNOWN),
        ("due east", r"\text{east}", UNKNOWN),
        ("17", r"\text{east}", DIFFERENT),
        # what cannot be read, or is too large to compute
        (r"\int_0^1 x dx", r"\frac{1}{2}x", UNKNOWN),
        ("9^{9^{9^{9}}}", r"2\pi", UNKNOWN),
        ("218=", "245", UNKNOWN),
        ("(" * 200 + "1" + ")" * 200, r"2\pi", UNKNOWN),
    ],
)
def test_answers_compare_by_what_they_say(answer, gold, expected):
    assert compare_forms(answer, gold) is expected


@pytest.mark.parametrize(
    "text", ["9^{9^{9^{9}}}", "9!!!!!!", r"e^{e^{e^{e^{e}}}}", r"\sin(10^{99999})", "2^" * 200 + "2", "(" * 499, r"10^{99999}!"]
)
def test_no_expression_takes_long(text):
    began = time.perf_counter()
    compare_forms(text, r"\sqrt{2}")
    assert time.perf_counter() - began < 1.0


FALSE_POSITIVES = [
    (r"\boxed{3*x-1*y+13=0}", "3x+4y+14=0"),
    (r"\boxed{\frac{1}{2004!}}", r"\frac{1}{2006!}"),
    ("18 or 19 or 20", "18"),
    (r"\boxed{18 or 19 or 20}", "18"),
    ("<think>so it is 18</think>I do not know", "18"),
    (r"<think>\boxed{18}</think>", "18"),
    (r"\boxed{11_2}", "11"),
    (r"\boxed{11}", "11_2"),
    (r"\boxed{6 inches}", "6 cm"),
    (r"\boxed{6\text{ inches}}", r"6\text{ cm}"),
]
"""What math-verify was seen to accept."""


@pytest.mark.parametrize(("completion", "gold"), FALSE_POSITIVES)
def test_what_math_verify_accepts_wrongly_scores_0(completion, gold):
    assert math_answer(["q"], [completion], answer=[gold]) == [0.0]


def test_one_of_several_golds_is_enough_and_an_unknown_one_forbids_a_0():
    completions = [r"\boxed{7}", r"\boxed{8}", r"\boxed{grey}"]
    assert math_answer(["q"] * 3, completions, answer=[["7", "x=9"], ["7", "9"], ["7", "gray"]]) == [1.0, 0.0, None]


@pytest.mark.parametrize("completion", [r"The answer is \boxed 5", r"\boxed 5.", r"$\fbox{5}$"])
def test_a_box_needs_no_braces(completion):
    assert math_answer(["q"], [completion], answer=["5"]) == [1.0]


def test_the_verdict_of_math_verify_is_asked_last():
    assert verdict(r"\int_0^1 x dx", r"\frac{1}{2}x") is UNKNOWN
