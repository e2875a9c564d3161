"""The sandbox holds: a corpus of hostile and honest programs on every backend, as root and as an ordinary user, 8 at once.

The suite runs a sample of the corpus on each; `COHORT_SANDBOX_CORPUS=1 python -m pytest tests/rewards/sandbox` runs all of it.
"""

import json
import os
import shutil
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from rewards.code_tests import check_tests, code_tests, find_program, run_test, same_lines, same_value
from rewards.sandbox.judge import Sandbox
from rewards.sandbox.limits import Limits

HERE = Path(__file__).resolve().parent
CHECKOUT = HERE.parents[2]
BACKENDS = ["namespaces", "landlock", "bubblewrap"]


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox() as sandbox:
        yield sandbox


@pytest.mark.parametrize("user", ["root", "ordinary"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_hostile_program_is_held_and_every_honest_one_passes(backend, user):
    """A sample of the corpus; with COHORT_SANDBOX_CORPUS=1 all of it."""
    if backend == "bubblewrap" and not shutil.which("bwrap"):
        pytest.skip("bubblewrap is not installed")
    if user == "root" and os.geteuid():
        pytest.skip("the tests do not run as root")
    whole = bool(os.environ.get("COHORT_SANDBOX_CORPUS"))
    command = [sys.executable, str(HERE / "corpus.py"), str(CHECKOUT), backend, "whole" if whole else "sample"]
    if user == "ordinary" and not os.geteuid():
        command = [sys.executable, str(HERE / "ordinary.py"), str(CHECKOUT), *command]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout)
    assert [result for result in report["results"] if not result["right"]] == []
    counts = [sum(result["hostile"] == hostile for result in report["results"]) for hostile in (True, False)]
    assert counts[0] >= (150 if whole else 25) and counts[1] >= (65 if whole else 7), counts
    assert report["reached"] == []
    assert report["left"] == {"processes": [], "folders": [], "shared": [], "mounts": []}


@pytest.mark.slow
def test_humaneval_solutions_pass_and_empty_bodies_fail(sandbox, test_data):
    rows = [json.loads(line) for line in (test_data / "humaneval" / "HumanEval.jsonl").open()]
    assert len(rows) == 164
    limits = Limits(cpu_s=20, wall_s=60.0)

    def passes(row, body):
        test = {"asserts": f"{row['test']}\ncheck({row['entry_point']})"}
        return run_test(sandbox, row["prompt"] + body, test, limits).name == "passed"

    with ThreadPoolExecutor(2) as threads:
        canonical = sum(threads.map(lambda row: passes(row, row["canonical_solution"]), rows))
        empty = sum(threads.map(lambda row: passes(row, "    pass\n"), rows))
    assert (canonical, empty) == (164, 0)


@contextmanager
def busy(each):
    """All CPUs are wanted by so many other programs each; each in a session of its own, as Linux may share CPUs among sessions first."""
    command = [sys.executable, "-c", "while True: pass"]
    others = [subprocess.Popen(command, start_new_session=True) for _ in range(each * len(os.sched_getaffinity(0)))]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


@pytest.mark.slow
def test_a_program_is_not_wrong_because_others_have_the_cpu(sandbox):
    """1.5 s of work take more than 2 s where three others want the same CPU; a program that sleeps waits for none."""
    works = "import time\nwhile time.process_time() < 1.5:\n    pass\nprint('OK')\n"
    with busy(3):
        starved = sandbox.script(works, "", Limits(wall_s=2.0))
        asleep = sandbox.script("import time\ntime.sleep(30)\n", "", Limits(wall_s=2.0))
        defined = f"def slow():\n{textwrap.indent(works, '    ')}"
        asserted = run_test(sandbox, defined, {"asserts": "assert slow() is None"}, Limits(wall_s=2.0))
    assert (starved.how, starved.code, starved.stdout) == ("exit", 0, b"OK\n")
    assert starved.wall_s > 2.0 and starved.wall_s - starved.waited_s < 2.0
    assert asleep.how == "timeout" and asleep.waited_s < 1.0
    assert asserted.name == "passed", asserted


@pytest.mark.parametrize("more", ["os.fork()", "__import__('threading').Thread(target=time.sleep, args=[30]).start()"])
def test_a_program_with_children_or_threads_may_be_kept_from_the_cpu_by_them_and_gets_no_more_time(sandbox, more):
    source = f"import os, time\n{more}\ntime.sleep(0.2)\nwhile True:\n    pass\n"
    with busy(1):
        ending = sandbox.script(source, "", Limits(wall_s=1.5, cpu_s=20))
    assert ending.how == "timeout" and ending.waited_s < 1.0 and ending.wall_s < 1.5 + ending.waited_s + 3.0


def test_many_processes_have_the_cpu_time_of_one_program(sandbox):
    """Each of them stays below the kernel's limit, and the first one sleeps: without a limit on their sum it would end after 50 s."""
    source = "import os, time\nfor _ in range(4):\n    if not os.fork():\n        while True:\n            pass\ntime.sleep(100)\n"
    ending = sandbox.script(source, "", Limits(cpu_s=1, wall_s=50.0))
    assert ending.how == "timeout" and ending.wall_s < 45.0


def test_a_failing_program_is_wrong_and_a_bad_row_is_an_error():
    right, wrong = "```python\ndef f(x):\n    return 2 * x\n```", "```python\ndef f(x):\n    return x\n```"
    tests = [{"function": "f", "args": [0], "expected": 0}, {"function": "f", "args": [2], "expected": 4}]
    details: dict[str, list[str]] = {}
    rewards = code_tests(["q"] * 3, [right, wrong, "none"], tests=[tests] * 3, log_extra=details.__setitem__)
    assert rewards == [1.0, 0.0, 0.0]
    assert details["detail"][1].startswith("tests[1]: wrong")
    assert code_tests(["q"], [wrong], tests=[tests], reward="fraction") == [0.5]
    assert code_tests(["q"], [right], tests=[None]) == [None]
    with pytest.raises(ValueError, match="would pass"):
        check_tests([{"stdin": "1", "stdout": ""}])


def test_the_program_is_the_last_block_after_the_reasoning():
    assert find_program("<think>```\n1\n```</think>\n```python\n2\n```\n```\n3\n```") == "3\n"
    assert find_program("<think>```\n1\n```") is None


def test_lines_and_values_are_compared_exactly():
    assert same_lines("1\n2  \n\n", "1\n2")[0] and not same_lines("1", "1\n2")[0]
    assert same_value({"t": [1, 2.0]}, [1, 2]) and not same_value(True, 1) and not same_value("1", 1)
