"""Where an answer stands: in the completion of a policy, and in the gold column of a dataset.

A completion's answer is looked for after its reasoning only: in the last `<answer>…</answer>`, else the last `\\boxed{…}`, else
what follows the last of `####`, `Answer:` and `A:` on its line, else the whole text if that is nothing but a number. A number that
merely occurs in the text is not an answer.
"""

import re
from collections.abc import Mapping
from typing import Any

from rewards.numbers import exact, plain
from rewards.text import answer_text

_MARKERS = re.compile(r"####|\b(?i:answer)\W{0,3}:|(?<![\w&])A:")


def find_answer(text: str, prompt_text: str = "") -> str | None:
    """The answer that a completion gives; None if it gives none."""
    after = answer_text(text, prompt_text)
    if after is None:
        return None
    _, tag, inside = after.rpartition("<answer>")
    if tag:
        inside, closed, _ = inside.partition("</answer>")
        return (last_box(inside) or inside) if closed else None
    box = last_box(after)
    if box is not None:
        return box
    markers = list(_MARKERS.finditer(after))
    if markers:
        line, _, _ = after[markers[-1].end() :].strip(" \t*_\n").partition("\n")
        return line
    return after if exact(plain(after)) is not None else None


def find_gold(columns: Mapping[str, Any]) -> str | None:
    """The gold answer of a row: column `answer`, then `solution`; from `####` on, else the last box, else all of it."""
    for name in ("answer", "solution"):
        gold = columns.get(name)
        if gold is None:
            continue
        if not isinstance(gold, str | int | float):
            raise ValueError(f"column '{name}' holds {gold!r}; a gold answer is text or a number")
        text = str(gold)
        _, marker, after = text.rpartition("####")
        return after if marker else last_box(text) or text
    return None


def last_box(text: str) -> str | None:
    """What the last `\\boxed{…}` (or `\\fbox{…}`) of a text holds, with balanced braces."""
    found = list(re.finditer(r"\\f?box(?:ed)?\s*\{", text))
    if not found:
        return None
    depth, start = 1, found[-1].end()
    for place in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[start:place]
    return None
