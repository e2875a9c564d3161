"""`code_tests`: runs the program in a completion against the row's tests, in the sandbox; 1 if all pass, or the share that does.

The program is the last fenced block after the reasoning. A row's `tests` is a list of
    {"stdin": "3 4", "stdout": "7"}                      the lines that it writes, each without spaces at its end
    {"function": "add", "args": [3, 4], "expected": 7}   the value that a function of it gives (or a method of `Solution`)
    {"asserts": "assert add(3, 4) == 7"}                 Python about names that it defines; `names` lists builtins among them
Each test runs in a fresh process. What it expects is compared here or, for asserts, in a process apart, and never goes where the
program is. Arguments go there by value, so a change that a function makes in them is not seen.

A program that fails in any way is a wrong answer; only a failure of the sandbox or of the row is an error. Asserts that use an object
of the program in a way that cannot be judged (`rewards.sandbox.proxies` says which) leave the completion unscored, unless another test
settles it. The Score's detail is the first failing case, its verdict, and the last 300 characters that the program wrote.
"""

import ast
import math
import os
import textwrap
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

from data.values import Messages
from rewards.sandbox.judge import Ending, Sandbox, shared_sandbox
from rewards.sandbox.limits import Limits, SandboxError
from rewards.text import answer_text, completion_text

Judged = TypeVar("Judged")
_TAIL = 300
_KINDS: tuple[tuple[set[str], set[str]], ...] = (
    ({"stdin", "stdout"}, set()),
    ({"function", "args", "expected"}, set()),
    ({"asserts"}, {"names"}),
)
"""Keys that a test must and may have."""


@dataclass(frozen=True)
class Verdict:
    """What came of one test."""

    name: str
    """`passed`, `wrong`, `timeout`, `killed` (by a signal or for a limit), `crashed`, `no program`, or `unscored` (the judge
    cannot say)."""
    said: str = ""
    wrote: str = ""
    """The end of what the program wrote."""
    waited_s: float = 0.0
    """Of the test's time, what the program waited for a CPU that others had."""


def prepare(reward: str = "all", limits: dict[str, Any] | None = None, total_s: float = 25.0, backend: str = "auto") -> str:
    """Starts the sandbox before the first call and says what the user must know. ValueError or SandboxError for what cannot be."""
    if reward not in ("all", "fraction"):
        raise ValueError(f"option reward: '{reward}' is neither 'all' nor 'fraction'")
    read_limits(limits)
    return shared_sandbox(backend).warning


def code_tests(
    prompts: list[str | Messages],
    completions: list[str | Messages],
    tests: list[Any] | None = None,
    prompt_texts: list[str] | None = None,
    log_extra: Callable[[str, list[Any]], None] | None = None,
    reward: str = "all",
    limits: dict[str, Any] | None = None,
    total_s: float = 25.0,
    backend: str = "auto",
    **_: Any,
) -> list[float | None]:
    """Rewards, one for each completion; None where the row has no tests or their asserts cannot judge the program. ValueError for
    tests that cannot be run.

    `reward`: `all` (1 or 0) or `fraction`; `limits`: fields of `rewards.sandbox.limits.Limits`, of each run; `total_s`: seconds that
    all tests of a completion may take together, less than the part's `timeout_s`; `backend`: the sandbox's.
    """
    bounds, sandbox = read_limits(limits), shared_sandbox(backend)

    def judge(index: int) -> tuple[float | None, str]:
        rows = tests[index] if tests else None
        if rows is None:
            return None, "the row has no tests"
        check_tests(rows)
        source = find_program(completion_text(completions[index]), prompt_texts[index] if prompt_texts else "")
        if source is None:
            return 0.0, "no program: there is no fenced block after the reasoning"
        return grade(sandbox, source, rows, bounds, stop_early=reward == "all", total_s=total_s)

    judged = judge_each(judge, len(completions))
    if log_extra:
        log_extra("detail", [detail for _, detail in judged])
    return [value for value, _ in judged]


def read_limits(limits: dict[str, Any] | None) -> Limits:
    """The option of that name; ValueError for one that does not exist."""
    known = [field.name for field in fields(Limits)]
    for name, value in (limits or {}).items():
        if name not in known:
            raise ValueError(f"option limits: there is no limit '{name}'; there are {', '.join(known)}")
        if not isinstance(value, int | float) or value <= 0:
            raise ValueError(f"option limits: {name} is {value!r}, and has to be a number above 0")
    return Limits(**limits or {})


