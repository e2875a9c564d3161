"""Mixed language by script: words in a script that neither the prompt nor the language of formulas uses.

A language identifier overlooks the single Han word in a page of English; the Unicode script of its letters does not. Latin is at
home everywhere (formulas, code, names are written in it), and so is what the prompt itself uses: a text that is asked about
Russian may answer in it. A lone Greek letter is a variable, not Greek, and letters of mathematical styles count as Latin.
"""

import re
from functools import cache, lru_cache

import regex as patterns

SCRIPTS = (
    "Arabic", "Armenian", "Bengali", "Cyrillic", "Devanagari", "Georgian", "Greek", "Gujarati", "Gurmukhi", "Han", "Hangul", "Hebrew",
    "Hiragana", "Kannada", "Katakana", "Khmer", "Lao", "Latin", "Malayalam", "Myanmar", "Sinhala", "Tamil", "Telugu", "Thai",
)  # fmt: skip
"""What can be told apart; a letter of another script is foreign nowhere."""
_TOGETHER = [{"Hiragana", "Katakana", "Han"}]
"""Japanese is written in three scripts: who uses kana uses Han too."""
_NOT_LATIN = re.compile(
    r"[\u0370-\u1cff\u1f00-\u1fff\u2e80-\ud7ff\uf900-\ufaff\ufb00-\ufdff\ufe70-\ufefe\uff66-\uffdc\U00020000-\U0003ffff]"
)
"""Where letters of other scripts stand; quick to rule out."""


def foreign_share(text: str, prompt: str = "", allowed: frozenset[str] = frozenset()) -> tuple[float, str]:
    """(the share of a text's letters that are foreign, the first foreign words); (0.0, "") where there are none.

    `allowed` names scripts (of SCRIPTS) that are at home beside Latin and those of the prompt.
    """
    if text.isascii() or not _NOT_LATIN.search(text):
        return 0.0, ""
    home = {"Latin"} | allowed | _used(prompt)
    for together in _TOGETHER:
        if home & (together - {"Han"}):
            home |= together
    foreign = [word for word in _foreign_words(frozenset(home)).findall(text) if len(word) > 1 or not _is_greek(word)]
    if not foreign:
        return 0.0, ""
    letters = sum(character.isalpha() for character in text)
    return min(1.0, sum(map(len, foreign)) / max(1, letters)), " ".join(foreign[:5])


def _used(text: str) -> set[str]:
    if text.isascii():
        return set()
    return {name for name in SCRIPTS if _script(name).search(text)}


def _is_greek(letter: str) -> bool:
    return "\u0370" <= letter <= "\u03ff"


@cache
def _script(name: str) -> "patterns.Pattern[str]":
    return patterns.compile(rf"\p{{Script={name}}}")


@lru_cache(maxsize=256)
def _foreign_words(home: frozenset[str]) -> "patterns.Pattern[str]":
    """Runs of letters of one foreign script."""
    return patterns.compile("|".join(rf"(?:(?=\p{{L}})\p{{Script={name}}})+" for name in SCRIPTS if name not in home))
