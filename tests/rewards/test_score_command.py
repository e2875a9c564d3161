"""rewards.score and rewards.check as commands: order, resume after kill -9 without scoring a row twice, mistakes, exit codes."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

import rewards.score
from data import parquet
from rewards.rows import check_rows

CHECKOUT = Path(__file__).resolve().parents[2]


def command(module: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    return subprocess.run([sys.executable, "-m", module, *arguments], cwd=cwd, env=env, capture_output=True, text=True, timeout=120)


def write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


COUNTING = """
import time
def counting(completions, number, **kwargs):
    time.sleep(0.004)
    with open("asked", "a") as file:
        file.write("".join(f"{n}\\n" for n in number))
    return [float(n) for n in number]
"""


def test_rows_come_out_in_order_with_reward_status_detail_and_parts(tmp_path):
    rows = [{"prompt": "2+2=", "completion": f"#### {n}", "answer": "4", "mine": [n]} for n in range(300)]
    rows[7]["completion"] = [{"role": "assistant", "content": r"\boxed{grey}"}]
    rows[7]["answer"] = "gray"
    write_rows(tmp_path / "rows.jsonl", rows)
    done = command("rewards.score", "--reward", "math_answer", "--in", "rows.jsonl", "--out", "out/scored.jsonl", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    scored = read_rows(tmp_path / "out" / "scored.jsonl")
    assert [row["mine"] for row in scored] == [[n] for n in range(300)]
    assert scored[4] == {**rows[4], "reward": 1.0, "status": "ok", "detail": "", "parts": {"math_answer": 1.0}}
    assert (scored[7]["reward"], scored[7]["status"]) == (None, "unscored")
    assert "300 rows in" in done.stderr and "299 ok, 1 unscored" in done.stderr and "s in its processes" in done.stderr


def test_a_run_killed_by_kill_9_goes_on_and_scores_no_row_of_the_journal_again(tmp_path):
    (tmp_path / "mine.py").write_text(COUNTING)
    write_rows(tmp_path / "rows.jsonl", [{"prompt": "q", "completion": "c", "number": n} for n in range(400)])
    arguments = ["--reward", "counting", "--plugin", "./mine.py:counting", "--in", "rows.jsonl", "--out", "scored.jsonl"]
    env = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    kills = 0
    while kills < 2:
        before = len((tmp_path / "asked").read_text().split()) if kills else 0
        running = subprocess.Popen([sys.executable, "-m", "rewards.score", *arguments], cwd=tmp_path, env=env, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            if (tmp_path / "asked").exists() and len((tmp_path / "asked").read_text().split()) > before + 100:
                break
            time.sleep(0.01)
        running.send_signal(signal.SIGKILL)
        running.wait()
        kills += 1
    held = in_journal(tmp_path / "scored.jsonl.journal.sqlite")
    assert 50 < len(held) < 400
    asked_before = Counter((tmp_path / "asked").read_text().split())
    done = command("rewards.score", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"({len(held)} of them from the journal)" in done.stderr
    assert [row["reward"] for row in read_rows(tmp_path / "scored.jsonl")] == list(map(float, range(400)))
    asked = Counter((tmp_path / "asked").read_text().split()) - asked_before
    assert set(asked) == {str(n) for n in range(400) if n not in held} and set(asked.values()) == {1}
    again = command("rewards.score", *arguments, cwd=tmp_path)
    assert "(400 of them from the journal)" in again.stderr
    other = command("rewards.score", *arguments[2:], "--reward", "counting", "--reward", "think_format", cwd=tmp_path)
    assert other.returncode == 2 and "was begun with other rewards; remove scored.jsonl.journal.sqlite" in other.stderr


def in_journal(path: Path) -> set[int]:
    with sqlite3.connect(path) as journal:
        return {position for (position,) in journal.execute("SELECT position FROM score JOIN attempt ON score.attempt = attempt.key")}


def test_rows_of_one_group_are_judged_together(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def rank(completions, group_ids, **kwargs):\n    return [float(len(completions)) for _ in completions]\n"
    )
    rows = [{"prompt": "q", "completion": "c", "group_id": g} for g in ("a", "a", "b", "a")] + [{"prompt": "q", "completion": "c"}] * 2
    write_rows(tmp_path / "rows.jsonl", rows)
    done = command("rewards.score", "--reward", "rank", "--plugin", "mine.py:rank", "--in", "rows.jsonl", "--out", "o.jsonl", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [row["reward"] for row in read_rows(tmp_path / "o.jsonl")] == [2.0, 2.0, 1.0, 1.0, 1.0, 1.0]


RECIPE = """
policy: {path: not/read}
rewards:
  parts: [{name: math_answer, weight: 2.0, requires: think_format}]
  max_error_rate: 0.0
