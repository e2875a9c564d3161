"""Asserts about values and objects of a program: right ones pass, wrong ones do not, and what cannot be judged is unscored."""

import datetime
from collections import deque
from datetime import date, time, timedelta, timezone
from decimal import Decimal
from fractions import Fraction

import pytest

from rewards.code_tests import code_tests, grade, run_test
from rewards.sandbox.judge import Sandbox
from rewards.sandbox.limits import Limits
from rewards.sandbox.values import MAX_ITEMS, NotPlain, decode, encode


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox() as sandbox:
        yield sandbox


CLASSES = """
import functools
from collections import Counter, deque, namedtuple
class P:
    def __init__(self, a): self.a = a
    def __add__(self, other): return P(self.a + getattr(other, "a", other))
    __radd__ = __add__
    def __mul__(self, by): return P(self.a * by)
    def __lt__(self, other): return self.a < other.a
    def __eq__(self, other): return self.a == other.a
    def __abs__(self): return abs(self.a)
    def __repr__(self): return f"P({self.a})"
    def __float__(self): return float(self.a)
class Box:
    made = None
    def __init__(self, *items): self.items, self.next = list(items), None
    def __len__(self): return len(self.items)
    def __iter__(self): return iter(self.items)
    def __getitem__(self, key): return self.items[key]
    def __setitem__(self, key, value): self.items[key] = value
    def __contains__(self, item): return item in self.items
    @classmethod
    def only(cls):
        cls.made = cls() if cls.made is None else cls.made
        return cls.made
class Turns:
    def __init__(self): self.n = 0
    def __iter__(self): return self
    def __next__(self):
        self.n += 1
        return self.n
class Empty(ValueError): pass
Point = namedtuple("Point", "x y")
def endless():
    n = 0
    while True:
        yield n
        n += 1
def breaks():
    yield from range(20)
    raise Empty("no more")
def take(iterator): return list(iterator)
def fails(): raise Empty("no more")
@functools.wraps(fails)
def wrapped():
    "Says nothing."
def nested(depth):
    return [nested(depth - 1)] if depth else []
"""


@pytest.mark.parametrize(
    ("body", "asserts"),
    [
        ("yield from range(n)", "assert list(f(3)) == [0, 1, 2]"),
        ("return range(n)", "assert list(f(3)) == [0, 1, 2] and f(3) == range(3) and 2 in f(3)"),
        ("return iter(range(n))", "assert sum(f(1000)) == 499500"),
        ("return map(str, range(n))", "assert list(f(2)) == ['0', '1']"),
        ("return {n: 1}.keys()", "assert list(f(3)) == [3]"),
        ("from collections import deque\n    return deque(range(n), 9)", "assert list(f(3)) == [0, 1, 2] and f(3).maxlen == 9"),
        ("from fractions import Fraction\n    return Fraction(1, n)", "from fractions import Fraction\nassert f(2) == Fraction(1, 2)"),
        ("from decimal import Decimal\n    return Decimal(n) / 4", "from decimal import Decimal\nassert f(1) == Decimal('0.25')"),
        ("from datetime import date\n    return date(2024, n, 1)", "import datetime\nassert f(2) == datetime.date(2024, 2, 1)"),
        ("return complex(n, 1)", "assert f(2) == 2 + 1j"),
    ],
)
def test_values_of_the_standard_library_are_judged_by_value(sandbox, body, asserts):
    assert run_test(sandbox, f"def f(n):\n    {body}\n", {"asserts": asserts}, Limits()).name == "passed"
    assert run_test(sandbox, f"def g(n):\n    {body}\ndef f(n):\n    return g(n + 1)\n", {"asserts": asserts}, Limits()).name == "wrong"


