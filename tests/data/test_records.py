"""Records, mixtures, retraction: rows keep what is known of them, through files and back."""

import json
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest

from data.mix import MixSource, mixed, plan_mix
from data.mix import main as mix
from data.records import RECORD_COLUMNS, record_from_row, record_row, write_records
from data.retract import main as retract
from data.rows import read_files
from data.values import Provenance, Record


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def record(number: int, expert: str = "add", reward: str = "math_answer", version: str = "1", pass_rate: float | None = 0.5) -> Record:
    messages = [{"role": "user", "content": f"{number}+1="}, {"role": "assistant", "content": f"<think>so</think>{number + 1}"}]
    provenance = Provenance(
        prompt_id=f"p{number}", group_id=f"run/p{number}/0", index=2, expert=expert, expert_hash="ab12", seed=2**62 + number,
        sampling={"temperature": 1.0, "system": "be brief"}, rewards={reward: version}, parts={reward: 1.0, "judge": None}, reward=1.0,
        pass_rate=pass_rate, filters=("format", "length"), recipe_hash="cd34", tokens=7, source="prompts.jsonl",
    )  # fmt: skip
    return Record(messages, provenance)


def curated(folder: str, records: list[Record]) -> Path:
    write_records(Path(folder), lambda: records)
    return Path(folder)


# --- records --------------------------------------------------------------------------------------------------------------


def test_a_record_comes_back_from_both_files_as_it_was():
    records = [record(1), record(2, expert="subtract", reward="other", pass_rate=None)]
    curated("d", records)
    for name in ("train.parquet", "train.jsonl"):
        assert [record_from_row(row.values) for row in read_files([f"d/{name}"])] == records


def test_rows_have_the_same_columns_whatever_the_rewards_are_called():
    assert set(record_row(record(1))) == set(RECORD_COLUMNS) == set(record_row(record(2, reward="x")))
    with pytest.raises(ValueError, match="no record: the row has no prompt_id"):
        record_from_row({"messages": []})


def test_datasets_and_trl_read_both_files_as_they_are():
    from trl.data_utils import is_conversational

    records = [record(n) for n in range(3)]
    curated("d", records)
    for builder, name in (("parquet", "train.parquet"), ("json", "train.jsonl")):
        rows = datasets.load_dataset(builder, data_files=f"d/{name}", split="train", cache_dir="cache")
        assert rows.num_rows == 3 and is_conversational(rows[0])
        assert rows[1]["messages"] == records[1].messages and rows[1]["seed"] == 2**62 + 1


# --- mixing ---------------------------------------------------------------------------------------------------------------


def sources(*sizes: int) -> list[str]:
    for number, size in enumerate(sizes):
        Path(f"s{number}.jsonl").write_text("".join(json.dumps({"prompt": f"s{number} row {n}"}) + "\n" for n in range(size)))
    return [f"s{number}.jsonl" for number in range(len(sizes))]


def lines(name: str) -> list[str]:
    return [json.loads(line)["prompt"] for line in Path(name).read_text().splitlines()]


def test_three_to_one_by_weight_takes_as_much_as_there_is_without_repeating():
    sources(900, 200)
    assert mix(["s0.jsonl=3", "s1.jsonl=1", "--out", "m.jsonl"]) == 0
    rows = lines("m.jsonl")
    assert len(rows) == len(set(rows)) == 800
    assert sum(row.startswith("s0") for row in rows) == 600
    report = json.loads(Path("m.mix.json").read_text())
    assert [part["share"] for part in report["sources"]] == [0.75, 0.25]


def test_a_mixture_is_mixed_all_along_and_keeps_a_sources_order():
    sources(900, 300)
    assert mix(["s0.jsonl=3", "s1.jsonl=1", "--out", "m.jsonl"]) == 0
    rows = lines("m.jsonl")
    for start in range(0, 1_200, 200):
        assert 25 <= sum(row.startswith("s1") for row in rows[start : start + 200]) <= 75
    numbers = [int(row.split()[-1]) for row in rows if row.startswith("s1")]
    assert numbers == sorted(numbers)


def test_counts_and_seeds():
    sources(100, 100)
    taken = []
    for seed in ("0", "0", "1"):
        assert mix(["s0.jsonl=10", "s1.jsonl=20", "--counts", "--seed", seed, "--out", f"m{len(taken)}.jsonl"]) == 0
        taken.append(lines(f"m{len(taken)}.jsonl"))
    assert taken[0] == taken[1] != taken[2]
    assert [sum(row.startswith(f"s{n}") for row in taken[2]) for n in (0, 1)] == [10, 20]


def test_a_source_that_is_too_small_is_an_error_or_is_repeated_evenly(capsys):
    sources(10, 100)
    arguments = ["s0.jsonl=1", "s1.jsonl=1", "--total", "50", "--out", "m.jsonl"]
    assert mix(arguments) == 2
    assert capsys.readouterr().err == "s0.jsonl: holds 10 and 25 are wanted; take less, or set repeat\n"
    assert mix([*arguments, "--repeat"]) == 0
    rows = [row for row in lines("m.jsonl") if row.startswith("s0")]
    assert len(rows) == 25 and {rows.count(row) for row in rows} == {2, 3}


def test_tokens_are_counted_to_the_nearest_row():
    sizes = [np.array([5, 5, 5, 5]), np.array([100, 100, 100])]
    plans = plan_mix([MixSource("a", 10), MixSource("b", 190)], sizes, counts=True, total=None, repeat=False, seed=0)
    assert [(plan.rows, plan.units) for plan in plans] == [(2, 10), (2, 200)]


