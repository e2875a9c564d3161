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

_BETWEEN = re.compile(
    r"[\s$]*(?:\\\)|\\\])?\s*(?:,|;|,?\s*\b(?:and|or)\b|\\text\s*\{\s*(?:and|or)\s*\})\s*(?:\\\(|\\\[)?[\s$]*(?:[a-zA-Z]\s*=\s*)?"
)
"""Between two boxes that are one answer."""
_BOX = re.compile(r"\\f?box(?:ed)?(?:\s*\{|\s+(?P<word>[^\s{}$]+))")


def find_answer(text: str, prompt_text: str = "") -> str | None:
    """The answer that a completion gives; None if it gives none. A text that is nothing but a number is one."""
    after = answer_text(text, prompt_text)
    if after is None:
        return None
    has_marker, answer = marked_answer(after)
    if has_marker:
        return answer
    return after if exact(plain(after)) is not None else None


def marked_answer(after: str) -> tuple[bool, str | None]:
    """Whether a text without its reasoning marks an answer, and which; None if the mark never ends."""
    _, tag, inside = after.rpartition("<answer>")
    if tag:
        inside, closed, _ = inside.partition("</answer>")
        return True, (last_box(inside) or inside) if closed else None
    box = last_box(after)
    if box is not None:
        return True, box
    markers = list(_MARKERS.finditer(after))
    if not markers:
        return False, None
    line, _, _ = after[markers[-1].end() :].strip(" \t*_\n").partition("\n")
    return True, line


def find_golds(columns: Mapping[str, Any]) -> list[str]:
    """The gold answers of a row, each of which is right: column `answer`, then `solution`; none if there is none, or an empty one.

    A list holds several. Of a text, what stands from `####` on, else in the last box, else all of it. ValueError for other types.
    """
    for name in ("answer", "solution"):
        golds = columns.get(name)
        if golds is None:
            continue
        texts = [_gold(name, gold) for gold in (golds if isinstance(golds, list | tuple) else [golds])]
        return [text for text in texts if text.strip()]
    return []


def _gold(name: str, gold: Any) -> str:
    if not isinstance(gold, str | int | float):
        raise ValueError(f"column '{name}' holds {gold!r}; a gold answer is text or a number, or a list of such answers")
    text = str(gold)
    _, marker, after = text.rpartition("####")
    return after if marker else last_box(text) or text


def last_box(text: str) -> str | None:
    """What the last `\\boxed{…}` (or `\\fbox{…}`) of a text holds, with balanced braces; of `\\boxed 5`, the next word.

    Boxes with nothing but `,`, `and` or `or` between them are one answer: a list, whether it was asked for or is a guess.
    """
    found = list(_BOX.finditer(text))
    inside: list[str] = []
    begins = len(text)
    for box in reversed(found):
        start, end = box.span("word") if box["word"] else (box.end(), _closing(text, box.end()))
        if end is None:
            return ", ".join(inside) or None
        if inside and not _BETWEEN.fullmatch(text, end + (not box["word"]), begins):
            break
        inside.insert(0, text[start:end])
        begins = box.start()
    return ", ".join(inside) if found else None


def _closing(text: str, start: int) -> int | None:
    """Where the brace closes that was opened before `start`."""
    depth = 1
    for place in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return place
    return None
