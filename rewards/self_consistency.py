"""`self_consistency`: 1 for the answer that most of a group gives, 0 for others; a reward without gold answers (arXiv:2504.16084).

Answers count as one if `math_answer` would call them equal. Without a single largest camp of at least `min_votes` nobody is
judged. A completion without an answer is wrong, whatever the others say. Watch it with a shadow: a group may agree on a mistake.
"""

from collections.abc import Sequence
from typing import Any

from data.values import Messages
from rewards.answers import find_answer
from rewards.math_answer import verdict
from rewards.numbers import Verdict
from rewards.text import completion_text, per_completion


def self_consistency(
    prompts: list[str | Messages],
    completions: list[str | Messages],
    group_ids: list[str],
    prompt_texts: list[str] | None = None,
    min_votes: int = 2,
    **_: Any,
) -> list[float | None]:
    """Rewards 1.0, 0.0, or None where the group has no majority."""
    assert len(set(group_ids)) == 1, "a call holds one group"
    pairs = zip(completions, per_completion(prompt_texts, len(prompts)), strict=True)
    answers = [find_answer(completion_text(completion), prompt_text) for completion, prompt_text in pairs]
    camps = camps_of(answers)
    sizes = sorted((camps.count(camp) for camp in set(camps) - {None}), reverse=True)
    if not sizes or sizes[0] < min_votes or sizes[1:2] == sizes[:1]:
        return [0.0 if answer is None else None for answer in answers] if sizes else [None] * len(answers)
    return [float(camp is not None and camps.count(camp) == sizes[0]) for camp in camps]


def camps_of(answers: Sequence[str | None]) -> list[int | None]:
    """For each answer the place of the first one that it equals; None for no answer."""
    camps: list[int | None] = []
    for place, answer in enumerate(answers):
        heads = [camp for camp in dict.fromkeys(camps) if camp is not None]
        same = (camp for camp in heads if verdict(answer or "", answers[camp] or "") is Verdict.EQUAL)
        camps.append(None if answer is None else next(same, place))
    return camps
