"""Numbers written in English words: `eighteen`, `two hundred and five`, `1.5 million`, `a dozen`, `one and a half`, `two thirds`."""

import re
from collections.abc import Sequence
from fractions import Fraction

UNITS = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen
eighteen nineteen""".split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
_SMALL = {word: n for n, word in enumerate(UNITS)} | {word: 10 * (n + 2) for n, word in enumerate(TENS)}
_SCALES = {"dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
SCALES = frozenset(_SCALES.values())
_PARTS = {"half": 2, "third": 3, "quarter": 4, "fourth": 4, "fifth": 5, "sixth": 6, "seventh": 7, "eighth": 8, "ninth": 9, "tenth": 10}
_MANY_PARTS = {("halves" if word == "half" else f"{word}s"): n for word, n in _PARTS.items()}
_LONGEST = 100


def number_in_words(text: str) -> Fraction | None:
    """The number that a text says in words, all of it; None if it says none, or has no word in it."""
    if len(text) > _LONGEST:
        return None
    words = re.split(r"[\s-]+", text.lower().strip("$ "))
    sign = -1 if words[0] in ("minus", "negative") else 1
    words = words[1:] if sign < 0 else words
    if not words:
        return None
    if words[-1] in _PARTS | _MANY_PARTS:
        value = _parts(words)
    else:
        value = _whole(["one", *words[1:]] if words[0] == "a" and {*words[1:2]} & {*_SCALES} else words)
    return None if value is None else sign * value


def _parts(words: Sequence[str]) -> Fraction | None:
    """`half`, `two thirds`, `three and a quarter`; `twenty third` is no part."""
    *before, part = ["a", *words] if len(words) == 1 else words
    *whole, count = before
    share = Fraction(1) if count in ("a", "an", "one") else _whole([count])
    if share is None or (part in _PARTS) != (share == 1) or (whole and whole[-1] != "and"):
        return None
    rest = Fraction(0) if not whole else Fraction(whole[0]) if whole[0].isdecimal() and len(whole) == 2 else _whole(whole[:-1])
    return None if rest is None else rest + share / (_PARTS | _MANY_PARTS)[part]


def _whole(words: Sequence[str]) -> Fraction | None:
    if not words or not all(re.fullmatch(r"\d[\d,]*(\.\d+)?", w) or w in _SMALL or w in _SCALES or w == "and" for w in words):
        return None
    if not any(word in _SMALL or word in _SCALES for word in words) or words[0] in ("and", *_SCALES) or words[-1] == "and":
        return None
    total, current = Fraction(0), Fraction(0)
    for before, word in zip([None, *words], words, strict=False):
        if word in _SCALES:
            current *= _SCALES[word]
            if _SCALES[word] > 100:
                total, current = total + current, Fraction(0)
        elif word == "and":
            if before not in _SCALES:
                return None  # `two and three` is a guess
        else:
            number = Fraction(_SMALL[word]) if word in _SMALL else Fraction(word.replace(",", ""))
            follows_ten = before in TENS and 0 < number < 10
            if before is not None and before not in _SCALES and before != "and" and not follows_ten:
                return None  # `one two`
            current += number
    return total + current
