"""`tag_count`: the share of wanted tags that stand exactly once, as a softer `think_format` for a policy that knows no tags yet."""

from typing import Any

from data.values import Messages
from rewards.text import OPEN, completion_text, opens_think, per_completion


def tag_count(
    prompts: list[str | Messages],
    completions: list[str | Messages],
    prompt_texts: list[str] | None = None,
    tags: tuple[str, ...] = ("<think>", "</think>", "<answer>", "</answer>"),
    **_: Any,
) -> list[float | None]:
    """Rewards from 0 to 1; a `<think>` that the chat template opened counts as the completion's."""
    rewards: list[float | None] = []
    for completion, prompt_text in zip(completions, per_completion(prompt_texts, len(prompts)), strict=True):
        text = (OPEN if opens_think(prompt_text) else "") + completion_text(completion)
        rewards.append(sum(text.count(tag) == 1 for tag in tags) / len(tags))
    return rewards