def test_tokens_of_a_tokenizer(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save("tokenizer.json")
    Path("long.jsonl").write_text((json.dumps({"prompt": "a b c d e f g h"}) + "\n") * 30)
    Path("short.jsonl").write_text((json.dumps({"prompt": "a b"}) + "\n") * 30)
    assert mix(["long.jsonl=1", "short.jsonl=1", "--total", "80", "--unit", "tokens", "--tokenizer", ".", "--out", "m.jsonl"]) == 0
    report = json.loads(Path("m.mix.json").read_text())
    assert [(part["rows"], part["units"]) for part in report["sources"]] == [(5, 40), (20, 40)]
    assert mix(["long.jsonl=1", "--unit", "tokens", "--out", "m.jsonl"]) == 2


def test_mixing_is_streaming():
    sources(50, 50)
    plans = plan_mix([MixSource(f"s{n}.jsonl", 1) for n in (0, 1)], [np.ones(50, int)] * 2, counts=False, total=None, repeat=False, seed=0)
    stream = mixed(plans, 0, lambda path: read_files([path]))
    assert next(stream).values["prompt"].endswith("row 0")


@pytest.mark.parametrize("source", ["s0.jsonl", "s0.jsonl=0", "s0.jsonl=x", "=3", "s0.jsonl=inf"])
def test_a_source_without_a_number_is_refused(source, capsys):
    sources(3)
    assert mix([source, "--out", "m.jsonl"]) == 2
    assert "FILE=NUMBER" in capsys.readouterr().err and not Path("m.jsonl").exists()


# --- retraction -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["a.jsonl=1", "--total", "0"], "--total 0: a mixture has one row or more"),
        (["a.jsonl=2.7", "--counts"], "--counts: counts are whole numbers"),
        (["a.jsonl=1", "b.jsonl=1", "c.jsonl=1", "--total", "1"], "1 of 3 sources are no whole row of any; take more"),
    ],
)
def test_a_mixture_of_nothing_is_a_mistake_in_one_line(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in "abc":
        Path(f"{name}.jsonl").write_text('{"prompt": "1"}\n{"prompt": "2"}\n')
    assert mix([*arguments, "--out", "m.jsonl"]) == 2
    assert capsys.readouterr().err.startswith(said)
    assert not list(Path().glob("m.*"))


def test_a_retracted_reward_version_takes_its_rows_and_no_others():
    records = [record(1), record(2, version="2"), record(3, reward="other")]
    folder = curated("d", records)
    assert retract([str(folder), "--reward", "math_answer@1", "--out", "e"]) == 0
    for name in ("train.parquet", "train.jsonl"):
        assert [record_from_row(row.values) for row in read_files([f"e/{name}"])] == records[1:]
    (gone,) = pq.read_table("e/rejected.parquet").to_pylist()
    assert (gone["id"], gone["reason"], gone["detail"]) == ("p1", "retracted", "reward math_answer@1")
    assert record_from_row(json.loads(gone["content"])) == records[0]
    assert json.loads(Path("e/report.json").read_text())["stages"] == [["without reward math_answer@1", 2]]
    assert Path("e/README.md").is_file() and len(list(read_files(["d/train.jsonl"]))) == 3


def test_a_retraction_leaves_the_recipe_and_the_hits_as_they_are():
    folder = Path(curated("d", [record(1), record(2, version="2")]))
    hits = json.dumps({"matched": "a\u2028b\u0085c"}, ensure_ascii=False).encode() + b"\n"
    (folder / "contamination.jsonl").write_bytes(hits)
    assert retract([str(folder), "--reward", "math_answer@1", "--out", "e"]) == 0
    assert Path("e/contamination.jsonl").read_bytes() == hits


def test_an_expert_is_retracted_from_a_file_and_its_columns_stay():
    curated("d", [record(1), record(2, expert="subtract")])
    assert retract(["d/train.parquet", "--expert", "add", "--out", "e.parquet"]) == 0
    assert pq.read_schema("e.parquet").equals(pq.read_schema("d/train.parquet"))
    assert [row.values["expert"] for row in read_files(["e.parquet"])] == ["subtract"]
    assert retract(["e.parquet", "--expert", "subtract", "--out", "f.parquet"]) == 0
    assert pq.read_table("f.parquet").num_rows == 0


def test_what_nothing_rests_on_is_an_error_that_says_what_there_is(capsys):
    curated("d", [record(1), record(2, version="2")])
    assert retract(["d", "--reward", "math_answer@3", "--out", "e"]) == 2
    said = "no row rests on 'math_answer@3'; the data set has math_answer@1 (1), math_answer@2 (1)\n"
    assert capsys.readouterr().err == said
    assert retract(["d", "--reward", "math_answer", "--out", "e"]) == 2
    assert retract(["d", "--expert", "add", "--out", "d"]) == 2
    Path("x.jsonl").write_text('{"prompt": "a"}\n')
    assert retract(["x.jsonl", "--expert", "add", "--out", "y.jsonl"]) == 2
    assert "x.jsonl:1: no record" in capsys.readouterr().err and not Path("e").exists()


def test_importing_data_loads_nothing_heavy():
    code = "import data, data.select, data.records, data.values, data.cleaning, sys\n"
    code += "print({'torch', 'vllm', 'pyarrow', 'datasets', 'transformers'} & {m.split('.')[0] for m in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).resolve().parents[2], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
