"""`exact_text`: 1 if the answer is a gold text, 0 otherwise. Spaces are evened out, and, unless told otherwise, case and the
full stop.
"""

from typing import Any

from data.values import Messages
from rewards.answers import find_golds, marked_answer
from rewards.text import answer_text, completion_text, per_completion


def exact_text(
    prompts: list[str | Messages],
    completions: list[str | Messages],
    prompt_texts: list[str] | None = None,
    answer: list[Any] | None = None,
    solution: list[Any] | None = None,
    ignore_case: bool = True,
    **_: Any,
) -> list[float | None]:
    """Rewards 1.0, 0.0, or None without a gold; the answer is what is marked as one, else all of the text after the reasoning."""
    rewards: list[float | None] = []
    for index, prompt_text in enumerate(per_completion(prompt_texts, len(prompts))):
        golds = find_golds({"answer": answer and answer[index], "solution": solution and solution[index]})
        after = answer_text(completion_text(completions[index]), prompt_text)
        is_marked, marked = marked_answer(after) if after is not None else (True, None)
        said = marked if is_marked else after
        right = said is not None and even(said, ignore_case) in [even(gold, ignore_case) for gold in golds]
        rewards.append(float(right) if golds else None)
    return rewards


def even(text: str, ignore_case: bool) -> str:
    text = " ".join(text.split())
    return text.casefold().rstrip(".") if ignore_case else text