@pytest.mark.parametrize(
    "asserts",
    [
        "assert len(Box(4)) == 1",
        "assert (P(1) + P(2)).a == 3",
        "assert (P(1) * 3).a == 3 and sum([P(1), P(2)]).a == 3",
        "p = P(1)\np += P(4)\nassert p.a == 5",
        "assert str(P(1)) == 'P(1)' and repr(P(2)) == 'P(2)' and f'{P(3)}' == 'P(3)' and float(P(2)) == 2.0 and abs(P(-2)) == 2",
        "b = Box(4, 5, 6)\nassert b[0] == 4 and b[1:] == [5, 6] and 5 in b and 7 not in b and list(b) == [4, 5, 6]",
        "b = Box(4, 5)\nb[0] = 1\nassert list(b) == [1, 5]",
        "a, b = Box(), Box()\na.next = b\nassert a.next is b and a.next is not a and b.next is None",
        "assert Box.only() is Box.only() and Box() is not Box()",
        "assert isinstance(P(1), P) and not isinstance(P(1), (int, Box)) and not isinstance(3, P)",
        "assert type(P(1)) is P and type(P(1)).__name__ == 'P' and P(1).__class__.__name__ == 'P' and type(3) is int",
        "g = endless()\nassert [next(g) for _ in range(30)] == list(range(30)) and next(g) == 30",
        "from itertools import islice\nassert list(islice(endless(), 2000)) == list(range(2000))",
        "t = Turns()\nassert [next(t) for _ in range(30)][-1] == 30 and t.n == 30",
        "assert take(iter([1, 2])) == [1, 2] and take(range(2)) == [0, 1]",
        "got = []\ntry:\n    got.extend(x for x in breaks())\nexcept ValueError as error:\n    got = str(error)\nassert got == 'no more'",
        "got, g = [], breaks()\ntry:\n    while 1:\n        got.append(next(g))\nexcept ValueError:\n    pass\nassert len(got) == 20",
        "try:\n    fails()\nexcept ValueError as error:\n    assert type(error).__name__ == 'Empty' and str(error) == 'no more'",
        "assert wrapped.__name__ == 'fails' and P.__doc__ is None",
    ],
)  # fmt: skip
def test_objects_of_a_program_answer_for_themselves(sandbox, asserts):
    verdict = run_test(sandbox, CLASSES, {"asserts": asserts}, Limits())
    assert verdict.name == "passed", verdict


LIES = """
class Yes:
    def __contains__(self, item): return True
    def __getattr__(self, name): return lambda *args: True
class Root:
    def __init__(self, x): self.x = x
    def __pow__(self, n): return self
    def __mul__(self, other): return self
    def __radd__(self, other): return self
    def __float__(self): return float(self.x)
    def __abs__(self): return 0
    def __round__(self, n=0): return self.x
    def __lt__(self, other): return True
    __le__ = __gt__ = __ge__ = __lt__
class math:
    isclose = staticmethod(lambda *args, **named: True)
class Broken:
    def __str__(self): return self.missing
def yes(x): return Yes()
def root(x): return Root(x)
def roots(xs): return [Root(x) for x in xs]
def same(x): return x
def broken(x): return Broken()
def long(x): return "a" * 20_000_000
def deep(x):
    for _ in range(100): x = [x]
    return x
"""


@pytest.mark.parametrize(
    "asserts",
    [
        "assert 3 in yes(5)",
        "assert all(x in yes(5) for x in [1, 2])",
        "assert yes('x').startswith('Hello')",
        "assert yes('x').isupper()",
        "assert yes(1).issubset({1, 2})",
        "import math\nassert math.isclose(root(2) ** 2, 2)",
        "assert round(root(3) * root(3), 6) == 3",
        "assert abs(-1.5 + root(2)) < 1e-6",
        "r = roots([3, 1, 2])\nassert all(r[i] <= r[i + 1] for i in range(len(r) - 1))",
        "a = [1, [2]]\nb = same(a)\nassert b == a and b is not a",
        "assert math.isclose(same(2), 1.5)",
        "assert broken(3) == 3, broken(3)",
        "assert broken(3) == 3, f'got {broken(3)}'",
        "assert long(3) == 3, long(3)",
        "assert deep(deep(3)) == 3",
    ],
)
def test_no_word_of_an_object_is_a_verdict_and_none_ends_the_judge(sandbox, asserts):
    assert run_test(sandbox, LIES, {"asserts": asserts}, Limits()).name in ("wrong", "crashed", "unscored")


