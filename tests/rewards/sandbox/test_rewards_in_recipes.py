"""`code_tests` and `command_check` as a recipe names them: in their workers, through `rewards.score`, with details and mistakes."""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from watching import processes_with, wait_until

from data.recipe import InputError
from rewards.config import RewardsConfig
from rewards.job import ScoreJob
from rewards.scorer import Scorer

CHECKOUT = Path(__file__).resolve().parents[3]
ADD = "Sure:\n```python\na, b = map(int, input().split())\nprint({})\n```"
TESTS = [{"stdin": "3 4", "stdout": "7"}, {"stdin": "2 2", "stdout": "4"}]


def scores_of(part, completions, columns):
    with Scorer(RewardsConfig.model_validate({"parts": [part], "workers": 1})) as scorer:
        return scorer.score([ScoreJob("g", "q", "q", completions, [[0]] * len(completions), columns)])[0]


def score(tmp_path, rows, *arguments):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [sys.executable, "-m", "rewards.score", *arguments, "--in", "rows.jsonl", "--out", "scored.jsonl"]
    env = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in (tmp_path / "scored.jsonl").read_text().splitlines()]


def test_rewards_score_runs_programs_against_the_tests_of_their_rows(tmp_path):
    said = [ADD.format("a + b"), ADD.format("a * b"), ADD.format("1 / 0"), "no program", "<think>" + ADD.format("a + b")]
    rows = [{"prompt": "Add.", "completion": text, "tests": TESTS} for text in said]
    rows.append({"prompt": "Add.", "completion": said[0]})
    scored = score(tmp_path, rows, "--reward", "code_tests")
    assert [row["reward"] for row in scored] == [1.0, 0.0, 0.0, 0.0, 0.0, None]
    assert [row["status"] for row in scored] == ["ok"] * 5 + ["unscored"]
    assert scored[0]["detail"] == ""
    assert scored[1]["detail"] == "code_tests: tests[0]: wrong: line 1 is '12' instead of '7'; it wrote: '12\\n'"
    assert scored[2]["detail"].startswith("code_tests: tests[0]: crashed: with exit code 1; it wrote: ")
    assert "ZeroDivisionError" in scored[2]["detail"]


def test_a_recipe_chooses_fraction_limits_and_a_gate(tmp_path):
    (tmp_path / "recipe.yaml").write_text(
        "rewards:\n  parts:\n    - {name: code_tests, requires: think_format, options: {reward: fraction, limits: {wall_s: 1.0}}}\n"
    )
    half, slow = ADD.format("a * b"), ADD.format("a + b if a == b else __import__('time').sleep(60)")
    rows = [{"prompt": "Add.", "completion": f"<think>x</think>{text}", "tests": TESTS} for text in (half, slow)]
    rows.append({"prompt": "Add.", "completion": half, "tests": TESTS})
    scored = score(tmp_path, rows, "--recipe", "recipe.yaml")
    assert [row["reward"] for row in scored] == [0.5, 0.5, 0.0]
    assert scored[1]["detail"].startswith("code_tests: tests[0]: timeout: after 1.")


def test_all_tests_of_a_completion_share_a_time_limit_and_what_is_late_is_wrong():
    part = {"name": "code_tests", "options": {"reward": "fraction", "total_s": 1.5, "limits": {"wall_s": 1.0}}}
    sleepy = "```python\nimport time\nif input() == 'wait':\n    time.sleep(60)\nprint(1)\n```"
    tests = [{"stdin": word, "stdout": "1"} for word in ("go", "wait", "wait", "go")]
    (score,) = scores_of(part, [sleepy], {"tests": tests})
    assert (score.value, score.status) == (0.25, "ok")


def test_a_row_with_tests_that_prove_nothing_is_an_error_and_not_a_number():
    scores = scores_of({"name": "code_tests"}, [ADD.format(1), ADD.format(2)], {"tests": [{"stdin": "1", "stdout": ""}]})
    assert [(score.value, score.status) for score in scores] == [(None, "error")] * 2
    assert "would pass" in scores[0].detail


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ({"name": "code_tests", "options": {"reward": "most"}}, "option reward: 'most' is neither 'all' nor 'fraction'"),
        ({"name": "code_tests", "options": {"limits": {"seconds": 1}}}, "option limits: there is no limit 'seconds'; there are wall_s"),
        ({"name": "code_tests", "options": {"backend": "jail"}}, "no sandbox backend 'jail'; there are auto, namespaces"),
        ({"name": "command_check", "options": {"command": ["sh", "-n"]}}, "has no word with {file} in it"),
        ({"name": "command_check", "options": {"command": ["no-lean", "{file}"]}}, "there is no 'no-lean' on this machine"),
    ],
)
def test_a_mistake_in_the_options_is_one_line_at_the_start(part, said):
    with pytest.raises(InputError) as error, Scorer(RewardsConfig.model_validate({"parts": [part]})):
        pass
    assert said in str(error.value) and "\n" not in str(error.value)


SHELL = {"name": "command_check", "options": {"command": ["sh", "{file}"], "file": "text.sh", "append": "\necho {nonce}\n"}}


