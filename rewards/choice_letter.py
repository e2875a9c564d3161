"""`choice_letter`: 1 if the completion chooses the gold letter of a multiple-choice question, 0 if another, several or none.

The letter is looked for where `math_answer` looks for an answer, then in the last `the answer is (B)`, then in `option B` or `answer
choice B`, where no other is named, then as all of the text. Gold is a letter, or the text of one of the row's `choices`."""

import re
from typing import Any

from data.values import Messages
from rewards.answers import find_golds, marked_answer
from rewards.text import answer_text, completion_text, per_completion

_LETTER = r"[\s:*]*\(?([A-Z])\)?(?![\w'])"
_ANSWER = re.compile(r"\b(?i:answer(?:\s+is\b|\s*:)(?:[\s:*]*(?:choice|option))?)" + _LETTER)
_OPTION = re.compile(r"\b(?i:choice|option|answer(?!\s+I\s))(?i:\s+is\b)?" + _LETTER)
"""Names an option, which may be a wrong one: `option A`, `the answer A`; not `the answer I found`."""


def choice_letter(
    prompts: list[str | Messages],
    completions: list[str | Messages],
    prompt_texts: list[str] | None = None,
    answer: list[Any] | None = None,
    solution: list[Any] | None = None,
    choices: list[list[str]] | None = None,
    letters: str = "ABCDEFGHIJ",
    **_: Any,
) -> list[float | None]:
    """Rewards 1.0, 0.0, or None where a row's gold is no choice; `letters` are the letters that may be chosen."""
    rewards: list[float | None] = []
    for index, prompt_text in enumerate(per_completion(prompt_texts, len(prompts))):
        golds = find_golds({"answer": answer and answer[index], "solution": solution and solution[index]})
        options = (choices and choices[index]) or []
        gold = gold_letter(golds[0], options, letters) if golds else None
        chosen = chosen_letter(completion_text(completions[index]), prompt_text, letters)
        rewards.append(None if gold is None else float(chosen == gold))
    return rewards


def chosen_letter(text: str, prompt_text: str, letters: str) -> str | None:
    """The one letter that a completion chooses; None if it chooses none, or more than one."""
    after = answer_text(text, prompt_text)
    if after is None:
        return None
    is_marked, marked = marked_answer(after)
    if not is_marked:
        said, named = _ANSWER.findall(after), set(_OPTION.findall(after))
        marked = said[-1] if said else after if not named else named.pop() if len(named) == 1 else ""
    return as_letter(marked or "", letters)


def as_letter(text: str, letters: str) -> str | None:
    """`B`, `(B)`, `B.`, `\\text{(B)}` and `B) because` as a letter; not `A or B`."""
    text = re.sub(r"\\(?:text|mathrm|mathbf|textbf)\s*\{([^{}]*)\}", r"\1", text).strip(" \t\n$*_`.")
    alone = re.fullmatch(rf"[(\[]?([{letters}])[)\]]?", text)
    begins = re.match(rf"[(\[]?([{letters}])[)\].:](?=\s)", text)
    others = set(re.findall(rf"(?<![\w'])([{letters}])(?![\w'])", text[begins.end() :])) if begins else set()
    if alone or (begins and not others - {"A", "I"}):
        return (alone or begins)[1]  # type: ignore[index]
    return None


def gold_letter(gold: str, choices: list[str], letters: str) -> str | None:
    """The letter of a gold answer: itself, or the place of its text among the choices."""
    letter = as_letter(gold, letters)
    same = [place for place, choice in enumerate(choices) if choice.strip() == gold.strip()]
    return letter if letter or len(same) != 1 else letters[same[0]]