@pytest.mark.parametrize(
    "asserts",
    [
        "assert P(1) == P(1)",
        "assert P(1) == 1",
        "assert P(1) != P(2)",
        "assert [P(1)] == [P(1)]",
        "assert P(1)",
        "assert {Box(): 1}",
        "assert P(3) - 3",
        "assert P(3) < 4",
        "assert P(1) < P(2)",
        "assert [p.a for p in sorted([P(3), P(1)])] == [1, 3]",
        "try:\n    ok = P(1) == P(1)\nexcept Exception:\n    ok = True\nassert ok",
        "try:\n    fails()\nexcept Empty:\n    pass\nassert True",
        "import copy\nassert copy.deepcopy(Box(1))[0] == 1",
        "with Box() as box:\n    pass\nassert True",
        "class Q(P):\n    pass\nassert Q(1).a == 1",
        "assert Point(1, 2).x == 1",
        "assert isinstance(P(1), Exception)",
        "assert nested(200) == []",
    ],
)
def test_what_the_word_of_an_object_cannot_decide_is_unscored(sandbox, asserts):
    verdict = run_test(sandbox, CLASSES, {"asserts": asserts}, Limits())
    assert verdict.name == "unscored" and verdict.said, verdict


@pytest.mark.parametrize(
    ("asserts", "want"),
    [
        ("assert (P(1) + P(2)).a == 4", "wrong"),
        ("assert len(Box(4)) == 2", "wrong"),
        ("assert endless() == [0, 1]", "wrong"),
        ("assert Box(1) == [1]", "wrong"),
        ("assert isinstance(P(1), int)", "wrong"),
        ("assert P(1) is P(1)", "wrong"),
        ("assert list(breaks()) == []", "crashed"),
        ("assert len(P(1)) == 1", "crashed"),
        ("assert Box(1).top() == 1", "crashed"),
        ("assert fails() == 1", "crashed"),
        ("assert [1].top() == 1", "crashed"),
    ],
)
def test_what_is_wrong_stays_wrong_and_what_the_program_raises_is_its_own(sandbox, asserts, want):
    assert run_test(sandbox, CLASSES, {"asserts": asserts}, Limits()).name == want


def test_an_unscored_test_has_no_reward_unless_another_one_fails(sandbox):
    unscored, passes, fails = ({"asserts": f"assert {text}"} for text in ("P(1) == P(1)", "P(1).a == 1", "P(1).a == 2"))
    for tests, want in (([passes, unscored], None), ([unscored, fails], 0.0), ([fails, unscored], 0.0), ([passes], 1.0)):
        assert grade(sandbox, CLASSES, tests, Limits(), stop_early=True, total_s=25.0)[0] == want
    said: dict[str, list[str]] = {}
    assert code_tests(["q"], [f"```\n{CLASSES}```"], tests=[[passes, unscored]], log_extra=said.__setitem__) == [None]
    assert said["detail"][0].startswith("tests[1]: unscored: the asserts use an object of its own for `==`")
    assert grade(sandbox, CLASSES, [passes, unscored], Limits(), stop_early=False, total_s=25.0)[0] is None


def test_values_cross_as_they_are_and_no_other_types_do():
    zone = timezone(timedelta(hours=2), "here")
    values = [range(1, 9, 2), slice(1, None), deque([1, (2,)], 5), Fraction(-1, 3), Decimal("1.50"), date(2024, 2, 29), timedelta(1, 2, 3)]
    values += [time(1, 2, 3, 4, zone, fold=1), datetime.datetime(2024, 1, 2, 3, 4, 5, 6, zone), 2**70, 1j, zone]
    for value in values:
        got = decode(encode(value))
        assert (type(got), repr(got)) == (type(value), repr(value))

    class Mine(Fraction):
        pass

    with pytest.raises(NotPlain):
        encode(Mine(1, 2))
    assert list(decode(encode(n for n in range(3)))) == [0, 1, 2]
    with pytest.raises(NotPlain, match="more than"):
        encode(iter(range(MAX_ITEMS + 1)))


@pytest.mark.parametrize(
    "data",
    [{"date": [{"b": "07e80101"}]}, {"Fraction": [1, 0]}, {"Fraction": ["1/2"]}, {"Decimal": ["x"]}, {"range": [True]},
     {"timedelta": [{"i": hex(10**40)}]}, {"q": [[1], 1.5]}, {"date": [{"h": 0}]}, {"time": []}, {"g": 3}],
)  # fmt: skip
def test_forged_values_are_no_values(data):
    with pytest.raises(NotPlain):
        decode(data, lambda number: number)
