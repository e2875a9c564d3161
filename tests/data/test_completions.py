"""The files of completions: what they hold, and that they are whole or not there."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.completions import cut_completions, write_completions
from data.values import Completion, Group, Prompt, Score


def group() -> Group:
    prompt = Prompt("p-1", "1+1=", "1+1=", np.array([5, 6], np.int32))
    completions = tuple(
        Completion(
            "p-1", "run/p-1/2", index, 2, 2**62 + index, np.arange(3, dtype=np.int32), np.ones(3, np.uint8),
            np.zeros(3, np.float32), np.array([4, 4, 5], np.int32), "stop", "hf-0",
        )
        for index in range(2)
    )  # fmt: skip
    scores = (Score(1.0, parts={"math_answer": 1.0, "brevity": None}), Score(None, "timeout", detail="5 s"))
    return Group("run/p-1/2", prompt, 2, completions, scores)


def test_a_file_holds_a_row_for_each_completion(tmp_path):
    path = write_completions(tmp_path / "completions", 7, [group()], [["2", "３"]], [[0.5, None]], [["trained", "failed"]])
    assert path == tmp_path / "completions" / "step-7.parquet"
    first, second = pq.read_table(path).to_pylist()
    assert json.loads(first.pop("parts")) == {"math_answer": 1.0, "brevity": None}
    assert first == {
        "step": 7, "prompt_id": "p-1", "group_id": "run/p-1/2", "index": 0, "attempt": 2, "seed": 2**62, "prompt": "1+1=",
        "completion": "2", "tokens": 3, "finish_reason": "stop", "engine": "hf-0", "version_min": 4, "version_max": 5,
        "reward": 1.0, "status": "ok", "detail": "", "advantage": 0.5, "outcome": "trained", "extras": "{}",
    }  # fmt: skip
    assert [second[name] for name in ("completion", "reward", "status", "advantage", "outcome")] == ["３", None, "timeout", None, "failed"]


def test_columns_of_reward_functions_stand_in_their_rows(tmp_path):
    extras = [{"answer": ["2", None], "tokens": [1, 3]}]
    path = write_completions(tmp_path, 7, [group()], [["2", "3"]], [[0.5, None]], [["trained", "failed"]], extras)
    assert [json.loads(row["extras"]) for row in pq.read_table(path).to_pylist()] == [{"answer": "2", "tokens": 1}, {"tokens": 3}]


def test_all_files_have_the_same_columns_so_a_folder_is_one_table(tmp_path):
    write_completions(tmp_path, 0, [], [], [], [])
    write_completions(tmp_path, 1, [group()], [["2", "3"]], [[None, None]], [["failed"] * 2])
    assert pq.read_schema(tmp_path / "step-0.parquet") == pq.read_schema(tmp_path / "step-1.parquet")
    assert pq.read_table(tmp_path).num_rows == 2


def test_the_same_groups_give_the_same_bytes(tmp_path):
    paths = [write_completions(tmp_path / name, 1, [group()], [["2", "3"]], [[1.0, 2.0]], [["trained"] * 2]) for name in ("a", "b")]
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path = write_completions(tmp_path, 1, [group()], [["2", "3"]], [[1.0, 2.0]], [["trained"] * 2])
    before = path.read_bytes()

    def no_space(self: pq.ParquetWriter, batch: pa.RecordBatch) -> None:
        assert [file.name for file in tmp_path.glob(".*")] == [".step-1.parquet.tmp"]  # it was begun, beside the file
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq.ParquetWriter, "write_batch", no_space)
    with pytest.raises(OSError, match="No space left"):
        write_completions(tmp_path, 1, [group()], [["4", "5"]], [[1.0, 2.0]], [["trained"] * 2])
    assert [file.name for file in tmp_path.iterdir()] == ["step-1.parquet"]
    assert path.read_bytes() == before


def test_resuming_cuts_the_files_from_the_checkpoint_on(tmp_path):
    for step in (0, 2, 9, 10, 11):
        write_completions(tmp_path, step, [], [], [], [])
    (tmp_path / "step-notes.parquet").touch()
    assert [path.name for path in cut_completions(tmp_path, 9)] == ["step-9.parquet", "step-10.parquet", "step-11.parquet"]
    assert {path.name for path in tmp_path.iterdir()} == {"step-0.parquet", "step-2.parquet", "step-notes.parquet"}
    assert cut_completions(tmp_path / "none", 0) == []
