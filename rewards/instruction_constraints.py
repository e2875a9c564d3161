"""`instruction_constraints`: the share of a row's verifiable instructions that the answer follows (IFEval, arXiv:2311.07911).

A row carries IFEval's columns `instruction_id_list` and `kwargs`. `all_or_nothing` gives 1 only if every instruction is followed. A
row with an instruction or a language that is not known here cannot be judged. The kinds are in `rewards.instruction_kinds`.
"""

from collections.abc import Mapping
from typing import Any

from data.values import Messages
from rewards.instruction_kinds import KINDS
from rewards.language_consistency import LANGUAGES
from rewards.text import answer_text, completion_text, per_completion


def instruction_constraints(
    prompts: list[str | Messages],
    completions: list[str | Messages],
    instruction_id_list: list[list[str]],
    kwargs: list[list[Mapping[str, Any]]],
    prompt_texts: list[str] | None = None,
    all_or_nothing: bool = False,
    **_: Any,
) -> list[float | None]:
    """Rewards from 0 to 1, or None; what stands in the reasoning follows nothing."""
    rewards: list[float | None] = []
    for index, prompt_text in enumerate(per_completion(prompt_texts, len(prompts))):
        answer = answer_text(completion_text(completions[index]), prompt_text)
        names = instruction_id_list[index]
        languages = [(options or {}).get("language") for options in kwargs[index]]
        if not names or not set(names) <= set(KINDS) or not set(languages) <= {None, *LANGUAGES}:
            rewards.append(None)
            continue
        followed = [follows(answer or "", name, options) for name, options in zip(names, kwargs[index], strict=True)]
        rewards.append(float(all(followed)) if all_or_nothing else sum(followed) / len(followed))
    return rewards


def follows(answer: str, name: str, options: Mapping[str, Any] | None) -> bool:
    """Whether an answer follows one instruction; an empty one follows none."""
    given = {key: value for key, value in (options or {}).items() if value is not None}
    return bool(answer.strip()) and KINDS[name](answer.strip(), **given)
