"""Words of a text, what it says again, and where its reasoning ends: what filters, dedup and decontamination look at.

A word is a run of letters and digits, a character of a script that writes no spaces, or a single sign of arithmetic or comparison:
`47+85` and `47-85` are not the same words, and `47×85` and `47*85` are. Case, punctuation, other markup and the width of characters
make no difference.
"""

import re
import unicodedata
from collections.abc import Sequence

OPEN, CLOSE = "<think>", "</think>"
_WORD = re.compile(
    r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\u0e00-\u0e7f]"  # kana, Han, Hangul, Thai
    r"|(?:(?![\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\u0e00-\u0e7f])[^\W_])+"
    r"|(?<![-+*/^=<>≤≥≠])[-+*/^=<>≤≥≠](?![-+*/^=<>≤≥≠])"  # a row of them is a rule of a table, or code
)
_ASCII_WORD = re.compile(r"[a-z0-9]+|(?<![-+*/^=<>])[-+*/^=<>](?![-+*/^=<>])")

_SIGNS = str.maketrans("×·⋅÷−", "***/-")


def words(text: str) -> list[str]:
    """Words in their order, in lower case, after Unicode's NFKC; the signs `×`, `·`, `÷` and `−` as `*`, `*`, `/` and `-`."""
    if text.isascii():
        return _ASCII_WORD.findall(text.lower())
    return _WORD.findall(unicodedata.normalize("NFKC", text.translate(_SIGNS)).lower())


def grams(found: Sequence[str], n: int) -> list[tuple[str, ...]]:
    """The n-grams of some words, in order; none if there are fewer than n."""
    return list(zip(*(found[start:] for start in range(n)), strict=False))


def repeated_share(found: Sequence[tuple[str, ...]]) -> float:
    """1 - distinct n-grams / n-grams; 0 if there are none."""
    return 1.0 - len(set(found)) / len(found) if found else 0.0


def visible(text: str) -> str:
    """Text as people may see it: what cannot be shown, or reverses the text around it, is written as its number."""
    return "".join(character if _can_be_seen(ord(character)) else f"\\u{ord(character):04x}" for character in text)


def _can_be_seen(code: int) -> bool:
    # Controls, halves of surrogate pairs, and marks of direction.
    if code < 0x20:
        return code in (0x09, 0x0A)
    return not (0x7F <= code < 0xA0 or 0xD800 <= code < 0xE000 or 0x202A <= code <= 0x202E or 0x2066 <= code <= 0x2069)


def split_reasoning(completion: str) -> tuple[str | None, str]:
    """(reasoning, answer). The reasoning is None where nothing marks one; a completion may hold only the end of it, as some chat
    templates open `<think>` themselves. The answer is empty where the reasoning does not end."""
    before, closed, after = completion.rpartition(CLOSE)
    if closed:
        return before.partition(OPEN)[2] if OPEN in before else before, after
    opened_at = completion.find(OPEN)
    return (None, completion) if opened_at < 0 else (completion[opened_at + len(OPEN) :], "")
