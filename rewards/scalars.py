"""Are two scalar expressions the same? Tested by value, at 40 digits, at fixed points that no identity was made for.

Without variables one value decides. With variables (a polynomial, say) both sides are evaluated at several points, positive,
negative and mixed: equal at all of them is equal, different at the positive ones is different. Equal only where the variables are
positive (sqrt(x^2) and x) is unknown. A difference that vanishes with the precision is rounding, so 0 and cos(pi/2) are equal,
while 1/2004! and 1/2006! are not.
"""

import hashlib
from collections.abc import Iterator

import mpmath

from rewards.latex import Tree, Unreadable, value, variables
from rewards.numbers import Verdict

DIGITS = 40
SAME = mpmath.mpf(10) ** -20
"""Relative difference below which two values of 40 digits are one."""


def compare_scalars(answer: Tree, gold: Tree) -> Verdict:
    """The verdict on two trees."""
    if answer == gold:
        return Verdict.EQUAL
    verdicts: list[bool | None] = []
    for point in _points(variables(answer) | variables(gold)):
        try:
            verdicts.append(_same_at(answer, gold, point))
        except Unreadable:
            verdicts.append(None)
    return _decide(verdicts)


def compare_equations(answer: tuple[Tree, Tree], gold: tuple[Tree, Tree]) -> Verdict:
    """Two equations are the same if left minus right is the same up to a constant factor, and not 0 everywhere."""
    names = set().union(*(variables(side) for side in (*answer, *gold)))
    verdicts: list[bool | None] = []
    first = None
    empty = [True, True]  # `x = x` says nothing: whatever the points, left minus right is 0
    for point in _points(names) if names else ():
        try:
            with mpmath.workdps(DIGITS):
                sides = [(value(left, point), value(right, point)) for left, right in (answer, gold)]
                empty = [was and _near(*pair) for was, pair in zip(empty, sides, strict=True)]
                left, right = (pair[0] - pair[1] for pair in sides)
                if first is None:
                    first = (left, right)
                    continue
                verdicts.append(_near(left * first[1], right * first[0]))
        except Unreadable:
            verdicts.append(None)
    if any(empty) and verdicts and None not in verdicts:
        return Verdict.EQUAL if all(empty) else Verdict.DIFFERENT
    return _decide(verdicts)


_ARITHMETIC = frozenset({"number", "+", "-", "*", "/", "fraction", "negative"})


def is_unfinished(tree: Tree) -> bool:
    """Whether a number is written with a sum or product of plain ones anywhere in it, `57+75` and `|57+75|`, or with variables,
    `18x/x`; `2^{10}-1` and `3\\times10^8` are finished."""
    return bool(variables(tree)) or _holds_arithmetic(tree)


def _holds_arithmetic(tree: Tree) -> bool:
    """Whether there is a sum or product of plain arithmetic of numbers in it."""
    parts = [part for part in tree[1:] if isinstance(part, tuple)]
    is_plain = tree[0] in ("+", "-", "*") and all(_ARITHMETIC.issuperset(_kinds(part)) for part in parts)
    return is_plain or any(map(_holds_arithmetic, parts))


def _kinds(tree: Tree) -> Iterator[str]:
    yield tree[0]
    for part in tree[1:]:
        if isinstance(part, tuple):
            yield from _kinds(part)


def solution(left: Tree, right: Tree, name: str, candidate: Tree) -> bool:
    """Whether a constant solves an equation in one variable, or may, where that cannot be computed."""
    try:
        with mpmath.workdps(DIGITS):
            point = {name: value(candidate, {})}
            return _near(value(left, point), value(right, point))
    except Unreadable:
        return True


def _decide(verdicts: list[bool | None]) -> Verdict:
    if not verdicts or None in verdicts:
        return Verdict.UNKNOWN
    if all(verdicts):
        return Verdict.EQUAL
    return Verdict.UNKNOWN if verdicts[0] else Verdict.DIFFERENT


def _same_at(answer: Tree, gold: Tree, point: dict[str, mpmath.mpf]) -> bool:
    sizes = []
    for digits in (DIGITS, 2 * DIGITS):
        with mpmath.workdps(digits):
            left, right = value(answer, point), value(gold, point)
            if _near(left, right):
                return True
            if not (mpmath.isfinite(left) and mpmath.isfinite(right)):
                return False
            sizes.append(max(abs(left), abs(right)))
            if sizes[0] > SAME:
                return False
    return bool(sizes[1] < sizes[0] * SAME)  # both are the rounding of 0


def _near(left: mpmath.mpf, right: mpmath.mpf) -> bool:
    if left == right:
        return True
    return bool(mpmath.isfinite(left) and mpmath.isfinite(right) and abs(left - right) <= SAME * max(abs(left), abs(right)))


def _points(names: set[str]) -> Iterator[dict[str, mpmath.mpf]]:
    """One point without variables, four with some: two positive, one negative, one mixed."""
    for number, sign in enumerate((1, 1, -1, 0) if names else (1,)):
        digests = {name: hashlib.sha256(f"{number} {name}".encode()).digest() for name in names}
        yield {
            name: (sign or (1 if digest[0] % 2 else -1)) * (mpmath.mpf(int.from_bytes(digest[1:8], "big")) / 2**55 + 0.5)
            for name, digest in digests.items()
        }
