"""`think_format`: 1 if a completion is exactly one `<think>…</think>` and then an answer, 0 otherwise.

The `<think>` may stand at the end of the rendered prompt instead, where the chat template opens it.
"""

from typing import Any

from data.values import Messages
from rewards.text import CLOSE, OPEN, completion_text, opens_think


def think_format(
    prompts: list[str | Messages],
    completions: list[str | Messages],
    prompt_texts: list[str] | None = None,
    **_: Any,
) -> list[float | None]:
    """Rewards 0.0 or 1.0, one for each completion."""
    texts = map(completion_text, completions)
    return [float(is_thought_then_answer(t, p)) for t, p in zip(texts, prompt_texts or [""] * len(prompts), strict=True)]


def is_thought_then_answer(text: str, prompt_text: str = "") -> bool:
    if opens_think(prompt_text):
        text = OPEN + text
    before, _, rest = text.partition(OPEN)
    _, closed, answer = rest.partition(CLOSE)
    alone = OPEN not in rest and CLOSE not in before + answer
    return not before.strip() and bool(closed) and alone and bool(answer.strip())
