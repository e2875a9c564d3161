"""The built-in verifiable task: sums and differences, worked column by column, generated and never stored.

A prompt is `47+85=`. A completion shows its working, column by column from the right, inside <think>…</think>, and the result
inside <answer>…</answer>:

    <think>7+5=12;4+8+1=13</think><answer>132</answer>      a remembered carry stands as +1
    <think>15-7=8;8-4-1=3</think><answer>38</answer>        for 85-47=: a column that borrows begins with its ten

Train and held-out prompts are disjoint by construction: a hash of the *unordered* pair of operands decides, so 47+85 and 85+47
are on the same side, whatever the seed. The demonstrator for the cold start can be weak in two ways that leave GRPO its work: it
forgets a carry, and it miscopies the result. Its digits are always right. It may also ask a calculator (`calculator`), as the
conversation of `recipes/tools/calculator.py` lets a policy do; what that answers stands in the completion, marked as a tool's:

    <think><calc>47+85</calc>132</think><answer>132</answer>
"""

import hashlib
import random
from collections.abc import Iterator
from typing import Any, Literal

import pydantic

from data.recipe import Section, parse

Split = Literal["train", "test"]

MAX_ROWS = {"train": 8192, "test": 1000}
"""Where a difficulty has more prompts than anyone can use, this many are drawn, always the same ones."""
ENUMERABLE = 10_000
"""Up to this many ordered pairs all of them are used."""
ONE_HELD_OUT_IN = {"add": 8, "subtract": 4}
"""Share of pairs kept for evaluation; a difference has one order only, so it takes a larger share to reach about 1000."""


class ArithmeticOptions(Section):
    """How hard the task is, and how weak its demonstrator."""

    operation: Literal["add", "subtract"] = "add"
    """Differences have the larger operand first."""
    digits: int = pydantic.Field(default=2, ge=1, le=9)
    """Digits of both operands; the first is no 0, except with one digit."""
    carry_error: float = pydantic.Field(default=0.0, ge=0.0, le=1.0)
    """Probability that the demonstrator forgets a carry (or a borrow); its result then follows from the wrong working."""
    answer_error: float = pydantic.Field(default=0.0, ge=0.0, le=1.0)
    """Probability that the demonstrator's result is off by 1 or 10 from what its working says."""
    calculator: float = pydantic.Field(default=0.0, ge=0.0, le=1.0)
    """Probability that the demonstrator asks a calculator instead of working; its result is right then."""


def rows(options: dict, split: str) -> list[dict[str, str]]:
    """All prompts of a split as rows {id, prompt, answer}, in an order that depends on the options alone.

    Raises InputError for bad options or an unknown split.
    """
    task = parse(options, ArithmeticOptions, "arithmetic options")
    side = parse({"split": split}, _SplitName, "arithmetic").split
    return [_row(task, a, b) for a, b in _pairs(task, side)]


def demonstrations(options: dict, count: int, seed: int) -> list[dict[str, Any]]:
    """`count` rows {prompt, completion} on train prompts, each pass over them in a new order and with new mistakes.

    A row in which a calculator was asked has `tool_spans` as well: begin and end of the characters that the calculator wrote.
    """
    task = parse(options, ArithmeticOptions, "arithmetic options")
    pairs = list(_pairs(task, "train"))
    rng = random.Random(f"demonstrations {seed}")
    demonstrated: list[dict[str, Any]] = []
    while len(demonstrated) < count:
        rng.shuffle(pairs)
        demonstrated += [_demonstration(task, a, b, rng) for a, b in pairs[: count - len(demonstrated)]]
    return demonstrated


def _demonstration(task: ArithmeticOptions, a: int, b: int, rng: random.Random) -> dict[str, Any]:
    if task.calculator and rng.random() < task.calculator:
        asked, answer = f"<think><calc>{_prompt(task, a, b).rstrip('=')}</calc>", _answer(task, a, b)
        completion = f"{asked}{answer}</think><answer>{answer}</answer>"
        return {"prompt": _prompt(task, a, b), "completion": completion, "tool_spans": [[len(asked), len(asked) + len(answer)]]}
    return {"prompt": _prompt(task, a, b), "completion": demonstrate(task, a, b, rng)}


def demonstrate(task: ArithmeticOptions, a: int, b: int, rng: random.Random) -> str:
    """One completion for `a` and `b`; right in every step where both error probabilities are 0."""
    columns, digits = [], ""
    remembered = False
    for column in range(task.digits):
        x, y = a // 10**column % 10, b // 10**column % 10
        if task.operation == "add":
            value = x + y + remembered
            columns.append(f"{x}+{y}{'+1' if remembered else ''}={value}")
            last = column == task.digits - 1
            digits = f"{value if last else value % 10}{digits}"
            carries = value >= 10
        else:
            carries = x - y - remembered < 0
            value = x + 10 * carries - y - remembered
            columns.append(f"{x + 10 * carries}-{y}{'-1' if remembered else ''}={value}")
            digits = f"{value}{digits}"
        remembered = carries and rng.random() >= task.carry_error
    answer = int(digits)
    if rng.random() < task.answer_error:
        answer += rng.choice((-10, -1, 1, 10))
    return f"<think>{';'.join(columns)}</think><answer>{answer}</answer>"


class _SplitName(Section):
    split: Split


def _prompt(task: ArithmeticOptions, a: int, b: int) -> str:
    return f"{a}{'+' if task.operation == 'add' else '-'}{b}="


def _answer(task: ArithmeticOptions, a: int, b: int) -> str:
    return str(a + b if task.operation == "add" else a - b)


def _row(task: ArithmeticOptions, a: int, b: int) -> dict[str, str]:
    prompt = _prompt(task, a, b)
    return {"id": prompt.rstrip("="), "prompt": prompt, "answer": _answer(task, a, b)}


def _pairs(task: ArithmeticOptions, split: Split) -> Iterator[tuple[int, int]]:
    """Operand pairs of a split: all that there are, or the first of a fixed random sequence without repetition."""
    low, high = (10 ** (task.digits - 1) if task.digits > 1 else 0), 10**task.digits
    if (high - low) ** 2 <= ENUMERABLE:
        for a in range(low, high):
            for b in range(low, high if task.operation == "add" else a + 1):
                if _side(task, a, b) == split:
                    yield a, b
        return
    rng = random.Random(f"{task.operation} {task.digits}")
    drawn: set[tuple[int, int]] = set()
    while len(drawn) < MAX_ROWS[split]:
        a, b = rng.randrange(low, high), rng.randrange(low, high)
        if task.operation == "subtract" and a < b:
            a, b = b, a
        if (a, b) not in drawn and _side(task, a, b) == split:
            drawn.add((a, b))
            yield a, b


def _side(task: ArithmeticOptions, a: int, b: int) -> Split:
    digest = hashlib.blake2b(f"{min(a, b)} {max(a, b)}".encode(), digest_size=8).digest()
    return "test" if int.from_bytes(digest, "big") % ONE_HELD_OUT_IN[task.operation] == 0 else "train"
