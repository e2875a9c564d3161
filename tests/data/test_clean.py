"""The command data.clean: what stays, what goes and why, on real text; bad inputs; nothing half-written."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import datasets
import pyarrow.parquet as pq
import pytest

from data.clean import main

CHECKOUT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(name: str, *rows: dict | str) -> str:
    Path(name).write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8")
    return name


def lines(name: str) -> list[dict]:
    return [json.loads(line) for line in Path(name).read_text().splitlines()]


def rejected() -> list[dict]:
    return pq.read_table("rejected.parquet").to_pylist()


GOOD = {"prompt": "How many legs has a spider?", "completion": "A spider has eight legs.", "level": 1}
OTHER = {"prompt": "What do bees make?", "completion": "They make honey."}


def test_rows_that_stay_are_as_they_were_and_every_other_has_its_reason():
    write("in.jsonl", GOOD, GOOD | {"completion": "I'm sorry, but I can't help."}, GOOD | {"level": 2, "reward": 1.0}, OTHER)
    assert main(["in.jsonl", "--out", "out.jsonl"]) == 0
    assert lines("out.jsonl") == [GOOD | {"level": 2, "reward": 1.0}, OTHER]
    found = [(row["row"], row["reason"], row["detail"]) for row in rejected()]
    assert found == [(2, "refusal", "\"I'm sorry, but I can't\""), (1, "exact_duplicate", "of in.jsonl:3")]
    assert json.loads(rejected()[0]["content"]) == GOOD | {"completion": "I'm sorry, but I can't help."}
    report = json.loads(Path("report.json").read_text())
    assert report["counts"] == {"read": 4, "refusal": 1, "exact_duplicate": 1, "kept": 2}
    assert report["stages"] == [["read", 4], ["kept", 2]]


def test_what_is_kept_and_what_is_rejected_make_up_what_was_read():
    rows = [{"prompt": f"{a} plus {b}?", "completion": "and" if a % 3 else f"It is {a + b}."} for a in range(20) for b in range(20)]
    write("in.jsonl", *rows, *rows[:50])
    assert main(["in.jsonl", "--out", "out.parquet"]) == 0
    everything = [json.loads(row["content"]) for row in rejected()] + pq.read_table("out.parquet").to_pylist()
    count = Counter(json.dumps(row, sort_keys=True) for row in everything)
    assert count == Counter(json.dumps(row, sort_keys=True) for row in rows + rows[:50])


def test_parquet_keeps_its_types_and_later_rows_may_have_other_columns():
    write("in.jsonl", *[{"prompt": f"word{n} of all words", "n": n} for n in range(6_000)], {"prompt": "x y", "extra": {"a": 1}})
    assert main(["in.jsonl", "--out", "out.parquet", "clean.near=null"]) == 0
    table = pq.read_table("out.parquet")
    assert table.num_rows == 6_001 and table.column_names == ["prompt", "n", "extra"]
    assert table.to_pylist()[-1] == {"prompt": "x y", "n": None, "extra": {"a": 1}}
    assert main(["out.parquet", "--out", "again/out.parquet", "clean.near=null"]) == 0
    assert pq.read_table("again/out.parquet").equals(table)
    assert datasets.load_dataset("parquet", data_files="out.parquet", split="train", cache_dir="cache").num_rows == 6_001


def test_two_runs_give_the_same_bytes():
    write("in.jsonl", *[GOOD | {"level": n % 3, "prompt": f"How many legs have {n % 7} spiders?"} for n in range(50)], OTHER)
    for folder in ("a", "b"):
        assert main(["in.jsonl", "--out", f"{folder}/out.parquet"]) == 0
    for name in ("out.parquet", "rejected.parquet", "contamination.jsonl"):
        assert Path("a", name).read_bytes() == Path("b", name).read_bytes()


def test_contamination_is_reported_with_what_matched():
    write("eval.jsonl", {"question": "How many legs has a spider?"})
    write("in.jsonl", GOOD, OTHER)
    assert main(["in.jsonl", "--out", "out.jsonl", "--against", "eval.jsonl"]) == 0
    assert lines("out.jsonl") == [OTHER]
    (hit,) = lines("contamination.jsonl")
    assert (hit["id"], hit["evaluation"], hit["matched"]) == ("in-1", "eval.jsonl:1", "how many legs has a spider")
    write("allow.txt", "eval.jsonl:1")
    assert main(["in.jsonl", "--out", "out.jsonl", "--against", "eval.jsonl", "--allow", "allow.txt"]) == 0
    assert lines("out.jsonl") == [GOOD, OTHER] and lines("contamination.jsonl")[0]["allowed"]


def test_code_rows_are_rewritten_at_their_rate():
    code = "def f(x):\n    return x + {}\n"
    write("in.jsonl", *[{"prompt": f"Write f number {n}", "completion": f"```python\n{code.format(n)}```"} for n in range(400)], OTHER)
    assert main(["in.jsonl", "--out", "out.jsonl", "clean.fim.rate=0.1", "clean.near=null"]) == 0
    rows = lines("out.jsonl")
    changed = [(n, row) for n, row in enumerate(rows) if row["fim"]]
    assert 20 <= len(changed) <= 60 and not rows[-1]["fim"]
    for n, row in changed:
        prefix, suffix = row["prompt"].removeprefix("<｜fim▁begin｜>").removesuffix("<｜fim▁end｜>").split("<｜fim▁hole｜>")
        assert row["completion"] and prefix + row["completion"] + suffix == code.format(n)


def test_a_json_array_and_columns_by_name_are_read():
    Path("in.json").write_text(json.dumps([{"ask": "a b", "say": "c d."}, {"ask": "e f", "say": "because"}], indent=1))
    assert main(["in.json", "--out", "out.jsonl", "--columns", "prompt=ask", "--columns", "completion=say"]) == 0
    assert lines("out.jsonl") == [{"ask": "a b", "say": "c d."}]


def test_settings_come_from_a_recipe_and_overrides():
    Path("recipe.yaml").write_text("run: {name: x}\nclean: {min_chars: 20}\n")
    write("in.jsonl", GOOD, OTHER)
    assert main(["in.jsonl", "--out", "out.jsonl", "--recipe", "recipe.yaml"]) == 0
    assert lines("out.jsonl") == [GOOD]
    assert main(["in.jsonl", "--out", "out.jsonl", "--recipe", "recipe.yaml", "clean.min_chars=100"]) == 0
    assert lines("out.jsonl") == []


BAD = {
    "broken_json": (["in.jsonl", "--out", "o.jsonl"], [GOOD, "{"], r"in.jsonl:2: not valid JSON (Expecting property name"),
    "no_object": (["in.jsonl", "--out", "o.jsonl"], [GOOD, "[1]"], "in.jsonl:2: holds a JSON list where a row is an object"),
    "no_prompt": (["in.jsonl", "--out", "o.jsonl"], [GOOD, {"q": 1}], "in.jsonl:2: no prompt: the row has the columns q;"),
    "no_file": (["inn.jsonl", "--out", "o.jsonl"], [GOOD], "inn.jsonl: no such file; did you mean 'in.jsonl'?"),
    "the_input": (["in.jsonl", "--out", "./in.jsonl"], [GOOD], "is an input, and inputs are never written to"),
    "a_suffix": (["in.jsonl", "--out", "o.csv"], [GOOD], "'o.csv' has to end in .jsonl or .parquet"),
    "a_key": (["in.jsonl", "--out", "o.jsonl", "clean.nearr=1"], [GOOD], "clean.nearr: no such key; did you mean 'near'?"),
    "a_section": (["in.jsonl", "--out", "o.jsonl", "min_chars=9"], [GOOD], "'min_chars=9': this command reads clean alone; write"),
    "a_script": (["in.jsonl", "--out", "o.jsonl", "clean.scripts=[Hann]"], [GOOD], "no script named 'Hann'; did you mean 'Han'?"),
    "a_column": (["in.jsonl", "--out", "o.jsonl", "--columns", "promt=q"], [GOOD], "--columns promt=q: say which of"),
    "an_allow_list": (["in.jsonl", "--out", "o.jsonl", "--allow", "a.txt"], [GOOD], "--allow goes with --against"),
    "a_table": (["in.jsonl", "--out", "o.parquet"], [GOOD, OTHER | {"level": "high"}], "o.parquet: these rows are no table"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_input_is_one_line_and_exit_code_2_and_leaves_no_output(kind, capsys):
    arguments, rows, line = BAD[kind]
    write("in.jsonl", *rows)
    before = Path("in.jsonl").read_bytes()
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert line in said and said.count("\n") == 1
    assert Path("in.jsonl").read_bytes() == before
    assert not list(Path().glob("o.*")) and not [path for path in Path().iterdir() if path.name.startswith(".")]


def test_a_recipe_without_the_section_is_no_recipe_for_this(capsys):
    write("in.jsonl", GOOD)
    Path("recipe.yaml").write_text("claen: {min_chars: 20}\n")
    assert main(["in.jsonl", "--out", "out.jsonl", "--recipe", "recipe.yaml"]) == 2
    assert capsys.readouterr().err == "--recipe: 'recipe.yaml' has no section clean; add it, or leave --recipe out\n"


def test_the_records_of_another_data_set_are_not_replaced(capsys):
    write("in.jsonl", GOOD, GOOD)
    assert main(["in.jsonl", "--out", "a/one.jsonl"]) == main(["in.jsonl", "--out", "a/one.jsonl"]) == 0
    before = Path("a/rejected.parquet").read_bytes()
    assert main(["in.jsonl", "--out", "a/two.jsonl"]) == 2
    assert "are the records (report.json, …) of one.jsonl; name a file in another folder" in capsys.readouterr().err
    assert Path("a/rejected.parquet").read_bytes() == before and not Path("a/two.jsonl").exists()


def test_a_rejected_file_that_is_an_input_is_not_replaced(capsys):
    write("in.jsonl", GOOD)
    assert main(["in.jsonl", "--out", "a/out.jsonl"]) == 0
    assert main(["a/rejected.parquet", "--out", "a/again.jsonl", "--columns", "prompt=content"]) == 2
    assert "is an input" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["clean", "mix", "retract", "card"])
def test_help_says_what_a_command_does_and_loads_nothing_heavy(command):
    code = (
        "import sys, runpy\nsys.argv = ['x', '--help']\n"
        f"try:\n    runpy.run_module('data.{command}', run_name='__main__')\nexcept SystemExit:\n    pass\n"
        "print('loaded', *{'torch', 'vllm', 'pyarrow', 'datasets', 'transformers'} & {m.split('.')[0] for m in sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True, check=True)
    assert f"python -m data.{command}" in done.stdout
    assert done.stdout.splitlines()[-1] == "loaded"


def test_real_text_goes_for_few_and_plain_reasons(test_data):
    """GSM8K and MATH, 14,947 rows, against GSM8K test and MATH-500; each near copy has the gold answer of the row that stays."""
    inputs = [str(test_data / "gsm8k" / "train.jsonl"), str(test_data / "rllm_math" / "math_train.json")]
    against = ["--against", str(test_data / "gsm8k" / "test.jsonl"), "--against", str(test_data / "math500" / "test.jsonl")]
    assert main([*inputs, "--out", "out.parquet", *against]) == 0
    counts = json.loads(Path("report.json").read_text())["counts"]
    assert counts["read"] == 14_947 and sum(counts.values()) == 2 * counts["read"]
    assert set(counts) == {"read", "contamination", "exact_duplicate", "near_duplicate", "kept"}
    assert counts["contamination"] < 60 and counts["near_duplicate"] < 40
    hits = lines("contamination.jsonl")
    assert len({hit["id"] for hit in hits}) == counts["contamination"]
    assert all(hit["matched"] and hit["coverage"] >= 0.5 for hit in hits)
    math = json.loads((test_data / "rllm_math" / "math_train.json").read_text())
    for row in rejected():
        if row["reason"] == "near_duplicate" and "math_train" in row["file"]:
            other = math[int(row["detail"].split(",")[0].rpartition(":")[2]) - 1]
            assert json.loads(row["content"])["answer"].strip() == other["answer"].strip()
