"""What a reward function reads of a completion: its text, and the part of it that is the answer, outside the reasoning.

Reasoning stands in `<think>…</think>`. Some chat templates open it themselves, as the last thing of the rendered prompt; then the
completion holds only the end. What stands inside is never an answer.
"""

import re

from data.values import Messages

OPEN, CLOSE = "<think>", "</think>"


def completion_text(completion: str | Messages) -> str:
    """A completion in trl's format (text, or a list with one assistant message) as text."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


def as_text(prompt: str | Messages) -> str:
    """A prompt as one text, messages with their roles."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def opens_think(prompt_text: str) -> bool:
    """Whether the rendered prompt ends inside a `<think>` that it opened."""
    return prompt_text.rstrip().endswith(OPEN)


def answer_text(text: str, prompt_text: str = "") -> str | None:
    """What stands after the reasoning; all of the text if there is none; None if the reasoning never ends."""
    _, closed, after = text.rpartition(CLOSE)
    if OPEN in after or (not closed and opens_think(prompt_text)):
        return None
    return after


_FENCE = re.compile(r"^(`{3,}|~{3,})[^\n`]*\n(.*?)^\1[ \t]*$", re.DOTALL | re.MULTILINE)


def last_block(text: str) -> str | None:
    """What the last fenced block of a text holds; None if it has none."""
    found = _FENCE.findall(text)
    return found[-1][1] if found else None


def per_completion(texts: list[str] | None, count: int) -> list[str]:
    """Rendered prompts, one for each completion, or empty texts where there are none."""
    return texts if texts is not None else [""] * count
