"""`countdown`: 1 if the answer is an expression of the row's numbers, each used as often as it is given, that equals the target.

The expression is read by our own reader and computed in exact fractions. `= target` behind it is allowed, another result is wrong.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any

from data.values import Messages
from rewards.answers import marked_answer
from rewards.latex import Tree, Unreadable, read
from rewards.numbers import plain
from rewards.text import answer_text, completion_text, per_completion

LONGEST = 300
"""Characters of an expression."""


def countdown(
    prompts: list[str | Messages],
    completions: list[str | Messages],
    target: list[float],
    numbers: list[list[int]] | None = None,
    nums: list[list[int]] | None = None,
    prompt_texts: list[str] | None = None,
    use_all: bool = True,
    **_: Any,
) -> list[float | None]:
    """Rewards 1.0 or 0.0; the numbers are the column `numbers`, or `nums`. `use_all`: each must be used, not only at most once."""
    given = numbers if numbers is not None else nums
    if given is None:
        raise ValueError("countdown needs the column 'numbers' (or 'nums') beside 'target'")
    texts = [answer_text(completion_text(c), p) for c, p in zip(completions, per_completion(prompt_texts, len(prompts)), strict=True)]
    return [float(text is not None and solves(text, given[i], target[i], use_all)) for i, text in enumerate(texts)]


def solves(text: str, numbers: Sequence[int], target: float, use_all: bool = True) -> bool:
    """Whether a text's marked answer, or its last line, makes the target of the numbers."""
    is_marked, marked = marked_answer(text)
    lines = text.strip().splitlines()
    expression = plain((marked or "") if is_marked else lines[-1] if lines else "")
    if len(expression) > LONGEST:
        return False
    expression, _, result = expression.partition("=")
    try:
        tree = read(expression)
        if result.strip() and compute(read(result)) != Fraction(target):
            return False
        used, available = Counter(leaves(tree)), Counter(Fraction(number) for number in numbers)
        fits = used == available if use_all else used <= available
        return fits and compute(tree) == Fraction(target)
    except (Unreadable, ZeroDivisionError):
        return False


def compute(tree: Tree) -> Fraction:
    """The exact value of sums, differences, products and quotients; Unreadable for anything else."""
    kind, *parts = tree
    if kind == "number":
        return Fraction(parts[0])
    values = [compute(part) for part in parts if isinstance(part, tuple)]
    if kind == "negative":
        return -values[0]
    if kind not in ("+", "-", "*", "/", "fraction"):
        raise Unreadable(f"{kind} is not allowed")
    left, right = values
    return {"+": left + right, "-": left - right, "*": left * right}[kind] if kind in "+-*" else left / right


def leaves(tree: Tree) -> Iterator[Fraction]:
    """The numbers in an expression."""
    if tree[0] == "number":
        yield Fraction(tree[1])
    for part in tree[1:]:
        if isinstance(part, tuple):
            yield from leaves(part)
