"""Exact comparison of two short answers, with three verdicts.

Equal and different are said only where it is certain: both sides are the same text, or both are plain exact numbers (integers,
decimals, fractions, with thousands separators, a currency sign, a percent sign or a unit), compared as fractions. A gold that is a
number is also truly different from a list of guesses and from text that holds no number at all. Everything else is unknown, and
whoever asks must not make a 0 of that.
"""

import re
import unicodedata
from dataclasses import dataclass
from enum import Enum
from fractions import Fraction
from functools import lru_cache

from rewards.number_words import SCALES, TENS, UNITS, number_in_words

LONGEST = 1000
"""Characters; a longer text is not read as a number."""


class Verdict(Enum):
    EQUAL = "equal"
    DIFFERENT = "different"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Number:
    """An exact number as it was written."""

    value: Fraction
    unit: str = ""
    """Lower case, singular; `%` and `$` are units."""
    base: str = ""
    """Digits of a subscript, as in 11_2, which is not 11."""


def compare(answer: str, gold: str) -> Verdict:
    """What is certain of an answer, given the gold one; both without the words around them."""
    answer, gold = plain_pair(answer, gold)
    if not answer:
        return Verdict.DIFFERENT
    if answer == gold:
        return Verdict.EQUAL
    gold_number = exact(gold)
    if gold_number is None:
        return Verdict.UNKNOWN
    number = exact(answer) or _right_side(answer)
    if number is not None:
        return _compare_numbers(number, gold_number)
    spoken = _spoken(answer)
    if spoken is not None:
        return _compare_spoken(spoken, answer, gold_number)
    if len(answer) > LONGEST or is_guess(answer) or _says_no_number(answer):
        return Verdict.DIFFERENT
    return Verdict.UNKNOWN


def _compare_numbers(number: Number, gold: Number) -> Verdict:
    if number.base != gold.base:
        # 11_2 is 3, but a question that wants it in base 2 does not want a 3, and never an 11.
        return Verdict.UNKNOWN if _in_base_ten(number) == _in_base_ten(gold) else Verdict.DIFFERENT
    same = number.value == gold.value
    if number.unit == gold.unit or not number.unit or not gold.unit:
        # A gold of 50 may mean 50 %; a gold of 0.5 is 50 % all the same.
        same = same or _fraction(number) == _fraction(gold)
        return Verdict.EQUAL if same else Verdict.DIFFERENT
    # 6 inches is not 6 cm, 18 apples are not 19 fruits; 60 minutes and 1 hour, 18 apples and 18 fruits cannot be told.
    measured = {number.unit, gold.unit} <= MEASURES
    return Verdict.DIFFERENT if same == measured else Verdict.UNKNOWN


def _compare_spoken(spoken: Number, answer: str, gold: Number) -> Verdict:
    """A number with words in it: `eighteen`, and `1.5 million`, which is right for a gold of 1.5 if it was asked in millions."""
    scaled = any(character.isdigit() for character in answer) and abs(gold.value) < 1000 and gold.value
    return Verdict.UNKNOWN if scaled and spoken.value / gold.value in SCALES else _compare_numbers(spoken, gold)


def _spoken(text: str) -> Number | None:
    """The number that a text says in words, `eighteen`, and its unit, as in `two hours`; None for `half an hour`."""
    value = number_in_words(text)
    if value is not None:
        return Number(value)
    words = text.split()
    for end in range(len(words) - 1, max(0, len(words) - 5), -1):
        value, unit = number_in_words(" ".join(words[:end])), unit_name(" ".join(words[end:]))
        if value is not None:
            is_unit = all(map(str.isalpha, words[end:])) and words[end].lower() not in ("a", "an", "the", "of", "zero", "one")
            return Number(value, unit) if unit and is_unit else None
    return None


def _in_base_ten(number: Number) -> Fraction | None:
    if not number.base:
        return number.value
    try:
        return Fraction(int(str(number.value), int(number.base)))
    except ValueError:
        return None


