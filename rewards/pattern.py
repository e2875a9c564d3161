"""`regex`: 1 if a pattern is found in the answer (or in the whole completion), 0 otherwise. A search that takes too long fails.

A pattern can take exponential time on a text that the policy chose; the `regex` library stops it, and that is a failed Score, as
the pattern is to blame and not the answer."""

from typing import Any

import regex as patterns

from data.values import Messages
from rewards.text import answer_text, completion_text, per_completion


def regex(
    prompts: list[str | Messages],
    completions: list[str | Messages],
    pattern: str,
    prompt_texts: list[str] | None = None,
    reasoning: bool = False,
    full: bool = False,
    limit_s: float = 1.0,
    **_: Any,
) -> list[float | None]:
    """Rewards 1.0 or 0.0. `reasoning`: search the reasoning too; `full`: the pattern must match all of the text; `limit_s` per
    text.
    """
    compiled = patterns.compile(pattern)
    rewards: list[float | None] = []
    for completion, prompt_text in zip(completions, per_completion(prompt_texts, len(prompts)), strict=True):
        text = completion_text(completion)
        searched = text if reasoning else answer_text(text, prompt_text)
        match = compiled.fullmatch if full else compiled.search
        try:
            rewards.append(float(searched is not None and match(searched, timeout=limit_s) is not None))
        except TimeoutError:
            raise TimeoutError(f"the pattern {pattern!r:.60} took more than {limit_s:g} s on a text") from None
    return rewards
