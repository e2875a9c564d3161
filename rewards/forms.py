"""The shape of an answer: a scalar, a list, a tuple or interval, a union, a matrix, an equation, or words.

Two answers of one shape are compared part by part; scalars by value (`rewards.scalars`). A list is a set: its order does not count,
and `1 \\pm \\sqrt 2` is a list of two. A tuple's order and an interval's brackets count. Answers of different shapes are different,
unless one is a common way to write the other; then that is unknown. What cannot be read at all is unknown too.
"""

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from rewards.latex import Tree, Unreadable, read, variables
from rewards.numbers import MEASURES, Verdict, exact, plain, unit_name
from rewards.scalars import compare_equations, compare_scalars, solution

LONGEST = 500
"""Characters; a longer text is not read."""


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


def compare_forms(answer: str, gold: str) -> Verdict:
    """The verdict on two texts, by what they say."""
    try:
        one, other = form(plain(answer)), form(plain(gold))
        return Verdict.UNKNOWN if one is None or other is None else _compare(one, other)
    except RecursionError:  # 400 minus signs
        return Verdict.UNKNOWN


# --- reading ----------------------------------------------------------------------------------------------------------

_IN = re.compile(r"^[a-zA-Z]\s*(?:\\in\b|∈)\s*")
_MATRIX = re.compile(r"[(\[]?\s*\\begin\{([pbvB]?matrix|array)\}(?:\{[lcr|]*\})?(.*)\\end\{\1\}\s*[)\]]?", re.DOTALL)
_SEPARATOR = re.compile(r"\s*(?:,\s*(?:and|or)\b|,|;|\band\b|\bor\b)\s*")
_RELATION = re.compile(r"(\\leq?(?![a-z])|\\geq?(?![a-z])|\\lt(?![a-z])|\\gt(?![a-z])|<=|>=|[<>≤≥])")
_UNIT = re.compile(
    r"(?P<value>.*?[\d})!a-zA-Z])\s*(?P<unit>(?<![\\a-zA-Z])[a-zA-Z]{2,}\.?(?:[ /]+[a-zA-Z]+)*)\s*(?:\^\s*\{?(?P<power>[23])\}?)?"
)
_WORDS = re.compile(r"\(?[a-zA-Z][a-zA-Z\d'. -]*\)?")
_LONG_WORD = re.compile(r"[a-zA-Z]{3,}|[a-zA-Z]{2,} |\b(?:no|on|up)\b", re.IGNORECASE)
_FIGURE = re.compile(r"\\(?:triangle|angle|overline)\s*\{?\s*([A-Z]{2,4})\s*\}?")
_BASED = re.compile(r"-?\s*([0-9A-F ]+?)\s*_\s*\{?(\d+)\}?")
_REALS = frozenset({r"\mathbb{R}", r"\mathbb R", "R", "all real numbers", "all reals", "ℝ"})


@lru_cache(maxsize=4096)
def form(text: str) -> Form | None:
    """The form of a plain text; None if it is none that is known."""
    if not text or len(text) > LONGEST:
        return None
    exact_side, about, approximation = text.partition(r"\approx")
    text = _IN.sub("", (exact_side.strip() or approximation) if about else text)
    text = text if text.count("$") == 1 else text.replace("$", "")  # one is a currency, two are maths
    text = _FIGURE.sub(r"T_{\1}", text).strip()
    try:
        return _form(text)
    except Unreadable:
        return None