def _fraction(number: Number) -> Fraction:
    return number.value / 100 if number.unit == "%" else number.value


# --- reading numbers --------------------------------------------------------------------------------------------------

_DIGITS = r"(?:[1-9]\d{0,2}(?:(?:,\d{3})+|(?: \d{3})+)|\d+)"
_NUMBER = re.compile(
    rf"(?P<sign>[-+]?)\s*(?P<currency>[$€£¥₹]?)\s*(?P<sign2>[-+]?)"
    rf"(?:(?:(?P<mixed>\d+)\s*)?\\frac\{{(?P<top>-?\d+)\}}\{{(?P<bottom>\d+)\}}"
    r"|(?P<mixed2>\d+)\s+(?P<top2>\d+)\s*/\s*(?P<bottom2>\d+)"
    rf"|(?P<whole>{_DIGITS})?(?P<decimals>\.\d+(?!\d|\\overline)|\.\d*\\overline\s*\{{\d+\}})?(?:[eE](?P<ten>[-+]?\d{{1,3}})(?!\d))?"
    rf"(?:\s*/\s*(?P<over>{_DIGITS}))?)"
    r"(?:_\{?(?P<base>\d+)\}?)?"
    r"(?:\s*(?P<percent>[%$€£¥₹元])|(?P<unit>\s+[^\W\d_]+(?:[ /-][^\W\d_]+){0,3}|°\s?[CF]?))?"
)
_UNIT_NAMES = {
    "$": "dollar", "€": "euro", "£": "pound", "usd": "dollar", "°": "degree", "in": "inch", "ft": "foot", "feet": "foot",
    "yd": "yard", "mi": "mile", "cm": "centimeter", "mm": "millimeter", "km": "kilometer", "m": "meter", "kg": "kilogram",
    "g": "gram", "lb": "pound", "oz": "ounce", "l": "liter", "ml": "milliliter", "h": "hour", "hr": "hour", "min": "minute",
    "sec": "second", "s": "second", "percent": "%", "inches": "inch", "centimetre": "centimeter", "metre": "meter",
    "¥": "yen", "元": "yuan", "₹": "rupee",
}  # fmt: skip
_UNIT_LETTERS = {
    "m": "meter", "s": "second", "g": "gram", "h": "hour", "l": "liter", "L": "liter", "N": "newton", "J": "joule", "V": "volt",
    "W": "watt", "A": "ampere", "K": "kelvin", "T": "tesla",
}  # fmt: skip
"""Units of one letter where they are set as text; not C and F, which are degrees and more, nor e, i, d and x."""
UNIT_LETTERS, LETTER_UNITS = frozenset(_UNIT_LETTERS), frozenset(_UNIT_LETTERS.values())
MEASURES = (
    frozenset(_UNIT_NAMES.values()) - {"%", "yen", "yuan"}
    | LETTER_UNITS
    | frozenset("cent penny dime nickel day week month year ton gallon quart pint cup acre radian mph kph ohm".split())
)
"""Units that measure: two of them are never one. `¥` is yen or yuan."""
_NOT_UNITS = frozenset(
    """or and not to from if but either maybe perhaps possibly is are was than times plus minus over squared cubed factorial mod choose
    hundred thousand million billion trillion dozen score half third quarter fifth tenth pi
    lakh crore mn bn twice thrice doubled tripled""".split()
) | frozenset(UNITS[2:] + TENS)
"""Words that make a number another number, or a guess; a text with one of them is not read as a number with a unit."""
_LEFT_SIDE = re.compile(r"\s*(?:[A-Za-z]|(?:(?!,\s)[-\d\s+*/().,×÷=$]|\\times|\\cdot)*)\s*")


