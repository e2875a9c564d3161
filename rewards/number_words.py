"""Numbers written in English words: `eighteen`, `two hundred and five`, `1.5 million`, `three dozen`."""

import re
from fractions import Fraction

_UNITS = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen
eighteen nineteen""".split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
_SMALL = {word: n for n, word in enumerate(_UNITS)} | {word: 10 * (n + 2) for n, word in enumerate(_TENS)}
_SCALES = {"dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
SCALES = frozenset(_SCALES.values())
_LONGEST = 100


def number_in_words(text: str) -> Fraction | None:
    """The number that a text says in words, all of it; None if it says none, or has no word in it."""
    if len(text) > _LONGEST:
        return None
    words = re.split(r"[\s-]+", text.lower().strip("$ "))
    sign = -1 if words[0] in ("minus", "negative") else 1
    words = words[1:] if sign < 0 else words
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
            follows_ten = before in _TENS and 0 < number < 10
            if before is not None and before not in _SCALES and before != "and" and not follows_ten:
                return None  # `one two`
            current += number
    return sign * (total + current)