def _form(text: str) -> Form:
    if not text:
        raise Unreadable("nothing")
    if text in _REALS and text != "R":
        return Form("tuple", (_scalar(r"-\infty"), _scalar(r"\infty")), tag="()")
    matrix = _MATRIX.fullmatch(text)
    if matrix:
        return _matrix(matrix[2])
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
        return _inequality(sides) or Form("relation", tag="".join(text.split()))
    ratio = re.fullmatch(r"(\d+(?:(?:\s*:\s*| to )\d+)+)\s*([a-zA-Z. ]*)", text)
    if ratio:
        return Form("ratio", tuple(map(_scalar, re.split(":| to ", ratio[1]))), tag=ratio[2].lower().replace(".", ""))
    hour = re.fullmatch(r"(\d{1,2})\s*([ap])\.?m\.?", text, re.IGNORECASE)
    if hour:
        return Form("ratio", (_scalar(hour[1]), _scalar("00")), tag=f"{hour[2].lower()}m")
    based = _BASED.fullmatch(text)
    if based:
        return Form("based", tag=f"{'-' * text.startswith('-')}{based[1].replace(' ', '').lstrip('0') or '0'}_{based[2]}")
    left, equals, right = text.rpartition("=")
    if equals:
        left = left.rpartition("=")[2]
        return Form("equation", (_scalar(left.strip()), _form(right.strip())))
    if r"\pm" in text or "±" in text:
        text = text.replace("±", r"\pm ")
        pair = (text.replace(r"\pm", "+").replace(r"\mp", "-"), text.replace(r"\pm", "-").replace(r"\mp", "+"))
        return Form("list", tuple(map(_scalar, pair)))
    if _WORDS.fullmatch(text) and _LONG_WORD.search(text):
        try:
            return _scalar(text)  # `x + y` is none of these, but `pi` and `sin x` are
        except Unreadable:
            return Form("words", tag=" ".join(text.strip("()").lower().split()))
    return _scalar(text)


def _inequality(sides: Sequence[str]) -> Form | None:
    """`x < 3` and `2 \\le f(x) < 3` as intervals; None if it is a relation of another kind."""
    signs = [{"\\l": "<", "\\g": ">", "≤": "<", "≥": ">"}.get(sign[:2], sign[0]) for sign in sides[1::2]]
    closed = [sign not in ("<", ">", r"\lt", r"\gt") for sign in sides[1::2]]
    terms = [side.strip() for side in sides[::2]]
    place = next((i for i, term in enumerate(terms) if re.fullmatch(r"[a-zA-Z](\([a-z]\))?", term)), None)
    if place is None or len(terms) > 3 or len(set(signs)) > 1 or (len(terms) == 3 and place != 1):
        return None
    low, high = (_scalar(r"-\infty"), False), (_scalar(r"\infty"), False)
    for index, term in enumerate(terms):
        if index != place:
            sign, is_closed = signs[min(index, place)], closed[min(index, place)]
            if (sign == "<") == (index < place):
                low = (_scalar(term), is_closed)
            else:
                high = (_scalar(term), is_closed)
    return Form("tuple", (low[0], high[0]), tag="(["[low[1]] + ")]"[high[1]])


def _scalar(text: str) -> Form:
    found = _UNIT.fullmatch(text)
    unit = unit_name(found["unit"].replace(".", "")) if found else None
    if found and unit and re.fullmatch(r"[a-zA-Z]{2,}", found["value"]):
        unit = None  # `no solution` is no product of n and o
    if found and unit in MEASURES and re.search(r"\d", found["value"]):
        return Form("scalar", tree=read(found["value"]), tag=unit + (found["power"] or ""))  # 18 cm^2, which reads as 18 c m^2 too
    try:
        return Form("scalar", tree=read(text))
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
    entries = tuple(_scalar(entry.strip()) for row in rows for entry in row)
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


# --- comparing --------------------------------------------------------------------------------------------------------


def _compare(answer: Form, gold: Form) -> Verdict:
    if answer.kind == gold.kind == "equation":
        return _compare_equations(answer, gold)
    if "equation" in (answer.kind, gold.kind):
        return _compare_with_equation(answer, gold)
    if answer.kind != gold.kind:
        return _compare_kinds(answer, gold)
    if answer.kind == "scalar":
        return _compare_units(answer, gold)
    if answer.kind == "words":
        return _compare_words(answer.tag, gold.tag)
    if answer.kind in ("based", "relation"):
        return Verdict.EQUAL if answer.tag == gold.tag else Verdict.DIFFERENT if answer.kind == "based" else Verdict.UNKNOWN
    if answer.kind == "ratio":
        return _compare_ratios(answer, gold)
    if answer.kind in ("list", "union"):
        same = _compare_sets(answer.items, gold.items)
        # 1, 1, 2 and 1, 2: whether a root counts twice only the question can tell
        return Verdict.UNKNOWN if same is Verdict.EQUAL and len(answer.items) != len(gold.items) else same
    if len(answer.items) != len(gold.items):
        return Verdict.DIFFERENT
    if answer.tag != gold.tag:
        return Verdict.DIFFERENT
    return _all(_compare(one, other) for one, other in zip(answer.items, gold.items, strict=True))


