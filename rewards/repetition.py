"""`repetition`: minus the share of n-grams that a text says again, from 0 (none) down to -1. For each completion alone.

Words are the grams; in scripts that write no spaces between words, characters are.
"""

import re
from typing import Any

from data.values import Messages
from rewards.text import completion_text

_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\u0e00-\u0e7f]|[^\W_]+")


def repetition(
    prompts: list[str | Messages], completions: list[str | Messages], ngram: int = 4, penalty: float = 1.0, **_: Any
) -> list[float | None]:
    """Rewards from -penalty to 0; a text of fewer than `ngram` words repeats nothing."""
    return [-penalty * repeated_share(completion_text(completion), ngram) for completion in completions]


def repeated_share(text: str, ngram: int) -> float:
    """1 - distinct n-grams / n-grams."""
    words = _WORD.findall(text.lower())
    grams = list(zip(*(words[start:] for start in range(ngram)), strict=False))
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0
