"""`length`: what a completion's length in tokens is worth, by one of three rules.

    soft_overlong  0 up to max_tokens - buffer, then down to -1 at max_tokens and beyond (DAPO, arXiv:2503.14476, eq. 13)
    cosine         right answers fall from 1 to 0.5 as they get longer, wrong ones rise from -1 to -0.5 (arXiv:2502.03373)
    group          from 0.5 for the shortest of the group to -0.5 for the longest; a wrong one gets 0 at most (arXiv:2501.12599)

The latter two need to know what is right: `judge` names the reward that says so; where it cannot say, neither can this one.
"""

import importlib
import math
from collections.abc import Sequence
from typing import Any, Literal

from data.values import Messages

JUDGES = ("math_answer", "choice_letter", "exact_text")


def length(
    prompts: list[str | Messages],
    completions: list[str | Messages],
    completion_ids: list[list[int]],
    completion_masks: list[list[int]] | None = None,
    group_ids: list[str] | None = None,
    prompt_texts: list[str] | None = None,
    answer: list[Any] | None = None,
    solution: list[Any] | None = None,
    kind: Literal["soft_overlong", "cosine", "group"] = "soft_overlong",
    max_tokens: int | None = None,
    buffer: int | None = None,
    right: Sequence[float] = (1.0, 0.5),
    wrong: Sequence[float] = (-1.0, -0.5),
    judge: str = "math_answer",
    **_: Any,
) -> list[float | None]:
    """Rewards by `kind`. `buffer`: tokens before max_tokens, a fifth of it unless told; `right`, `wrong`: worth at 0 and
    max_tokens.
    """
    # What a tool wrote is no length of the policy's.
    lengths = [len(ids) for ids in completion_ids] if completion_masks is None else [sum(mask) for mask in completion_masks]
    if kind not in ("soft_overlong", "cosine", "group"):
        raise ValueError(f"length has no kind '{kind}'; there are soft_overlong, cosine and group")
    if kind != "group" and not max_tokens:
        raise ValueError(f"length of kind {kind} needs the option max_tokens")
    if kind == "soft_overlong":
        assert max_tokens
        return [soft_overlong(n, max_tokens, buffer if buffer is not None else max_tokens // 5) for n in lengths]
    if judge not in JUDGES:
        raise ValueError(f"length: judge is {judge!r}; it may be {', '.join(JUDGES)}")
    function = getattr(importlib.import_module(f"rewards.{judge}"), judge)
    verdicts = function(prompts, completions, prompt_texts=prompt_texts, answer=answer, solution=solution)
    if kind == "group":
        assert len(set(group_ids or ["one"])) == 1, "a call holds one group"
        return by_group(lengths, verdicts)
    return [None if v is None else cosine(n, max_tokens or 1, right if v >= 1 else wrong) for n, v in zip(lengths, verdicts, strict=True)]


def soft_overlong(tokens: int, max_tokens: int, buffer: int) -> float:
    """arXiv:2503.14476, eq. 13."""
    over = tokens - (max_tokens - buffer)
    if over <= 0:
        return 0.0
    return -1.0 if tokens >= max_tokens else -over / buffer


def cosine(tokens: int, max_tokens: int, ends: Sequence[float]) -> float:
    """Half a cosine from ends[0] at length 0 to ends[1] at max_tokens and beyond."""
    share = min(1.0, tokens / max_tokens)
    return ends[1] + 0.5 * (ends[0] - ends[1]) * (1.0 + math.cos(math.pi * share))


def by_group(lengths: Sequence[int], verdicts: Sequence[float | None]) -> list[float | None]:
    """arXiv:2501.12599, section 2.3.3; all 0 where all have the same length."""
    shortest, longest = min(lengths), max(lengths)
    rewards: list[float | None] = []
    for tokens, verdict in zip(lengths, verdicts, strict=True):
        worth = 0.5 - (tokens - shortest) / (longest - shortest) if longest > shortest else 0.0
        rewards.append(None if verdict is None else worth if verdict >= 1 else min(0.0, worth))
    return rewards