def _all(verdicts: object) -> Verdict:
    seen = list(verdicts)  # type: ignore[call-overload]
    if Verdict.DIFFERENT in seen:
        return Verdict.DIFFERENT
    return Verdict.UNKNOWN if Verdict.UNKNOWN in seen else Verdict.EQUAL


def _compare_sets(answer: Sequence[Form], gold: Sequence[Form]) -> Verdict:
    """Every member of each side must have an equal on the other; one that certainly has none decides."""
    if not answer or not gold:
        return Verdict.DIFFERENT if answer or gold else Verdict.EQUAL
    left = [[_compare(one, other) for other in gold] for one in answer]
    verdicts = []
    for row in [*left, *map(list, zip(*left, strict=True))]:
        verdicts.append(Verdict.EQUAL if Verdict.EQUAL in row else Verdict.UNKNOWN if Verdict.UNKNOWN in row else Verdict.DIFFERENT)
    return _all(verdicts)


def _compare_units(answer: Form, gold: Form) -> Verdict:
    verdict = compare_scalars(answer.tree, gold.tree)
    if answer.tree[0] == gold.tree[0] == "variable" and answer.tree[1].lower() == gold.tree[1].lower():
        return verdict if answer.tree == gold.tree else Verdict.UNKNOWN  # a choice may be meant, or a side and its point
    if verdict is not Verdict.UNKNOWN and answer.tag and gold.tag and answer.tag != gold.tag:
        # 6 inches are not 6 cm, and 18 apples not 19 fruits; 60 minutes and 1 hour, 18 apples and 18 fruits cannot be told
        measured = {answer.tag.rstrip("23"), gold.tag.rstrip("23")} <= MEASURES
        return Verdict.DIFFERENT if (verdict is Verdict.EQUAL) == measured else Verdict.UNKNOWN
    return verdict


def _compare_equations(answer: Form, gold: Form) -> Verdict:
    (left, right), (gold_left, gold_right) = answer.items, gold.items
    if right.kind != "scalar" or gold_right.kind != "scalar":
        return _compare(right, gold_right)
    names = [_name(left), _name(gold_left)]
    if None not in names and names[0] != names[1] and not variables(right.tree) | variables(gold_right.tree):
        return Verdict.UNKNOWN if _compare(right, gold_right) is Verdict.EQUAL else Verdict.DIFFERENT
    same = compare_equations((left.tree, right.tree), (gold_left.tree, gold_right.tree))
    if same is Verdict.EQUAL and _is_solved(gold) and not _is_solved(answer):
        return Verdict.UNKNOWN  # `2x = 10` may be the question itself
    return same


def _is_solved(equation: Form) -> bool:
    """Whether it says what one variable is: `x = 5`, or `5 = x`."""
    left, right = (side.tree for side in equation.items)
    return (left[0] == "variable" and not variables(right)) or (right[0] == "variable" and not variables(left))


def _compare_with_equation(answer: Form, gold: Form) -> Verdict:
    equation, other = (answer, gold) if answer.kind == "equation" else (gold, answer)
    left, right = equation.items
    if _name(left) is not None or not variables(left.tree):
        verdict = _compare(right, other)  # `x = 5` says 5, and so does `2 + 3 = 5`
        solved = not right.tree or left.tree[0] != "variable" or left.tree[1] not in variables(right.tree)
        return verdict if solved else Verdict.UNKNOWN
    names = variables(left.tree) | (variables(right.tree) if right.tree else set())
    if other.kind in ("list", "relation"):
        return Verdict.DIFFERENT if len(names) > 1 and other.kind == "list" else Verdict.UNKNOWN
    if other.kind != "scalar" or right.kind != "scalar":
        return Verdict.DIFFERENT
    if variables(other.tree):
        return Verdict.UNKNOWN if len(names - variables(other.tree)) == 1 else Verdict.DIFFERENT
    # `2x = 18` does not say 18, and if 9 solves it, whether it says 9 only the question can tell
    solves = len(names) == 1 and solution(left.tree, right.tree, names.pop(), other.tree)
    return Verdict.UNKNOWN if solves else Verdict.DIFFERENT


