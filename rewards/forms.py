"""The shape of an answer: a scalar, a list, a tuple or interval, a union, a matrix, an equation, or words.

What cannot be read at all has none. `rewards.compare` says which shapes say the same.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from rewards.latex import Tree, Unreadable, read
from rewards.numbers import MEASURES, depth, exact, unit_name

LONGEST = 500
"""Characters; a longer text is not read."""
DEEPEST = 40
"""Brackets within brackets; a text with more is not read."""


@dataclass(frozen=True)
class Form:
    """An answer as it was read."""

    kind: Literal["scalar", "list", "tuple", "union", "matrix", "equation", "relation", "ratio", "based", "words"]
    items: tuple["Form", ...] = ()
    """Of a list, tuple or union: its members; of a matrix: all entries, row by row; of an equation: its two sides."""
    tree: Tree = ()
    """Of a scalar."""
    tag: str = ""
    """Of a tuple: its brackets; of a matrix: rows x columns; of words: them; of a scalar: its unit; of a number in another base:
    digits and base; of a time (a ratio, as it is read): what stands behind it."""


_THOUSANDS = re.compile(
    r"(?P<whole>[(\[{]\s*[-+]?\s*[1-9]\d{0,2}(?:,\d{3})+[^,()\[\]{}]*[)\]}])|(?<![\d,.])[1-9]\d{0,2}(?:,\d{3})+(?!\d|,\S)"
)
"""`24,000`; all that stands in brackets, `(24,000)` and `(6,235°)`, is two members."""
POINT = re.compile(r"^[A-Z]\s*(?=\()")
"""The name of a point, `P(1, 2)`; of a function too."""
_BUILDER = re.compile(
    r"\\\{\s*[a-zA-Z]\s*(?:\\in\s*(?:\\mathbb\s*(?:\{\s*R\s*\}|R)|R|ℝ)\s*)?(?:\||\\mid(?![a-z])|\\vert(?![a-z])|:)(.+)\\\}"
)
"""`\\{x \\in \\mathbb{R} \\mid x > 2\\}`, which says no more than `x > 2`."""
_OR, _AND = re.compile(r",?\s*\bor\b\s*"), re.compile(r",?\s*\band\b\s*")
_SUBJECT = re.compile(r"[a-zA-Z](\([a-z]\))?")
_IN = re.compile(r"^[a-zA-Z]\s*(?:\\in\b|∈)\s*")
_MATRIX = re.compile(r"[(\[]?\s*\\begin\{([pbvB]?matrix|array)\}(?:\{[lcr|]*\})?(.*)\\end\{\1\}\s*[)\]]?", re.DOTALL)
_SEPARATOR = re.compile(r"\s*(?:,\s*(?:and|or)\b|,|;|\band\b|\bor\b)\s*")
_RELATION = re.compile(r"(\\leq?(?![a-z])|\\geq?(?![a-z])|\\lt(?![a-z])|\\gt(?![a-z])|<=|>=|[<>≤≥])")
_UNIT = re.compile(
    r"(?P<value>.*?[\d})!a-zA-Zπ])\s*(?P<unit>(?<![\\a-zA-Z])[a-zA-Z]{2,}\.?(?:[ /]+[a-zA-Z]+)*)\s*(?:\^\s*\{?(?P<power>[23])\}?)?"
)
_WORDS = re.compile(r"\(?[a-zA-Z][a-zA-Z\d'. -]*\)?")
_LONG_WORD = re.compile(r"[a-zA-Z]{3,}|[a-zA-Z]{2,} |\b(?:no|on|up)\b", re.IGNORECASE)
_FIGURE = re.compile(r"\\(?:triangle|angle|overline)\s*\{?\s*([A-Z]{2,4})\s*\}?")
_BASED = re.compile(r"-?\s*([0-9A-F ]+?)\s*_\s*\{?(\d+)\}?")
_REALS = frozenset({r"\mathbb{R}", r"\mathbb R", "R", "all real numbers", "all reals", "ℝ"})


@lru_cache(maxsize=4096)
def form(text: str) -> Form | None:
    """The form of a plain text; None if it is none that is known."""
    if not text or len(text) > LONGEST or depth(text) > DEEPEST:
        return None
    exact_side, about, approximation = text.partition(r"\approx")
    text = _IN.sub("", (exact_side.strip() or approximation) if about else text)
    text = text if text.count("$") == 1 else text.replace("$", "")  # one is a currency, two are maths
    text = _FIGURE.sub(r"T_{\1}", text).strip()
    try:
        return _form(text)
    except Unreadable:
        return None


def readings(text: str) -> list[Form]:
    """The forms of a plain text: as it stands, and with the commas of thousands taken out."""
    joined = _THOUSANDS.sub(lambda found: found[0] if found["whole"] else found[0].replace(",", ""), text)
    return [read for read in map(form, dict.fromkeys((text, joined))) if read is not None]


def _form(text: str) -> Form:
    if not text:
        raise Unreadable("nothing")
    if text in _REALS and text != "R":
        return Form("tuple", (read_scalar(r"-\infty"), read_scalar(r"\infty")), tag="()")
    matrix = _MATRIX.fullmatch(text)
    if matrix:
        return _matrix(matrix[2])
    builder = _BUILDER.fullmatch(text)
    if builder and _RELATION.search(builder[1]):
        return _form(builder[1].strip())
    for word, join in ((_OR, _union), (_AND, _intersection)):
        parts = _split(text, word)
        if len(parts) > 1 and all(map(_RELATION.search, parts)):
            return join([_form(part) for part in parts], text) if len(_subjects(text)) == 1 else _relation_as_written(text)
    for kind, parts in (("union", _split(text, re.compile(r"\\cup\b|∪"))), ("list", _split(text, _SEPARATOR))):
        if len(parts) > 1:
            return Form(kind, _flat([_form(part) for part in parts]))  # type: ignore[arg-type]
    if text.startswith(r"\{") and text.endswith(r"\}"):
        inside = text[2:-2].strip()
        return Form("list", _flat([_form(part) for part in _split(inside, _SEPARATOR)])) if inside else Form("list")
    if text in (r"\emptyset", r"\varnothing", "∅"):
        return Form("list")
    if text[0] in "([" and text[-1] in ")]" and _closes_last(text):
        parts = _split(text[1:-1], re.compile(","))
        if len(parts) > 1:
            return Form("tuple", tuple(_form(part) for part in parts), tag=text[0] + text[-1])
    return _relation(text)


def _relation(text: str) -> Form:
    sides = _RELATION.split(text)
    if len(sides) > 1:
        return _inequality(sides) or _relation_as_written(text)
    ratio = re.fullmatch(r"(\d+(?:(?:\s*:\s*| to )\d+)+)\s*([a-zA-Z. ]*)", text)
    if ratio:
        return Form("ratio", tuple(map(read_scalar, re.split(":| to ", ratio[1]))), tag=ratio[2].lower().replace(".", ""))
    hour = re.fullmatch(r"(\d{1,2})\s*([ap])\.?m\.?", text, re.IGNORECASE)
    if hour:
        return Form("ratio", (read_scalar(hour[1]), read_scalar("00")), tag=f"{hour[2].lower()}m")
    based = _BASED.fullmatch(text)
    if based:
        return Form("based", tag=f"{'-' * text.startswith('-')}{based[1].replace(' ', '').lstrip('0') or '0'}_{based[2]}")
    left, equals, right = text.rpartition("=")
    if equals:
        left = left.rpartition("=")[2]
        return Form("equation", (read_scalar(left.strip()), _form(right.strip())))
    if r"\pm" in text or "±" in text:
        text = text.replace("±", r"\pm ")
        pair = (text.replace(r"\pm", "+").replace(r"\mp", "-"), text.replace(r"\pm", "-").replace(r"\mp", "+"))
        return Form("list", tuple(map(read_scalar, pair)))
    if _WORDS.fullmatch(text) and _LONG_WORD.search(text):
        try:
            return read_scalar(text)  # `x + y` is none of these, but `pi` and `sin x` are
        except Unreadable:
            return Form("words", tag=" ".join(text.strip("()").lower().split()))
    return read_scalar(text)


def _inequality(sides: Sequence[str]) -> Form | None:
    """`x < 3` and `2 \\le f(x) < 3` as intervals; None if it is a relation of another kind."""
    signs = [{"\\l": "<", "\\g": ">", "≤": "<", "≥": ">"}.get(sign[:2], sign[0]) for sign in sides[1::2]]
    closed = [sign not in ("<", ">", r"\lt", r"\gt") for sign in sides[1::2]]
    terms = [side.strip() for side in sides[::2]]
    place = next((i for i, term in enumerate(terms) if _SUBJECT.fullmatch(term)), None)
    if place is None or len(terms) > 3 or len(set(signs)) > 1 or (len(terms) == 3 and place != 1):
        return None
    low, high = (read_scalar(r"-\infty"), False), (read_scalar(r"\infty"), False)
    for index, term in enumerate(terms):
        if index != place:
            sign, is_closed = signs[min(index, place)], closed[min(index, place)]
            if (sign == "<") == (index < place):
                low = (read_scalar(term), is_closed)
            else:
                high = (read_scalar(term), is_closed)
    return Form("tuple", (low[0], high[0]), tag="(["[low[1]] + ")]"[high[1]])


def _subjects(text: str) -> set[str | None]:
    """What the inequalities joined by `or` and `and` are about: `x` of `x < 2 or 3 < x`; None for one that is about no variable."""
    sides = [re.split(_RELATION, part) for part in re.split(r",?\s*\b(?:or|and)\b", text)]
    return {next((term.strip() for term in terms[::2] if _SUBJECT.fullmatch(term.strip())), None) for terms in sides}


def _union(intervals: Sequence[Form], text: str) -> Form:
    """`x < 2 or x > 3`."""
    return Form("union", tuple(intervals)) if all(one.kind == "tuple" for one in intervals) else _relation_as_written(text)


def _intersection(intervals: Sequence[Form], text: str) -> Form:
    """`x > 2 and x < 5`; two intervals of another kind, or more, as they are written."""
    if len(intervals) == 2 and all(one.kind == "tuple" for one in intervals):
        below, above = sorted(intervals, key=lambda one: one.items[1].tree == ("infty",))
        if above.items[1].tree == ("infty",) and below.items[0].tree == ("negative", ("infty",)):
            return Form("tuple", (above.items[0], below.items[1]), tag=above.tag[0] + below.tag[1])
    return _relation_as_written(text)


def _relation_as_written(text: str) -> Form:
    return Form("relation", tag="".join(text.split()))


def read_scalar(text: str) -> Form:
    """One number or expression, with its unit; raises Unreadable."""
    found = _UNIT.fullmatch(text)
    unit = unit_name(found["unit"].replace(".", "")) if found else None
    if found and unit and re.fullmatch(r"[a-zA-Z]{2,}", found["value"]):
        unit = None  # `no solution` is no product of n and o
    if found and unit in MEASURES and re.search(r"\d", found["value"]):
        return Form("scalar", tree=read(found["value"]), tag=unit + (found["power"] or ""))  # 18 cm^2, which reads as 18 c m^2 too
    try:
        tree = read(text)
        is_angle = text.endswith("°") and tree == read(text[:-1])  # inside a function the sign has its meaning already
        return Form("scalar", tree=tree, tag="degree" if is_angle else "")
    except Unreadable:
        number = exact(text)
        if number is not None and not number.base:
            fraction = ("fraction", ("number", str(abs(number.value.numerator))), ("number", str(number.value.denominator)))
            return Form("scalar", tree=("negative", fraction) if number.value < 0 else fraction, tag=number.unit)
        if found is None or unit is None:
            raise
        return Form("scalar", tree=read(found["value"]), tag=unit + (found["power"] or ""))


def _matrix(inside: str) -> Form:
    rows = [row.split("&") for row in re.split(r"\\\\(?:\[[^\]]*\])?", inside.strip().removesuffix(r"\\"))]
    if len({len(row) for row in rows}) > 1:
        raise Unreadable("rows of different lengths")
    entries = tuple(read_scalar(entry.strip()) for row in rows for entry in row)
    return Form("matrix", entries, tag=f"{len(rows)}x{len(rows[0])}")


def _flat(forms: Sequence[Form]) -> tuple[Form, ...]:
    """Members of a list that are lists themselves (by plus-minus) count as theirs."""
    return tuple(inner for one in forms for inner in (one.items if one.kind == "list" else (one,)))


def _split(text: str, separator: re.Pattern[str]) -> list[str]:
    """The text cut at a separator that stands outside all brackets."""
    parts, depth, start, place = [], 0, 0, 0
    while place < len(text):
        found = separator.match(text, place) if depth == 0 else None
        if found and found.end() > place:
            parts.append(text[start : found.start()].strip())
            start = place = found.end()
            continue
        depth += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(text[place], 0)
        place += 1
    parts.append(text[start:].strip())
    if len(parts) > 1 and not all(parts):
        raise Unreadable("an empty member")
    return parts


def _closes_last(text: str) -> bool:
    depth = 0
    for place, character in enumerate(text):
        depth += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(character, 0)
        if depth == 0:
            return place == len(text) - 1
    return False
