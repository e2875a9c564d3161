"""`math_answer`: 1 if the completion's answer equals a gold one, 0 if it is different from all, None if that cannot be said.

Three readings, each asked only for what the one before does not know: exact numbers (`rewards.numbers`), the shapes and values of
LaTeX (`rewards.forms`), and math-verify (`rewards.expressions`). A completion without an answer is wrong. A row without a gold
answer cannot be judged.
"""

from collections.abc import Sequence
from typing import Any

from data.values import Messages
from rewards.answers import find_answer, find_golds
from rewards.numbers import Verdict, compare
from rewards.text import completion_text

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
        rewards.append(REWARD[verdict_on(completion_text(completion), golds, prompt_text)] if golds else None)
    return rewards


def verdict_on(text: str, golds: Sequence[str], prompt_text: str = "") -> Verdict:
    """The verdict on one completion: equal to one of the golds, different from all of them, or unknown."""
    answer = find_answer(text, prompt_text)
    if answer is None:
        return Verdict.DIFFERENT
    verdicts = []
    for gold in golds:
        verdicts.append(verdict(answer, gold))
        if verdicts[-1] is Verdict.EQUAL:
            return Verdict.EQUAL
    return Verdict.UNKNOWN if Verdict.UNKNOWN in verdicts else Verdict.DIFFERENT


def verdict(answer: str, gold: str) -> Verdict:
    """The verdict on an answer and a gold, without the words around them."""
    said = compare(answer, gold)
    if said is not Verdict.UNKNOWN:
        return said
    from rewards.forms import compare_forms  # mpmath, a tenth of a second, for those that are no plain numbers

    said = compare_forms(answer, gold)
    if said is not Verdict.UNKNOWN:
        return said
    from rewards.expressions import compare_expressions

    return compare_expressions(answer, gold)
