"""`math_answer`: 1 if the completion's answer equals a gold one, 0 if it is different from all, None if that cannot be said.

Three readings, each asked only for what the one before does not know: exact numbers (`rewards.numbers`), the shapes and values of
LaTeX (`rewards.compare`), and math-verify (`rewards.expressions`). A completion without an answer is wrong. A row without a gold
answer cannot be judged.

What is equal may still be no answer: `57+75` for 132. Copied from the prompt it is wrong where gold is a number, also as a part of
the answer, `|57+75|`, and cannot be judged where gold is an expression, as the prompt may offer expressions to choose from. Elsewhere
what holds a sum or product of plain numbers, or variables, cannot be judged where gold is a number.
"""

import re
from collections.abc import Sequence
from typing import Any

from data.values import Messages
from rewards.answers import find_answer, find_golds
from rewards.numbers import Verdict, compare, exact, plain_pair
from rewards.text import as_text, completion_text

_OPERATION = re.compile(r"[-+*/^!|]|\\[a-z]")
_WAYS = (
    (re.compile(r"\\(?:cdot|times)(?![a-z])|×|·"), "*"),
    (re.compile(r"\\div(?![a-z])|÷"), "/"),
    (re.compile(r"\\[dt]frac"), r"\\frac"),
    (re.compile(r"\\(?:left|right)(?![a-z])|\$"), " "),
)
"""Ways to write the same."""
_ARITHMETIC = re.compile(r"(?<![\w.^}])NUMBER(?:\s*[-+*/]\s*NUMBER)+".replace("NUMBER", r"\d+(?:[.,]\d+)*(?!\s*[!^]|[.,]?\d)"))
"""Plain numbers joined by operations, as many as there are."""
_QUOTIENT = re.compile(r"\d\s*/\s*\d|\\frac")
REWARD = {Verdict.EQUAL: 1.0, Verdict.DIFFERENT: 0.0, Verdict.UNKNOWN: None}


def math_answer(
    prompts: list[str | Messages],
    completions: list[str | Messages],
    prompt_texts: list[str] | None = None,
    answer: list[Any] | None = None,
    solution: list[Any] | None = None,
    **_: Any,
) -> list[float | None]:
    """Rewards 1.0, 0.0 or None, one for each completion; gold is `answer`, then `solution`, and a list holds several golds."""
    rewards: list[float | None] = []
    for index, completion in enumerate(completions):
        columns = {"answer": answer and answer[index], "solution": solution and solution[index]}
        prompt_text = prompt_texts[index] if prompt_texts else ""
        golds = find_golds(columns)
        said = verdict_on(completion_text(completion), golds, prompt_text, as_text(prompts[index])) if golds else Verdict.UNKNOWN
        rewards.append(REWARD[said])
    return rewards


def verdict_on(text: str, golds: Sequence[str], prompt_text: str = "", asked: str = "") -> Verdict:
    """The verdict on one completion: equal to one of the golds, different from all of them, or unknown.

    `prompt_text`: as the policy read it; `asked`: as the user wrote it, where it was not rendered.
    """
    answer = find_answer(text, prompt_text)
    if answer is None:
        return Verdict.DIFFERENT
    verdicts = []
    for gold in golds:
        verdicts.append(verdict(answer, gold))
        if verdicts[-1] is Verdict.EQUAL:
            verdicts[-1] = _finished(answer, gold, asked or prompt_text)
        if verdicts[-1] is Verdict.EQUAL:
            return Verdict.EQUAL
    return Verdict.UNKNOWN if Verdict.UNKNOWN in verdicts else Verdict.DIFFERENT


def _finished(answer: str, gold: str, asked: str) -> Verdict:
    """The verdict on an answer that has the gold's value: whether it is an answer at all."""
    said, wanted = plain_pair(answer, gold)
    said = said if "=" in wanted else _last_side(said)
    number = exact(said)
    if number is not None and number.value.denominator == 1 and _QUOTIENT.search(said) and not _QUOTIENT.search(wanted):
        return Verdict.DIFFERENT if _stands_in(said, asked) else Verdict.EQUAL
    if number is not None or not _OPERATION.search(said):
        return Verdict.EQUAL
    from rewards.forms import form
    from rewards.scalars import is_unfinished

    read = form(said)
    is_open = read is not None and bool(read.tree) and is_unfinished(read.tree)
    if read and (read == form(wanted) or (read.tag and not is_open)):
        return Verdict.EQUAL
    is_number = exact(wanted) is not None
    if is_number and any(_stands_in(found[0], asked) for found in _ARITHMETIC.finditer(_even(said))):
        return Verdict.DIFFERENT
    if _stands_in(said, asked):
        return Verdict.DIFFERENT if is_number else Verdict.UNKNOWN
    return Verdict.UNKNOWN if is_number and is_open else Verdict.EQUAL


def _last_side(said: str) -> str:
    """What an equation says: what stands behind its last sign, or before it in `18 = x`."""
    left, _, right = said.rpartition("=")
    is_name = bool(left) and re.fullmatch(r"\s*[a-zA-Z]\s*", right)
    return (left.rpartition("=")[2] if is_name else right).strip()


def _stands_in(said: str, asked: str) -> bool:
    """Whether an expression was copied from the prompt, spaces and ways of writing aside."""
    pattern = r"\s*".join(map(re.escape, "".join(_even(said).split())))
    return re.search(rf"(?<![\w.}}]){pattern}(?![\w{{]|\.\d)", _even(asked)) is not None


def _even(text: str) -> str:
    for pattern, written in _WAYS:
        text = pattern.sub(written, text)
    return text


def verdict(answer: str, gold: str) -> Verdict:
    """The verdict on an answer and a gold, without the words around them."""
    said = compare(answer, gold)
    if said is not Verdict.UNKNOWN:
        return said
    from rewards.compare import compare_forms, is_ambiguous  # mpmath, a tenth of a second, for those that are no plain numbers

    said = compare_forms(answer, gold)
    if said is not Verdict.UNKNOWN or is_ambiguous(answer, gold):
        return said
    from rewards.expressions import compare_expressions

    return compare_expressions(answer, gold)
