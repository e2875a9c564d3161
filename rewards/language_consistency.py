"""`language_consistency`: the share of the reasoning that is written in the target language, from 0 to 1 (data/language.py)."""

from typing import Any

from data.language import LANGUAGES, share_in
from data.values import Messages
from rewards.text import CLOSE, completion_text


def language_consistency(
    prompts: list[str | Messages],
    completions: list[str | Messages],
    language: str | list[str] | None = None,
    answer_too: bool = False,
    **_: Any,
) -> list[float | None]:
    """Shares in [0, 1], None where there is no text to judge. `language`: a code as `en`, or the row's column; `answer_too`:
    not only the reasoning. A completion without a reasoning is judged whole.
    """
    rewards: list[float | None] = []
    for index, completion in enumerate(completions):
        wanted: str = language[index] if isinstance(language, list) else language or "en"
        if wanted not in LANGUAGES:
            raise ValueError(f"language_consistency does not know the language {wanted!r}; it knows {', '.join(LANGUAGES)}")
        text = completion_text(completion)
        reasoning = text if answer_too else text.partition(CLOSE)[0]
        rewards.append(share_in(reasoning, wanted))
    return rewards
