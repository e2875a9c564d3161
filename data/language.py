"""The share of a text that is written in a language, from 0 to 1: formulas and code are no language.

Two tests, as neither is enough. By script: letters of another script (Han in an English text) are foreign wherever they stand; a
language identifier overlooks a single word. By identifier, for languages of one script: each sentence of some length is foreign if
py3langid, whose model is part of the package, finds another language much more likely.
"""

import re
from functools import lru_cache
from typing import Any

import regex as patterns

_SCRIPTS = {
    "zh": ("Han",), "ja": ("Han", "Hiragana", "Katakana"), "ko": ("Hangul",), "ru": ("Cyrillic",), "uk": ("Cyrillic",),
    "bg": ("Cyrillic",), "ar": ("Arabic",), "fa": ("Arabic",), "he": ("Hebrew",), "hi": ("Devanagari",), "th": ("Thai",),
    "el": ("Greek",), "bn": ("Bengali",), "ta": ("Tamil",), "ka": ("Georgian",), "hy": ("Armenian",), "te": ("Telugu",),
    "kn": ("Kannada",), "ml": ("Malayalam",), "gu": ("Gujarati",), "pa": ("Gurmukhi",), "mr": ("Devanagari",), "ne": ("Devanagari",),
    "ur": ("Arabic",),
}  # fmt: skip
_LATIN = ("en", "de", "fr", "es", "it", "pt", "nl", "pl", "sv", "da", "no", "fi", "cs", "hu", "ro", "tr", "vi", "id", "sw")
LANGUAGES = (*_LATIN, *_SCRIPTS)
SHORTEST = 20
"""Letters; a shorter sentence is judged by its script alone."""
MARGIN = 5.0
"""Nats by which another language must be more likely."""
_NO_LANGUAGE = re.compile(
    r"```.*?(?:```|\Z)|`[^`\n]*`|\$\$.*?\$\$|\$[^$\n]*\$|\\\[.*?\\\]|\\\(.*?\\\)|\\[a-zA-Z]+|https?://\S+|</?\w+>", re.DOTALL
)
_SENTENCE = re.compile(r"(?<=[.!?。！？])\s+|(?<=[。！？])|\n+")
_LETTERS = re.compile(r"[^\W\d_]")


def share_in(text: str, language: str) -> float | None:
    """The share of a text's letters that stand in sentences of the language and in its script; None if it has no letters."""
    ours = patterns.compile("|".join(rf"\p{{Script={name}}}" for name in _SCRIPTS.get(language, ("Latin",))))
    total = right = 0
    for sentence in _SENTENCE.split(_NO_LANGUAGE.sub(" ", text)):
        # A single letter is a variable, and a Greek one in an English proof is no Greek.
        letters = len(_LETTERS.findall(re.sub(r"(?<![^\W\d_])[a-zA-Zα-ωΑ-Ω](?![^\W\d_])", " ", sentence)))
        native = len(ours.findall(sentence)) if letters else 0
        native = min(native, letters)
        total += letters
        if native >= SHORTEST and 2 * native >= letters and _is_foreign(sentence, language):
            native = 0
        right += native
    return right / total if total else None


def _is_foreign(sentence: str, language: str) -> bool:
    ranked = dict(_identifier().rank(re.sub(r"[\d+*/=<>^_{}()\[\]|-]+", " ", sentence)))
    return max(ranked.values()) - ranked[language] > MARGIN


@lru_cache(maxsize=1)
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier  # a second, where it is needed

    identifier = LanguageIdentifier.from_model_file(MODEL_FILE)
    identifier.set_languages(list(LANGUAGES))
    return identifier
