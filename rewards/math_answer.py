"""`math_answer`: 1 if the completion's answer equals the gold one, 0 if it is different, None if that cannot be said.

The fast path is exact and decides nearly all plain numbers (`rewards.numbers`); what it does not know goes to math-verify
(`rewards.expressions`). A completion without an answer is wrong. A row without a gold answer cannot be judged.
"""

from typing import Any

from data.values import Messages
from rewards.answers import find_answer, find_gold
from rewards.expressions import compare_expressions
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
    """Rewards 1.0, 0.0 or None, one for each completion; gold is `answer`, then `solution`."""
    rewards: list[float | None] = []
    for index, completion in enumerate(completions):
        columns = {"answer": answer and answer[index], "solution": solution and solution[index]}
        prompt_text = prompt_texts[index] if prompt_texts else ""
        gold = find_gold(columns)
        rewards.append(None if gold is None else REWARD[verdict_on(completion_text(completion), gold, prompt_text)])
    return rewards


def verdict_on(text: str, gold: str, prompt_text: str = "") -> Verdict:
    """The verdict on one completion."""
    answer = find_answer(text, prompt_text)
    if answer is None:
        return Verdict.DIFFERENT
    verdict = compare(answer, gold)
    return compare_expressions(answer, gold) if verdict is Verdict.UNKNOWN else verdict