@lru_cache(maxsize=4096)
def exact(text: str) -> Number | None:
    """The number that a plain text is, all of it; None if it is anything else."""
    if not text or len(text) > LONGEST:
        return None
    found = _NUMBER.fullmatch(text)
    if found is None or (found["sign"] and found["sign2"]):
        return None
    top = found["top"] or found["top2"]
    if top is not None:
        value, bottom = Fraction(int(top)), int(found["bottom"] or found["bottom2"])
        mixed = found["mixed"] or found["mixed2"]
        if mixed and not 0 <= value < bottom:
            return None
        value += int(mixed or 0) * bottom
    elif found["whole"] is not None or found["decimals"] is not None:
        value = _decimal(_joined(found["whole"] or "0"), found["decimals"] or "", found["ten"])
        bottom = int(_joined(found["over"] or "1"))
    else:
        return None
    unit = unit_name(found["unit"] or "")
    if bottom == 0 or unit is None:
        return None
    value = value / bottom * (-1 if "-" in (found["sign"] + found["sign2"]) else 1)
    return Number(value, _UNIT_NAMES.get(found["currency"] or found["percent"], "") or found["percent"] or unit, found["base"] or "")


def _decimal(whole: str, decimals: str, ten: str | None) -> Fraction:
    """`18`, `.25`, `.1\\overline{6}`, which goes on for ever, and the power of ten behind it, if any."""
    first, _, repeated = decimals.rstrip("}").partition(r"\overline")
    value = Fraction(whole + (first if len(first) > 1 else ""))
    if repeated:
        digits = repeated.strip(" {")
        value += Fraction(int(digits), 10 ** len(first[1:]) * (10 ** len(digits) - 1))
    return value if ten is None else value * Fraction(10) ** int(ten)


def _joined(digits: str) -> str:
    return digits.replace(",", "").replace(" ", "")


def unit_name(text: str) -> str | None:
    """A unit's first word in one spelling; None if the words are no unit."""
    words = re.split(r"[\s/-]+", text.strip().lower())
    if _NOT_UNITS.intersection(words) or _NOT_UNITS.intersection(word.rstrip("s") for word in words):
        return None
    first = words[0]
    if len(first) == 1 and first not in _UNIT_NAMES:
        return None  # a variable
    if first not in _UNIT_NAMES and len(first) > 3:
        first = first.removesuffix("s")
    return _UNIT_NAMES.get(first, first)


def _right_side(text: str) -> Number | None:
    """What `x = 18`, `= 18` and `7 + 11 = 18` say; not `2x = 18`, not `x >= 18`."""
    left, equals, right = text.rpartition("=")
    return exact(right.strip()) if equals and _LEFT_SIDE.fullmatch(left) else None


# --- what is certainly no number --------------------------------------------------------------------------------------

_GUESS = re.compile(
    r"\bor\b|\beither\b|;"
    r"|\d\s+and\s+[-+$]*\d+(?![\d./]|\s*/)"
    r"|\d\s*,\s+[-+$]*\s*\d|\d,(?!\d{3}(?!\d))\d"
    r"|\d\s+\$?\d+(?![\d./]|\s*/)"
    r"|\d\s*[–—]\s*\$?\d"
)
_SCRIPT = re.compile(r"[_^]\s*\{?\s*\d+\s*\}?")
"""The 2 of `\\log_2 8`."""
_NUMBER_WORDS = re.compile(
    r"\b(zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|(thir|four|fif|six|seven|eigh|nine)teen"
    r"|(twen|thir|for|fif|six|seven|eigh|nine)ty\w*|hundred|thousand|million|billion|dozen|half|third|quarter|none|nothing|pi|e)\b",
    re.IGNORECASE,
)


def is_guess(text: str) -> bool:
    """Whether a text offers several numbers, `18 or 19`, `18, 19`, `1 8`, where one was asked for."""
    return bool(_GUESS.search(_SCRIPT.sub("_", text))) and any(character.isdigit() for character in text)


