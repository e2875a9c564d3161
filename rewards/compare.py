"""Do two answers that are no plain numbers say the same? By their shapes (`rewards.forms`) and values (`rewards.scalars`).

Two answers of one shape are compared part by part; scalars by value. A list is a set: its order does not count, and `1 \\pm \\sqrt 2`
is a list of two. A tuple's order and an interval's brackets count. Answers of different shapes are different, unless one is a common
way to write the other; then that is unknown. What cannot be read at all is unknown too.
"""

import difflib
import re
from collections.abc import Sequence

from rewards.forms import POINT, Form, form, read_scalar, readings
from rewards.latex import Tree, variables
from rewards.numbers import LETTER_UNITS, MEASURES, UNIT_LETTERS, Verdict, plain, plain_pair
from rewards.scalars import compare_equations, compare_scalars, solution


def compare_forms(answer: str, gold: str) -> Verdict:
    """The verdict on two texts, by what they say; where a comma may separate thousands or members, by whichever makes them equal."""
    answer, gold = plain_pair(answer, gold)
    try:
        left, right = readings(answer), readings(gold)
        if any(read.kind == "tuple" for read in left + right):  # a point with its name, where the other has none
            left, right = left or readings(POINT.sub("", answer)), right or readings(POINT.sub("", gold))
        verdicts = {_compare(one, other) for one in left for other in right}
    except RecursionError:  # 400 minus signs
        return Verdict.UNKNOWN
    if Verdict.EQUAL in verdicts:
        return Verdict.EQUAL
    return Verdict.DIFFERENT if verdicts == {Verdict.DIFFERENT} else Verdict.UNKNOWN


def is_ambiguous(answer: str, gold: str) -> bool:
    """Whether only the question can tell, and math-verify would guess: one lists what the other orders, or 10 N is asked to be 10."""
    one, other = form(plain(answer)), form(plain(gold))
    try:
        return one is not None and other is not None and ({one.kind, other.kind} == {"list", "tuple"} or _is_bare_unit(one, other))
    except RecursionError:
        return True


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
        is_sure = len(answer.items) == len(gold.items) and _in_order(answer, gold) and _in_order(gold, answer)
        return Verdict.UNKNOWN if same is Verdict.EQUAL and not is_sure else same
    if len(answer.items) != len(gold.items):
        return Verdict.DIFFERENT
    if answer.tag != gold.tag:
        return Verdict.DIFFERENT
    return _all(_compare(one, other) for one, other in zip(answer.items, gold.items, strict=True))


def _in_order(named: Form, other: Form) -> bool:
    """Whether a list of several variables' values, `x=1, y=2`, gives in the order of their names what a list without names holds."""
    names = [_name(item.items[0]) if item.kind == "equation" else None for item in named.items]
    if None in names or len(set(names)) < 2 or any(item.kind == "equation" for item in other.items):
        return True
    in_order = sorted(zip(names, named.items, strict=True), key=lambda pair: str(pair[0]))
    return all(_compare(item, one) is Verdict.EQUAL for (_, item), one in zip(in_order, other.items, strict=True))


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
    if verdict is Verdict.DIFFERENT and "degree" in (answer.tag, gold.tag) and {answer.tag, gold.tag} <= {"", "degree", "radian"}:
        angles = [("degrees", side.tree) if side.tag == "degree" else side.tree for side in (answer, gold)]
        if any(_holds_pi(side) for side in angles):
            return compare_scalars(*angles)  # 45° and \\pi/4
    if _is_bare_unit(answer, gold):
        return Verdict.UNKNOWN
    if answer.tree[0] == gold.tree[0] == "variable" and answer.tree[1].lower() == gold.tree[1].lower():
        return verdict if answer.tree == gold.tree else Verdict.UNKNOWN  # a choice may be meant, or a side and its point
    tags = {answer.tag, gold.tag} - {""}
    if verdict is Verdict.DIFFERENT and "degree" in tags and "radian" not in tags:
        return verdict  # no angle is an hour
    if verdict is not Verdict.UNKNOWN and len(tags) > 1:
        # 6 inches are not 6 cm, and 18 apples not 19 fruits; 60 minutes and 1 hour, 18 apples and 18 fruits cannot be told
        measured = {answer.tag.rstrip("23"), gold.tag.rstrip("23")} <= MEASURES
        return Verdict.DIFFERENT if (verdict is Verdict.EQUAL) == measured else Verdict.UNKNOWN
    return verdict


def _is_bare_unit(answer: Form, gold: Form) -> bool:
    """Whether a gold without variables is answered by itself times letters that may be a unit, as in `10 N` and `36\\pi m^2`."""
    if answer.kind != "scalar" or gold.kind != "scalar" or variables(gold.tree):
        return False
    if gold.tag.rstrip("23") in LETTER_UNITS:
        return False  # a letter that spells this unit is one by now
    tree = answer.tree[1] if answer.tree[0] == "/" and _is_unit(answer.tree[2]) else answer.tree  # m/s
    return tree[0] == "*" and _is_unit(tree[2]) and compare_scalars(tree[1], gold.tree) is Verdict.EQUAL


def _is_unit(tree: Tree) -> bool:
    letter = tree[1] if tree[0] == "^" and tree[2] in (("number", "2"), ("number", "3")) else tree
    return letter[0] == "variable" and letter[1] in UNIT_LETTERS


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
    if right.kind == "scalar" and right.tree[0] == "variable" and not variables(left.tree):
        left, right = right, left  # `18 = x`
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


def _holds_pi(tree: Tree) -> bool:
    return tree[0] == "pi" or any(_holds_pi(part) for part in tree[1:] if isinstance(part, tuple))


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
    if kinds == {"list", "union"}:  # `x < 2, x > 3`
        same = _compare_sets(answer.items, gold.items)
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
        numbers = [read_scalar(number) for number in re.findall(r"\d+", other.tag)]
        return any(_compare(number, scalar) is not Verdict.DIFFERENT for number in numbers)
    if other.kind == "based":
        digits, _, base = other.tag.partition("_")
        if not 2 <= int(base) <= 36 or any(int(digit, 36) >= int(base) for digit in digits.lstrip("-")):
            return False
        return _compare(read_scalar(str(int(digits, int(base)))), scalar) is not Verdict.DIFFERENT
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