def test_a_command_accepts_only_a_text_that_it_has_read_to_its_end():
    shell = {**SHELL, "options": {**SHELL["options"], "reject": ["sorry"]}}
    texts = ["echo fine", "```\necho fine\n```", "exit 0", "false", "echo sorry", "s=so; echo ${s}rry", " ", "echo accepted-0; exit 0"]
    scores = scores_of(shell, texts, {})
    assert [score.status for score in scores] == ["ok"] * len(texts)
    assert [score.value for score in scores] == [1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    assert scores[2].detail == "command_check: it ended before it had read all of the text"
    assert scores[4].detail == "command_check: the text matches 'sorry'"
    assert scores[5].detail == "command_check: the output matches 'sorry'"


def test_what_runs_the_text_is_judged_by_a_command_that_the_text_cannot_reach():
    """`sh` runs the text, so that it could forge all that one command says of it; whether it left the right word, `grep` says."""
    options = {"command": ["sh", "{file}"], "file": "text.sh", "keep": ["made"], "then": ["grep", "-qxf", "{file}", "made"]}
    part = {"name": "command_check", "options": options}
    texts = ["echo 42 > made", "cat text.sh; exit 0", "echo 41 > made", "mkdir made", "ln -s /usr/bin/env made", "echo 42 > made; false"]
    texts += [
        "echo 42 > check.sh; echo 41 > made",
        "(sleep 0.2; echo 42 > /proc/1/fd/4) & :",
        "kill -9 $PPID",
        "head -c 9000000 /dev/zero > made",
    ]
    scores = scores_of(part, texts, {"append": "42\n"})
    assert [(score.value, score.status) for score in scores] == [(1.0, "ok"), *[(0.0, "ok")] * (len(texts) - 1)]
    assert scores[1].detail == scores[3].detail == "command_check: the command left no made"
    assert scores[2].detail.startswith("command_check: exit 1")
    with pytest.raises(InputError, match="a second command needs the files that the first one leaves"):
        scores_of({"name": "command_check", "options": {**options, "keep": []}}, texts, {})


def test_a_command_is_held_like_a_program():
    tried = ["cat /etc/passwd", "echo x > /usr/x", "sleep 60", ": > /dev/tcp/127.0.0.1/22", "kill -9 -1; exit 1", "ls /root"]
    limits = {"wall_s": 1.0}
    plain = {"name": "command_check", "options": {"command": ["sh", "-e", "{file}"], "file": "text.sh", "limits": limits}}
    scores = scores_of(plain, tried, {})
    assert [(score.value, score.status) for score in scores] == [(0.0, "ok")] * len(tried)
    assert "timeout" in scores[2].detail


@pytest.mark.skipif(not shutil.which("gcc"), reason="there is no gcc")
def test_a_compiler_is_a_judge():
    gcc = {"name": "command_check", "options": {"command": ["gcc", "-Werror", "-Wall", "-c", "{file}", "-o", "out.o"], "file": "text.c"}}
    texts = ["```c\nint main(void) { return 0; }\n```", "```c\nint main(void) { return x; }\n```", '```c\n#include "/etc/passwd"\n```']
    scores = scores_of(gcc, texts, {})
    assert [(score.value, score.status) for score in scores] == [(1.0, "ok"), (0.0, "ok"), (0.0, "ok")]
    assert "undeclared" in scores[1].detail


def test_a_command_that_is_not_in_the_sandbox_is_an_error(tmp_path):
    (tmp_path / "tool").write_text("#!/bin/sh\nexit 0\n")
    (tmp_path / "tool").chmod(0o755)
    tool = {"name": "command_check", "options": {"command": [str(tmp_path / "tool"), "{file}"]}}
    (score,) = scores_of(tool, ["text"], {})
    assert (score.value, score.status) == (None, "error") and "option paths?" in score.detail


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_scoring_that_is_stopped_leaves_no_program(number, tmp_path):
    mark = f"{98765 + number}.4321"
    text = f"trap '' INT TERM HUP\nsetsid sleep {mark} &\n(setsid sleep {mark} &)\nsleep {mark}\n"
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "q", "completion": text}) + "\n")
    (tmp_path / "recipe.yaml").write_text(
        "rewards: {parts: [{name: command_check, options: {command: [sh, '{file}'], limits: {wall_s: 300.0}}, timeout_s: 300}]}"
    )
    command = [sys.executable, "-m", "rewards.score", "--recipe", "recipe.yaml", "--in", "rows.jsonl", "--out", "scored.jsonl"]
    env = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    # A shell's background jobs, such as a test run of one, ignore Ctrl-C, and so would their children.
    hears_ctrl_c = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(command, cwd=tmp_path, env=env, stderr=subprocess.DEVNULL, preexec_fn=hears_ctrl_c) as scoring:
        try:
            assert wait_until(lambda: len(processes_with(mark)) == 3, 20.0), processes_with(mark)
            scoring.send_signal(number)
            assert wait_until(lambda: not processes_with(mark), 10.0), processes_with(mark)
        finally:
            scoring.kill()