def _name(form: Form) -> str | None:
    """The variable that a scalar is, or `f` where it is f(x)."""
    tree = form.tree
    if tree[0] == "*" and tree[1][0] == tree[2][0] == "variable" and tree[1][1] in "fghpqPQ":
        return tree[1][1]
    return tree[1] if tree[0] == "variable" else None


def _compare_kinds(answer: Form, gold: Form) -> Verdict:
    kinds = {answer.kind, gold.kind}
    if kinds <= {"list", "tuple", "matrix"} and len(answer.items) == len(gold.items):
        # (1, 2), 1, 2 and a column of them; or an interval and its ends, which only the question can tell
        same = _all(_compare(one, other) for one, other in zip(answer.items, gold.items, strict=True))
        return Verdict.DIFFERENT if same is Verdict.DIFFERENT else Verdict.UNKNOWN
    one, other = (answer, gold) if answer.kind == "scalar" else (gold, answer)
    if one.kind != "scalar":
        if kinds == {"list", "words"}:  # `no real solutions` and the empty set
            words, members = (one, other) if one.kind == "words" else (other, one)
            return Verdict.UNKNOWN if not members.items and _NOTHING & set(words.tag.split()) else Verdict.DIFFERENT
        return Verdict.UNKNOWN if "relation" in kinds and kinds & {"tuple", "union"} else Verdict.DIFFERENT
    return Verdict.UNKNOWN if _hints_at(other, one) else Verdict.DIFFERENT


def _hints_at(other: Form, scalar: Form) -> bool:
    """Whether something that is no scalar may mean this one: 3:4 and 3/4, {5} and 5, `October 30` and 30, 11_2 and 3."""
    if other.kind == "list" and len(other.items) == 1:
        return _compare(other.items[0], scalar) is not Verdict.DIFFERENT  # {18} and 18
    if other.kind == "ratio":
        if len(other.items) != 2 or not int(other.items[1].tree[1]):
            return False
        return compare_scalars(_quotient(other), scalar.tree) is not Verdict.DIFFERENT
    if other.kind == "words":
        numbers = [_scalar(number) for number in re.findall(r"\d+", other.tag)]
        return any(_compare(number, scalar) is not Verdict.DIFFERENT for number in numbers)
    if other.kind == "based":
        digits, _, base = other.tag.partition("_")
        if not 2 <= int(base) <= 36 or any(int(digit, 36) >= int(base) for digit in digits.lstrip("-")):
            return False
        return _compare(_scalar(str(int(digits, int(base)))), scalar) is not Verdict.DIFFERENT
    return False


def _quotient(ratio: Form) -> Tree:
    return ("/", ratio.items[0].tree, ratio.items[1].tree)


def _compare_ratios(answer: Form, gold: Form) -> Verdict:
    if len(answer.items) != len(gold.items):
        return Verdict.DIFFERENT
    same = _all(_compare(one, other) for one, other in zip(answer.items, gold.items, strict=True))
    if same is Verdict.EQUAL:
        return Verdict.EQUAL if answer.tag == gold.tag or not (answer.tag and gold.tag) else Verdict.DIFFERENT
    proportional = len(gold.items) == 2 and compare_scalars(_quotient(answer), _quotient(gold)) is not Verdict.DIFFERENT
    return Verdict.UNKNOWN if proportional else Verdict.DIFFERENT


_SYNONYMS = (
    frozenset({"yes", "true", "correct"}),
    frozenset({"no", "false", "none", "neither", "incorrect", "never"}),
    frozenset({"undefined", "dne", "does not exist", "not defined"}),
)
_NOTHING = frozenset({"no", "none", "nothing", "empty", "nobody"})


def _compare_words(answer: str, gold: str) -> Verdict:
    if answer == gold:
        return Verdict.EQUAL
    one, other = set(answer.split()), set(gold.split())
    synonyms = any(answer in group and gold in group for group in _SYNONYMS)
    alike = difflib.SequenceMatcher(None, answer, gold).ratio() > 0.6 or sorted(answer) == sorted(gold)
    return Verdict.UNKNOWN if one & other or synonyms or alike else Verdict.DIFFERENT