def depth(text: str) -> int:
    """How deep the brackets of a text are nested, whether they are closed or not."""
    deepest = now = 0
    for character in text:
        now = max(0, now + {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(character, 0))
        deepest = max(deepest, now)
    return deepest


def _says_no_number(text: str) -> bool:
    return not any(character.isdigit() or character in "\\π√" for character in text) and not _NUMBER_WORDS.search(text)


# --- taking off what only dresses a number ----------------------------------------------------------------------------

_TEXT = r"\\(?:text(?:normal|rm|bf|it|sf|tt)?|math(?:rm|bf|it|sf|tt)|mbox|boldsymbol|bm|emph|underline)"
_REPLACED = (
    (re.compile(r"(?<=\d)(?:,\\!\s*|\{,\})(?=\d{3}(?!\d))"), lambda _: ""),  # 24{,}000
    (re.compile(r",\\!\s*|\{,\}"), lambda _: ","),
    (re.compile(r"\\[$%]"), lambda found: found[0][1]),
    (re.compile(r"\\[dt]frac"), lambda _: r"\frac"),
    (
        re.compile(r"\\frac\s*(?:(\d)|\{\s*(-?\d+)\s*\})\s*(?:(\d)|\{\s*(\d+)\s*\})"),
        lambda found: rf"\frac{{{found[1] or found[2]}}}{{{found[3] or found[4]}}}",
    ),
    (re.compile(r"(?<!\\)\\(?:left|right|displaystyle|phantom|[!,;: ])"), lambda _: ""),
    (re.compile(r"~|\\(?:quad|qquad)\b"), lambda _: " "),
    (re.compile(_TEXT + r"\s*\{([^{}]*)\}"), lambda found: f" {found[1]} "),
    (re.compile(r"\\(?:text)?color\s*\{[^{}]*\}|\\(?:checkmark|square|blacksquare|qed)(?![a-zA-Z])"), lambda _: " "),
    (re.compile(r"(?<=\d)\s?(?:\^\s?\{\s?(?:st|nd|rd|th)\s?\}|\^?\s?(?:st|nd|rd|th)\b)"), lambda _: " "),  # 18th
    (re.compile(r"\bper cent\b"), lambda _: "percent"),
    (re.compile(r"\^\s*\{?\s*\\circ\s*\}?|\\degree"), lambda _: "°"),
    (re.compile(r"^\s*(?i:minus|negative)\s+(?=[$\d.\\])"), lambda _: "-"),
)
_LETTER_UNIT = re.compile(
    rf"(?<=[\w)}}$])(?:\s|~|\\[!,;: ])*(?:{_TEXT}\s*\{{\s*(?P<unit>[{''.join(_UNIT_LETTERS)}])"
    rf"(?:\s*/\s*(?P<per>[{''.join(_UNIT_LETTERS)}]))?\s*(?:\^\s*(?P<inside>[23])\s*)?\}}|\\Omega|[ΩΩ])"
    r"(?:\s*\^\s*\{?\s*(?P<power>[23])\s*\}?)?\s*$"
)
_BARE_UNIT = re.compile(
    rf"(?:(?<=[\d)}}$π])\s*|(?<=\\pi)\s+)(?P<unit>[{''.join(_UNIT_LETTERS)}])(?:\s*/\s*(?P<per>[{''.join(_UNIT_LETTERS)}]))?"
    r"(?:\s*\^\s*\{?\s*(?P<power>[23])\s*\}?)?$"
)
_NAMED_UNIT = re.compile(
    r"(?:(?<=[\d)}$π])\s*|(?<=\\pi)\s+)(?P<unit>[a-zA-Z]{2,})(?:\s*/\s*(?P<per>[a-zA-Z]+))?(?:\s*\^\s*\{?\s*(?P<power>[23])\s*\}?)?$"
)
_NO_VALUE = re.compile(rf"(?:\\circ\s*\}}?|{_TEXT}\s*\{{[^{{}}]*\}})$")
_TYPED = str.maketrans(
    {chr(code): chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)}  # full width, as in Chinese text
    | {"\u2212": "-", "\u2044": "/", "\u3000": " ", "\u3001": ",", "\u3002": ".", "≈": r"\approx "}
    | dict.fromkeys("\u200b\u200c\u200d\u200e\u200f\u2060\ufeff\ufe0f", None)
)
_DASH = re.compile(r"(?<![\d\s])\s*–(?=\s*[\d.$\\])")
"""A dash that is a minus; between two numbers it makes a range."""
_ORNAMENT = re.compile("[\u25a0-\u25ff\u2700-\u27bf\U0001f300-\U0001faff]")
_VULGAR = re.compile("[\u00bc-\u00be\u2150-\u215e]")
_RAISED, _LOWERED = "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "₀₁₂₃₄₅₆₇₈₉"
_LEVEL = str.maketrans(_RAISED + _LOWERED, "0123456789+-n0123456789")
_WRAPPERS = (("$$", "$$"), (r"\(", r"\)"), (r"\[", r"\]"), ("**", "**"), ("__", "__"), ("`", "`"), ("$", "$"))


