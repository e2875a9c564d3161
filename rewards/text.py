"""What a reward function reads of a completion: its text, and the part of it that is the answer, outside the reasoning.

Reasoning stands in `<think>…</think>`. Some chat templates open it themselves, as the last thing of the rendered prompt; then the
completion holds only the end. What stands inside is never an answer.
"""

from data.values import Messages

OPEN, CLOSE = "<think>", "</think>"


def completion_text(completion: str | Messages) -> str:
    """A completion in trl's format (text, or a list with one assistant message) as text."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


def opens_think(prompt_text: str) -> bool:
    """Whether the rendered prompt ends inside a `<think>` that it opened."""
    return prompt_text.rstrip().endswith(OPEN)


def answer_text(text: str, prompt_text: str = "") -> str | None:
    """What stands after the reasoning; all of the text if there is none; None if the reasoning never ends."""
    _, closed, after = text.rpartition(CLOSE)
    if OPEN in after or (not closed and opens_think(prompt_text)):
        return None
    return after