"""


def test_of_a_recipe_only_the_rewards_are_read_and_overrides_reach_them(tmp_path):
    (tmp_path / "r.yaml").write_text(RECIPE)
    write_rows(tmp_path / "rows.jsonl", [{"prompt": "q", "completion": "<think>a</think>#### 4", "answer": "4"}])
    arguments = ["--recipe", "r.yaml", "--in", "rows.jsonl", "--out", "o.jsonl"]
    assert command("rewards.score", *arguments, "rewards.parts[0].weight=3.0", cwd=tmp_path).returncode == 0
    assert read_rows(tmp_path / "o.jsonl")[0]["reward"] == 3.0
    wrong = command("rewards.score", *arguments, "rewards.parts[0].name=mth", cwd=tmp_path)
    assert wrong.returncode == 2 and "no reward named 'mth'" in wrong.stderr and wrong.stderr.count("\n") == 1


def test_more_failures_than_allowed_end_with_1_and_one_traceback(tmp_path):
    (tmp_path / "mine.py").write_text("def f(**kwargs):\n    raise KeyError('lost')\n")
    write_rows(tmp_path / "rows.jsonl", [{"prompt": "q", "completion": "c"}] * 3)
    done = command("rewards.score", "--reward", "f", "--plugin", "mine.py:f", "--in", "rows.jsonl", "--out", "o.jsonl", cwd=tmp_path)
    assert done.returncode == 1
    assert "3 of 3 scores failed, 3 of them in the reward function 'f'" in done.stderr and done.stderr.count("Traceback") == 1
    assert [row["reward"] for row in read_rows(tmp_path / "o.jsonl")] == [None] * 3


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "rows.jsonl:2: not JSON"),
        ("[]", "rows.jsonl:2: a row is an object, this is list"),
        ('{"prompt": "q"}', "rows.jsonl:2: 'completion' has to be text or chat messages, it is None"),
    ],
)
def test_a_row_that_cannot_be_scored_is_a_mistake_with_its_line(tmp_path, line, said):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "q", "completion": "c"}\n' + line + "\n")
    done = command("rewards.score", "--reward", "math_answer", "--in", "rows.jsonl", "--out", "o.jsonl", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith(said) and not (tmp_path / "o.jsonl").exists()


def test_check_says_whether_gold_scores_1(tmp_path):
    write_rows(tmp_path / "rows.jsonl", [{"prompt": "q", "answer": r"\sqrt{2}"}, {"prompt": "q", "answer": "7"}, {"prompt": "q"}])
    done = command("rewards.check", "math_answer", "rows.jsonl", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 gold answers: 2 score 1, 0 do not" in done.stdout and "2 answers of other rows: 0 score 1" in done.stdout
    (tmp_path / "mine.py").write_text("def never(completions, **kwargs):\n    return [0.0 for _ in completions]\n")
    poor = command("rewards.check", "./mine.py:never", cwd=tmp_path)
    assert poor.returncode == 1 and "2 gold answers: 0 score 1, 2 do not" in poor.stdout and "row 1: gold ['4']: 0.0" in poor.stdout
    for bad, said in (("{x:1}", "is not JSON"), ("[1]", "is no object")):
        options = command("rewards.check", "math_answer", "--options", bad, cwd=tmp_path)
        assert options.returncode == 2 and f"--options: '{bad}' {said}" in options.stderr and "Traceback" not in options.stderr
    for named, said in {"math_answr": "'math_answr'; did you mean 'math_answer'?", "./mine.py": "./mine.py:FUNCTION"}.items():
        wrong = command("rewards.check", named, cwd=tmp_path)
        assert wrong.returncode == 2 and said in wrong.stderr and wrong.stderr.count("\n") == 1
    missing = command("rewards.check", "./mine.py:nevr", cwd=tmp_path)
    assert missing.returncode == 2 and "did you mean 'never'?" in missing.stderr


def one_row(path: Path, **columns) -> None:
    write_rows(path, [{"prompt": "q", "completion": "c", **columns}])


@pytest.mark.parametrize("name", ["rows.jsonl", "./rows.jsonl", "symbolic.jsonl", "hard.jsonl"])
def test_an_output_that_is_the_input_is_refused_and_the_input_stays(tmp_path, name):
    one_row(tmp_path / "rows.jsonl")
    (tmp_path / "symbolic.jsonl").symlink_to("rows.jsonl")
    (tmp_path / "hard.jsonl").hardlink_to(tmp_path / "rows.jsonl")
    before = (tmp_path / "rows.jsonl").read_bytes()
    done = command("rewards.score", "--reward", "math_answer", "--in", "rows.jsonl", "--out", name, cwd=tmp_path)
    assert done.returncode == 2 and "is an input, and inputs are never written to" in done.stderr and done.stderr.count("\n") == 1
    assert (tmp_path / "rows.jsonl").read_bytes() == before


def test_a_file_that_changes_while_it_is_scored_is_no_success(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": "q", "completion": "#### 1", "answer": "1"}] * 3

    def counted_and_cut(*arguments):
        count = check_rows(*arguments)
        write_rows(Path("rows.jsonl"), rows[:2])
        return count

    write_rows(Path("rows.jsonl"), rows)
    monkeypatch.setattr(rewards.score, "check_rows", counted_and_cut)
    assert rewards.score.main(["--reward", "math_answer", "--in", "rows.jsonl", "--out", "o.jsonl"]) == 2
    assert "--in: 'rows.jsonl' changed while it was scored: it had 3 rows, and 2 were written" in capsys.readouterr().err


def test_a_group_id_of_null_is_no_group(tmp_path):
    (tmp_path / "mine.py").write_text("def size(completions, group_ids, **_):\n    return [float(len(completions)) for _ in completions]\n")
    rows = [{"prompt": f"q{n}", "completion": "c", "group_id": group} for n, group in enumerate([None, None, "a", None])]
    write_rows(tmp_path / "rows.jsonl", rows)
    done = command("rewards.score", "--reward", "size", "--plugin", "mine.py:size", "--in", "rows.jsonl", "--out", "o.jsonl", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [row["reward"] for row in read_rows(tmp_path / "o.jsonl")] == [1.0] * 4


@pytest.mark.parametrize("column", ["prompt", "answer", "solution"])
def test_rows_of_one_group_that_differ_in_what_is_asked_are_a_mistake(tmp_path, column):
    row = {"prompt": "q", "completion": "c", "answer": "1", "solution": "2", "group_id": "a"}
    write_rows(tmp_path / "rows.jsonl", [row, row | {"completion": "d"}, row | {column: "other"}])
    done = command("rewards.score", "--reward", "math_answer", "--in", "rows.jsonl", "--out", "o.jsonl", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith(f"rows.jsonl:3: '{column}' is not that of the first row of group 'a'")
    write_rows(tmp_path / "rows.jsonl", [row, row | {column: "other", "group_id": "b"}, row])
    assert command("rewards.score", "--reward", "math_answer", "--in", "rows.jsonl", "--out", "o.jsonl", cwd=tmp_path).returncode == 0


def test_rows_of_one_group_may_hold_no_number_and_need_not_repeat_the_answer(tmp_path):
    rows = [{"prompt": "q", "completion": "c", "answer": float("nan")}] * 2  # as pandas leaves them
    rows += [row | {"group_id": "a"} for row in rows]
    rows += [
        {"prompt": "q", "completion": "#### 1", "answer": "1", "group_id": "b"},
        {"prompt": "q", "completion": "#### 1", "group_id": "b"},
    ]
    write_rows(tmp_path / "rows.jsonl", rows)
    done = command("rewards.score", "--reward", "math_answer", "--in", "rows.jsonl", "--out", "o.jsonl", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [row["reward"] for row in read_rows(tmp_path / "o.jsonl")][-2:] == [1.0, 1.0]


def test_scores_of_a_grader_that_changed_are_not_taken_for_its_own(tmp_path):
    grader = "def grader(completions, **_):\n    return [{} for _ in completions]\n"
    (tmp_path / "mine.py").write_text(grader.format("0.0"))
    one_row(tmp_path / "rows.jsonl")
    arguments = ["--reward", "grader", "--plugin", "mine.py:grader", "--in", "rows.jsonl", "--out", "o.jsonl"]
    assert command("rewards.score", *arguments, cwd=tmp_path).returncode == 0
    (tmp_path / "mine.py").write_text(grader.format("1.0"))
    refused = command("rewards.score", *arguments, cwd=tmp_path)
    assert refused.returncode == 2
    said = "--out: the reward 'grader' has changed since 'o.jsonl' was begun; restore it, or remove o.jsonl.journal.sqlite to score anew\n"
    assert refused.stderr == said
    assert read_rows(tmp_path / "o.jsonl")[0]["reward"] == 0.0, "what was scored stays"
    for path in tmp_path.glob("o.jsonl.journal*"):
        path.unlink()
    assert command("rewards.score", *arguments, cwd=tmp_path).returncode == 0
    assert read_rows(tmp_path / "o.jsonl")[0]["reward"] == 1.0


def test_half_a_surrogate_pair_is_written_as_it_came(tmp_path):
    one_row(tmp_path / "rows.jsonl", answer="1", completion="\ud83d and so #### 1")
    done = command("rewards.score", "--reward", "math_answer", "--in", "rows.jsonl", "--out", "o.jsonl", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (row,) = read_rows(tmp_path / "o.jsonl")
    assert (row["completion"], row["reward"]) == ("\ud83d and so #### 1", 1.0)


def test_check_reads_rows_with_separators_of_unicode_and_skips_blank_lines(tmp_path):
    row = json.dumps({"prompt": "a\u2028b\u0085c", "answer": "7"}, ensure_ascii=False)
    (tmp_path / "rows.jsonl").write_text(f"{row}\n\n{row}\n", encoding="utf-8")
    done = command("rewards.check", "math_answer", "rows.jsonl", cwd=tmp_path)
    assert done.returncode == 0 and "2 gold answers: 2 score 1" in done.stdout, done.stdout + done.stderr


def test_rows_of_a_parquet_file_are_scored_and_scores_are_written_as_jsonl(tmp_path):
    rows = [{"prompt": "2+2=", "completion": f"#### {n}", "answer": "4", "group_id": None} for n in (4, 5)]
    parquet.write_rows(tmp_path / "rows.parquet", rows, dict.fromkeys(rows[0], "string"))
    arguments = ["--reward", "math_answer", "--in", "rows.parquet", "--out"]
    done = command("rewards.score", *arguments, "o.jsonl", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [row["reward"] for row in read_rows(tmp_path / "o.jsonl")] == [1.0, 0.0]
    refused = command("rewards.score", *arguments, "o.parquet", cwd=tmp_path)
    assert refused.returncode == 2 and refused.stderr.startswith("--out: 'o.parquet': scores are written row by row, as JSONL")
    rows[1]["prompt"] = None
    parquet.write_rows(tmp_path / "rows.parquet", rows, dict.fromkeys(rows[0], "string"))
    bad = command("rewards.score", *arguments, "p.jsonl", cwd=tmp_path)
    assert bad.returncode == 2 and bad.stderr.startswith("rows.parquet: row 2: 'prompt' has to be text or chat messages")


def test_check_tells_a_judge_that_accepts_all_from_one_that_shapes(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def generous(completions, **_):\n    return [1.0] * len(completions)\n"
        "def brevity(completions, **_):\n    return [1 / (1 + len(c)) for c in completions]\n"
        "def silent(completions, **_):\n    return [None] * len(completions)\n"
    )
    generous = command("rewards.check", "./mine.py:generous", cwd=tmp_path)
    assert generous.returncode == 1 and "2 score 1, which a wrong answer should not" in generous.stdout
    hint = "if it does not judge whether an answer is right, say so: --shaping\n"
    gate = command("rewards.check", "think_format", cwd=tmp_path)
    assert gate.returncode == 1 and generous.stdout.endswith(hint) and gate.stdout.endswith(hint)
    brief = command("rewards.check", "./mine.py:brevity", cwd=tmp_path)
    assert brief.returncode == 1 and brief.stdout.endswith(hint)
    shaped = command("rewards.check", "./mine.py:brevity", "--shaping", cwd=tmp_path)
    assert shaped.returncode == 0 and "16 completions: 16 have a number, from " in shaped.stdout
    assert command("rewards.check", "./mine.py:silent", "--shaping", cwd=tmp_path).returncode == 1