def _typed(text: str) -> str:
    """As it would be typed in LaTeX: `x²`, `½` and `（3，4）`, without ornaments and characters that nobody sees."""
    text = _ORNAMENT.sub(" ", _DASH.sub("-", text.translate(_TYPED)))
    text = _VULGAR.sub(lambda found: rf"\frac{{{unicodedata.normalize('NFKC', found[0])}}}".replace("\u2044", "}{"), text)
    text = re.sub(f"[{_RAISED}]+", lambda found: f"^{{{found[0].translate(_LEVEL)}}}", text)
    return re.sub(f"[{_LOWERED}]+", lambda found: f"_{{{found[0].translate(_LEVEL)}}}", text)


def _with_unit(text: str) -> str:
    """`36\\pi\\text{ m}^2` with the unit's whole word, which is no variable; what is no value with a unit of one letter as it is."""
    found = _LETTER_UNIT.search(text)
    value = text[: found.start()] if found else ""
    if not found or not re.search(r"\d|\\pi", value) or _NO_VALUE.search(value):
        return text
    words = [_UNIT_LETTERS[letter] for letter in (found["unit"], found["per"]) if letter] or ["ohm"]
    power = found["inside"] or found["power"]
    return f"{value} {'/'.join(words)}" + (f"^{power}" if power else "")


def plain(text: str) -> str:
    """A short answer without maths delimiters, emphasis, layout commands, and the full stop at its end."""
    text = text.strip()
    if text.isascii() and text.isdigit():
        return text
    text = " ".join((text if text.isascii() else _typed(text)).split())
    stripped = None
    while stripped != text:
        stripped = text
        text = text.strip().rstrip(".: ")
        for left, right in _WRAPPERS:
            inside = text[len(left) : -len(right)]
            if text.startswith(left) and text.endswith(right) and inside and left not in inside:
                text = inside
    text = _with_unit(text)
    for pattern, replacement in _REPLACED:
        text = pattern.sub(replacement, text)
    return " ".join(text.split()).rstrip(".:,; ")


def plain_pair(answer: str, gold: str) -> tuple[str, str]:
    """Both texts plain; where one names its unit, and the letter behind the other's value spells it, with the name: `5 meter` for `5m`."""
    answer, gold = plain(answer), plain(gold)
    if answer == gold or max(len(answer), len(gold)) > LONGEST:
        return answer, gold
    return _spelled(answer, gold), _spelled(gold, answer)


def _spelled(text: str, other: str) -> str:
    bare, named = _BARE_UNIT.search(text), _NAMED_UNIT.search(other)
    if not bare or not named or not re.search(r"\d|\\pi|π", text[: bare.start()]):
        return text
    unit, per = _UNIT_LETTERS[bare["unit"]], _UNIT_LETTERS.get(bare["per"] or "", "")
    if (unit, per, bare["power"]) != (unit_name(named["unit"]), unit_name(named["per"] or ""), named["power"]):
        return text
    return f"{text[: bare.start()]} {unit}" + (f"/{per}" if per else "") + (f"^{bare['power']}" if bare["power"] else "")
