"""The command: one line for each mistake and nothing left behind; the result again for a run that is finished."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from accelerate.utils import DistributedType

import sft.train

RECIPES = Path(__file__).resolve().parents[2] / "recipes"


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Runs `python -m sft.train` in an empty working folder; gives exit code, output and errors."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["sft.train", *map(str, arguments)])
        code = sft.train.main()
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def recipe(tmp_path):
    """A recipe small enough for a test, as a file."""
    values = yaml.safe_load((RECIPES / "quickstart_sft.yaml").read_text())
    values["policy"]["init"] |= {"num_hidden_layers": 1, "num_experts": 2}
    values["sft"] |= {"steps": 2, "batch_size": 4, "lr": 0.001}
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_a_finished_run_prints_its_result_again_and_trains_nothing(command, recipe, tmp_path):
    code, first, _ = command(recipe)
    weights = tmp_path / "outputs/quickstart_sft/final/model.safetensors"
    written = weights.stat().st_mtime_ns
    again_code, again, _ = command(recipe)
    assert (code, again_code) == (0, 0)
    assert "2 steps in" in first and "finished before, its result again: 2 steps in" in again
    assert weights.stat().st_mtime_ns == written
    assert json.loads((tmp_path / "outputs/quickstart_sft/exit.json").read_text())["code"] == 0


def test_a_folder_of_another_recipe_is_refused_and_left_as_it_is(command, recipe, tmp_path):
    command(recipe)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "outputs").rglob("*")}
    code, _, errors = command(recipe, "sft.lr=0.1")
    assert code == 2
    assert "in use by another recipe" in errors and "sft.lr (0.001 there, 0.1 here)" in errors
    code, _, errors = command(recipe, "run.resume=never")
    assert code == 2
    assert "in use, and run.resume is never" in errors
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "outputs").rglob("*")} == before


def test_a_run_that_was_stopped_begins_again_and_ends_as_one_that_was_not(command, recipe, tmp_path):
    command(recipe, "run.name=whole")
    command(recipe, "run.name=stopped")
    stopped = tmp_path / "outputs/stopped"
    # As a kill leaves it: metrics of some steps, a model half written, no exit.json.
    (stopped / "exit.json").unlink()
    (stopped / "final").rename(stopped / "final.partial")
    code, _, _ = command(recipe, "run.name=stopped")
    assert code == 0
    assert sorted(path.name for path in stopped.iterdir()) == ["exit.json", "final", "metrics.jsonl", "recipe.yaml"]
    assert len((stopped / "metrics.jsonl").read_text().splitlines()) == 2
    weights = [tmp_path / "outputs" / name / "final/model.safetensors" for name in ("whole", "stopped")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_a_saved_policy_can_be_trained_on_with_rows_of_a_file(command, recipe, tmp_path):
    command(recipe)
    rows = [{"prompt": f"1+{n}=", "completion": str(1 + n), "source": "hand"} for n in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    further = tmp_path / "further.yaml"
    further.write_text(
        "run: {name: further}\n"
        "policy: {path: outputs/quickstart_sft/final}\n"
        "data: {path: rows.jsonl}\n"
        "sft: {steps: 30, batch_size: 8, lr: 1e-2}\n"
    )
    code, _, errors = command(further)
    assert code == 0, errors
    metrics = [json.loads(line) for line in (tmp_path / "outputs/further/metrics.jsonl").read_text().splitlines()]
    assert metrics[0]["loss"] > 3
    assert metrics[-1]["loss"] < 1


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(command, tmp_path):
    for name in ("quickstart_sft.yaml", "quickstart_hard_sft.yaml"):
        code, output, _ = command(RECIPES / name, "--dry-run")
        assert code == 0
        assert "policy: 1,866,880 parameters, 103 tokens in the vocabulary" in output
        assert "a step: 64 rows" in output
        assert "fits" in output
    assert not (tmp_path / "outputs").exists()


def test_a_dry_run_looks_beyond_rows_that_are_all_too_long(command, tmp_path, monkeypatch):
    monkeypatch.setattr("sft.plan.MEASURED_ROWS", 2)
    rows = [{"prompt": "1+1=", "completion": text} for text in ("2" * 90, "2" * 80, "2", "\u4e8c")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = ["data={path: rows.jsonl}", "sft.max_length=64"]
    code, output, _ = command(RECIPES / "quickstart_sft.yaml", "--dry-run", *changes, "sft.too_long=skip")
    assert code == 0 and "rows: 4, 6 tokens on average, 6 at most, 2 of the first 4 too long and left out" in output
    assert "of the first 4, 1 tokens are <unk>" in output
    code, _, errors = command(RECIPES / "quickstart_sft.yaml", "--dry-run", *changes)
    assert code == 2 and "data: row 1 has 95 tokens and there is room for 64" in errors


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["sft.stepz=3"], "sft.stepz: no such key; did you mean 'steps'?"),
        (["sft.steps=three"], 'sft.steps: "three" should be a valid integer'),
        (["run.name=a/b"], "run.name"),
        (["policy.path=outputs/x/final"], "give either `path` (a policy that there is) or `init`"),
        (["policy.tokenizer=words"], "policy.tokenizer: \"words\" should be 'characters' or 'bytes'"),
        (["policy.init={hidden_size: 128}"], "`init` needs `model_type`"),
        (["policy.init.hiden_size=64"], "policy.init.hiden_size: no field of transformers' Qwen3MoeConfig"),
        (["policy.init=null", "policy.tokenizer=null", "policy.path=./nothere"], "policy.path: no folder 'nothere'"),
        (["data.options.digits=0"], "options: digits: 0 should be greater than or equal to 1"),
        (["data.path=rows.jsonl"], "give either `path` (a file of rows) or `task` (arithmetic), and not both"),
        (["data={path: nothere.jsonl}"], "nothere.jsonl: no such file"),
        (["data={path: empty.jsonl}"], "empty.jsonl: holds no rows"),
        (["data={path: broken.jsonl}"], "broken.jsonl:2: broken_json"),
        (["data={path: missing.jsonl}"], "missing.jsonl:1: completion is missing"),
        (["data={path: mixed.jsonl}"], "mixed.jsonl:1: prompt and completion must both be text or both lists"),
    ],
)
def test_a_mistake_is_one_line_with_code_2_and_leaves_nothing(command, recipe, tmp_path, overrides, message):
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "broken.jsonl").write_text('{"prompt": "1+1=", "completion": "2"}\n{"prompt": \n')
    (tmp_path / "missing.jsonl").write_text('{"prompt": "1+1="}\n')
    (tmp_path / "mixed.jsonl").write_text('{"prompt": "1+1=", "completion": [{"role": "assistant", "content": "2"}]}\n')
    before = sorted(tmp_path.rglob("*"))
    code, _, errors = command(recipe, *overrides)
    assert code == 2
    assert message in errors
    assert len(errors.strip().splitlines()) == 1, errors
    assert sorted(tmp_path.rglob("*")) == before


def test_the_trained_policy_is_judged_on_held_out_prompts(command, recipe, tmp_path):
    held_out = [
        "eval.prompts={task: arithmetic, options: {digits: 1}, split: test}",
        "eval.samples=2",
        "rollout={engine: hf, max_tokens: 4}",
    ]
    code, _, errors = command(recipe, *held_out)
    assert code == 2 and "rewards: missing, and eval.prompts are judged by them" in errors
    code, output, errors = command(recipe, *held_out, "rewards={parts: [{name: math_answer}], workers: 1}")
    assert code == 0, errors
    assert "pass@2" in output and "outputs/quickstart_sft/final on task arithmetic [test]" in output
    judged = json.loads((tmp_path / "outputs/quickstart_sft/eval.json").read_text())
    result = json.loads((tmp_path / "outputs/quickstart_sft/exit.json").read_text())["result"]
    assert judged["evaluations"][0]["pass@1"]["value"] == result["eval"]["pass@1"]


def test_records_and_demonstrations_train_together_as_chats(command, recipe, tmp_path):
    record = {"messages": [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2"}], "expert": "add"}
    (tmp_path / "records.jsonl").write_text(json.dumps(record) + "\n")
    task = "{task: arithmetic, rows: 7, chat: true}"
    code, output, errors = command(recipe, f"data={{sources: [{task}, {{path: records.jsonl}}]}}", "--dry-run")
    assert code == 0, errors
    assert "rows: 8, " in output
    code, _, errors = command(recipe, "data={sources: [{task: arithmetic, rows: 7}, {path: records.jsonl}]}")
    assert code == 2 and "data.sources: some prompts are text and some are chats" in errors


def test_a_batch_that_does_not_divide_among_the_ranks_is_refused(command, recipe, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    code, _, errors = command(recipe)
    assert code == 2
    assert "sft.batch_size: 4 rows do not divide among 3 ranks" in errors


@pytest.mark.parametrize(("accelerators", "message"), [(False, "shards on several accelerators alone"), (True, "fsdp_version is 1;")])
def test_sharding_that_is_not_there_is_refused_before_the_folder_is_claimed(command, recipe, tmp_path, monkeypatch, accelerators, message):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "1")
    if accelerators:
        monkeypatch.setattr("sft.trainer.PartialState", lambda **_: SimpleNamespace(distributed_type=DistributedType.MULTI_GPU))
    code, _, errors = command(recipe)
    assert code == 2 and message in errors and errors.count("\n") == 1, errors
    assert not (tmp_path / "outputs").exists()