def judge_each(judge: Callable[[int], Judged], count: int) -> list[Judged]:
    """What `judge` says of each completion; there are at most 4 workers by default, which have a program for each CPU together."""
    with ThreadPoolExecutor(max_workers=max(1, len(os.sched_getaffinity(0)) // 4)) as threads:
        return list(threads.map(judge, range(count)))


def find_program(text: str, prompt_text: str = "") -> str | None:
    """The last complete fenced block of the answer, None if there is none."""
    found, block, indent = None, None, 0
    for line in (answer_text(text, prompt_text) or "").splitlines(keepends=True):
        mark = line.strip()
        if block is not None and mark == "```":
            found, block = textwrap.dedent(block) if indent else block, None
        elif block is not None:
            block += line
        elif mark.startswith("```"):
            block, indent = "", len(line) - len(line.lstrip())
    return found


def check_tests(tests: Any) -> None:
    """ValueError that names the test and what is wrong with it."""
    if not isinstance(tests, list) or not tests:
        raise ValueError(f"column 'tests' is no list of tests: {tests!r:.80}")
    for index, test in enumerate(tests):
        keys = {key for key, value in test.items() if value is not None or key == "expected"} if isinstance(test, dict) else set()
        # A table of parquet gives every row the keys of all, with null for those that it lacks.
        keys = keys - {"expected"} if "function" not in keys else keys
        if not any(must <= keys <= must | may for must, may in _KINDS):
            raise ValueError(
                f"tests[{index}] has the keys {sorted(keys)}; there are stdin and stdout, function, args and expected, or asserts"
            )
        if "asserts" in keys and not any(isinstance(node, ast.Assert) for node in ast.walk(ast.parse(test["asserts"]))):
            raise ValueError(f"tests[{index}].asserts has no assert in it")
    if not any(_proves(test) for test in tests):
        raise ValueError("tests expect nothing: a program that does nothing would pass")


def grade(
    sandbox: Sandbox, source: str, tests: Sequence[dict[str, Any]], limits: Limits, stop_early: bool, total_s: float
) -> tuple[float | None, str]:
    """The share of tests passed, 0 if none that proves anything; `stop_early`: 1 or 0. And the detail of the first failure.

    None where a test is unscored, except that with `stop_early` another one that fails makes it 0. What
    `total_s`, less what programs waited for a CPU, has no time for counts as `timeout`.
    """
    passed, proved, detail, unscored, left_s = 0, False, "", "", total_s
    for index, test in enumerate(tests):
        verdict = Verdict("timeout", f"the tests took more than {total_s:g} s together")
        if left_s > 0:
            began = time.monotonic()
            verdict = run_test(sandbox, source, test, replace(limits, wall_s=min(limits.wall_s, left_s)))
            left_s -= time.monotonic() - began - verdict.waited_s
        if verdict.name == "passed":
            passed += 1
            proved = proved or _proves(test)
            continue
        said = f"tests[{index}]: {verdict.name}: {verdict.said}; it wrote: {verdict.wrote!r}"
        if verdict.name == "unscored":
            unscored = unscored or said
            continue
        detail = detail or said
        if stop_early:
            return 0.0, detail
    if unscored:
        return None, unscored
    return (passed / len(tests) if proved else 0.0), detail


def run_test(sandbox: Sandbox, source: str, test: dict[str, Any], limits: Limits) -> Verdict:
    """One test in a fresh process."""
    if test.get("asserts") is not None:
        program, judged = sandbox.check(source, test["asserts"], test.get("names") or (), limits)
        verdict = _of_asserts(program, judged)
    elif test.get("function") is not None:
        program = sandbox.call(source, test["function"], test["args"], limits)
        verdict = _of_call(program, test)
    else:
        program = sandbox.script(source, test["stdin"], limits)
        verdict = _of_lines(program, test)
    return replace(verdict, waited_s=program.waited_s)


def _of_call(ending: Ending, test: dict[str, Any]) -> Verdict:
    if failed := _failure(ending):
        return failed
    if ending.result is None:
        return Verdict("crashed", "it ended without giving a value", _tail(ending))
    if same_value(ending.result.get("value"), test["expected"]):
        return Verdict("passed")
    return Verdict("wrong", f"{test['function']} gave another value than {test['expected']!r:.100}", _tail(ending))


def _of_lines(ending: Ending, test: dict[str, Any]) -> Verdict:
    if failed := _failure(ending):
        return failed
    right, said = same_lines(ending.stdout.decode("utf-8", "replace"), test["stdout"])
    return Verdict("passed") if right else Verdict("wrong", said, _tail(ending))


def same_lines(written: str, expected: str) -> tuple[bool, str]:
    """Whether all lines are equal but for white space at their ends and empty lines at the end; what is not, otherwise."""
    written, expected = written.rstrip(), expected.rstrip()
    counts = [text.count("\n") + 1 for text in (written, expected)]
    if counts[0] != counts[1]:  # before they are cut up: millions of lines would take a gigabyte of ours
        return False, f"{counts[0]} lines instead of {counts[1]}"
    got, wanted = ([line.rstrip() for line in text.split("\n")] for text in (written, expected))
    for number, (line, other) in enumerate(zip(got, wanted, strict=True), 1):
        if line != other:
            return False, f"line {number} is {line!r:.100} instead of {other!r:.100}"
    return True, ""


def same_value(got: Any, expected: Any) -> bool:
    """Whether a value as `values.encode` wrote it is one of JSON: a tuple is a list, an integer key is its text, as JSON has no other.

    It is compared as it was written and never rebuilt: keys that collide would cost a process of ours its time.
    """
    if isinstance(got, dict) and len(got) == 1:
        ((tag, body),) = got.items()
        if tag == "t" and isinstance(body, list):
            return same_value(body, expected)
        if tag == "d" and isinstance(body, list) and isinstance(expected, dict):
            return _same_pairs(body, expected)
        if tag == "i" and isinstance(body, str):
            return type(expected) is int and body == hex(expected)
        return tag == "f" and isinstance(expected, float) and body == repr(expected)
    if isinstance(got, list):
        return isinstance(expected, list) and len(got) == len(expected) and all(map(same_value, got, expected))
    if isinstance(got, bool) or isinstance(expected, bool) or got is None or isinstance(got, str):
        return type(got) is type(expected) and got == expected
    if isinstance(got, int | float) and isinstance(expected, int | float):
        if isinstance(got, int) and (isinstance(expected, int) or abs(got) >= 1 << 53):
            return got == expected
        return math.isclose(got, expected, rel_tol=1e-9, abs_tol=1e-9)
    return False


def _same_pairs(pairs: list[Any], expected: dict[str, Any]) -> bool:
    if len(pairs) != len(expected) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        return False
    if not all(isinstance(key, str) or type(key) is int for key, _ in pairs):
        return False
    got = {str(key): value for key, value in pairs}
    return got.keys() == expected.keys() and all(same_value(got[key], expected[key]) for key in got)


def _of_asserts(program: Ending, judged: Ending) -> Verdict:
    result = judged.result or {"verdict": judged.how, "said": "with its asserts"}
    verdict, said, wrote = result["verdict"], result.get("said", ""), _tail(program)
    if verdict == "passed":
        return Verdict("passed") if result["asserts"] else Verdict("wrong", "none of its asserts was reached", wrote)
    if verdict == "unfit":
        raise ValueError(f"tests: {said}")
    if verdict in ("wrong", "crashed", "unscored"):
        return Verdict(verdict, said, wrote)
    # It ended early, or it kept its asserts waiting or fed them until their own limit.
    if failed := _failure(program):
        return failed
    if verdict == "ended":
        return Verdict("crashed", said, wrote)
    if judged.how in ("exit", "signal"):
        raise SandboxError(f"the asserts ended by {judged.how} {judged.code}: {_tail(judged)}")
    return Verdict("timeout" if judged.how == "timeout" else "killed", f"{judged.how} {said}", wrote)


def _failure(ending: Ending) -> Verdict | None:
    """The verdict on a program that did not end well."""
    match ending.how:
        case "timeout":
            waited = f", {ending.waited_s:.1f} s of it waiting for one" if ending.waited_s >= 0.1 else ""
            return Verdict("timeout", f"after {ending.wall_s:.1f} s and {ending.cpu_s:.1f} s of CPU{waited}", _tail(ending))
        case "memory" | "processes" | "files" | "output":
            return Verdict("killed", f"for its limit on {ending.how}", _tail(ending))
        case "signal":
            return Verdict("killed", f"by signal {ending.code}", _tail(ending))
        case "exit" if ending.code:
            return Verdict("crashed", f"with exit code {ending.code}", _tail(ending))
    return None


def _proves(test: dict[str, Any]) -> bool:
    """Whether a program that does nothing fails this test."""
    if test.get("function") is not None:
        return test["expected"] is not None
    return test.get("asserts") is not None or bool(test["stdout"].strip())


def _tail(ending: Ending) -> str:
    return (ending.stdout[-4 * _TAIL :] + ending.stderr[-4 * _TAIL :]).decode("utf-8", "replace")[-_TAIL:]
