"""Comparison of two expressions by math-verify, for what the exact comparison of plain numbers does not know.

math-verify is trusted only where it was not seen to be wrong: equations, factorials, subscripts, units and other words stay
unknown, and so do mixed numbers, powers of ten written with e, and towers of powers, whose value it would try to write out. It
needs the main thread for its time limit; it runs in a reward's worker process, which is the only place that imports it, and only
when there is something to ask.
"""

import re

from rewards.numbers import Verdict, depth, plain

LONGEST = 200
"""Characters; longer texts are no expression of an answer."""
DEEPEST = 10
"""Brackets within brackets; of 20 math-verify makes a second's work, of 60 more than its limit."""
LIMIT_S = 2
"""Seconds for each of math-verify's three steps; it counts whole ones."""

_UNTRUSTED = re.compile(
    r"[=<>≤≥≈!_%]|\\(?:n?eq|leq?|geq?|approx|equiv|sim|pmod|binom)\b"
    r"|\^.*\^|\*\*.*\*\*|\^\{?-?\d{4,}|\d{40,}|\d\s+\d|\d[eE][-+]?\d"
)
_COMMAND = re.compile(r"\\[a-zA-Z]+")
_WORD = re.compile(r"[^\W\d_]{2,}")
_FUNCTIONS = frozenset("pi sqrt sin cos tan log ln exp infty".split())


def compare_expressions(answer: str, gold: str) -> Verdict:
    """Math-verify's verdict, or unknown where it is not to be trusted or cannot read one side."""
    answer, gold = plain(answer), plain(gold)
    if not (_is_trusted(answer) and _is_trusted(gold)):
        return Verdict.UNKNOWN
    from math_verify import parse, verify  # a second of CPU, for the few that need it
    from math_verify.errors import TimeoutException

    try:
        parsed = [parse(rf"\boxed{{{text}}}", parsing_timeout=LIMIT_S, raise_on_error=True) for text in (gold, answer)]
        if not parsed[0]:
            return Verdict.UNKNOWN
        same = verify(*parsed, timeout_seconds=LIMIT_S, raise_on_error=True)
    except (Exception, TimeoutException):  # noqa: BLE001 - sympy raises nearly anything on text that is no mathematics
        return Verdict.UNKNOWN
    return Verdict.EQUAL if same else Verdict.DIFFERENT


def _is_trusted(text: str) -> bool:
    words = set(_WORD.findall(_COMMAND.sub(" ", text)))
    return 0 < len(text) <= LONGEST and depth(text) <= DEEPEST and not _UNTRUSTED.search(text) and words <= _FUNCTIONS
