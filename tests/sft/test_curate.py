"""Curation: what is sampled, kept and written, that nothing is done twice, and that a row can say where it came from."""

import json
import os
import signal
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
import yaml
from curation import Killed, files_of, small_recipe, write_recipe
from made import make_groups

import sft.curate
import sft.why
from data.completions import write_completions
from data.journal import Journal, Slot
from data.parquet import read_rows
from data.recipe import parse, resolved_yaml
from data.records import record_from_row
from data.values import Group, Prompt
from rewards.config import RewardsConfig
from rewards.versions import reward_versions
from rl.config import TrainRecipe
from rl.run_folder import RunFolder


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Runs `python -m sft.curate` (or another module) in a working folder of its own; gives exit code, output and errors."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments, module=sft.curate):
        monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
        code = module.main()
        return code, *capsys.readouterr()

    return run


def rows_of(folder: Path, name="train"):
    return list(read_rows(folder / f"outputs/curation/curated/{name}.parquet"))


def result_of(folder: Path):
    return json.loads((folder / "outputs/curation/exit.json").read_text())["result"]


def test_every_record_says_where_it_came_from_and_can_be_sampled_again(command, tmp_path):
    path = write_recipe(tmp_path, small_recipe(tmp_path))
    code, output, errors = command(path)
    assert code == 0, errors
    assert "20 prompts -> 20 prompts kept -> 60 completions -> 60 judged" in output
    rows = rows_of(tmp_path)
    with Journal(tmp_path / "outputs/curation/journal.sqlite", read_only=True) as journal:
        for row in rows:
            provenance = record_from_row(row).provenance
            scores = journal.scores(provenance.group_id)
            completion = journal.completions(provenance.group_id)[provenance.index]
            right = [score.value for score in scores.values()]
            assert provenance.pass_rate == sum(right) / 3
            assert 0 < provenance.pass_rate < 1, "always or never solved: outside of the window"
            assert (provenance.seed, provenance.tokens) == (completion.seed, len(completion.token_ids))
            assert provenance.parts == {"regex": 1.0} and list(provenance.rewards) == ["regex"]
            assert provenance.expert_hash == result_of(tmp_path)["experts"][provenance.expert]["weights"]
            assert provenance.sampling["temperature"] == 1.0 and provenance.sampling["group_size"] == 3
    assert {row["expert"] for row in rows} == {"one", "two"}
    assert len(rows) == result_of(tmp_path)["counts"]["selected"]
    rejected = rows_of(tmp_path, "rejected")
    assert len(rows) + len(rejected) == 60, "every completion is a row, or rejected for a reason"
    assert {row["reason"] for row in rejected} == {"wrong", "pass_rate"}
    code, output, errors = command(tmp_path / "outputs/curation/curated", len(rows) - 1, module=sft.why)
    assert code == 0, errors
    assert f"sampled again: the same, {rows[-1]['tokens']} tokens" in output


def test_why_says_when_a_row_does_not_come_out_the_same_or_cannot(command, tmp_path):
    command(write_recipe(tmp_path, small_recipe(tmp_path, prompts=3)))
    lines = (tmp_path / "outputs/curation/curated/train.jsonl").read_text().splitlines()
    row = json.loads(lines[0])
    row["messages"][-1]["content"] = "\x1b[2Jforged"
    (tmp_path / "forged.jsonl").write_text(json.dumps(row) + "\n")
    code, output, _ = command("forged.jsonl", 0, "--run", "outputs/curation", module=sft.why)
    assert code == 1 and "sampled again: not the same" in output
    assert "\x1b" not in output, "a model's words are no commands to a terminal"
    code, _, errors = command("forged.jsonl", 7, "--run", "outputs/curation", module=sft.why)
    assert code == 2 and "ROW: forged.jsonl has no row 7" in errors
    weights = tmp_path / "expert-1/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\0")
    code, _, errors = command("forged.jsonl", 0, "--run", "outputs/curation", module=sft.why)
    assert code == 2 and "restore them to sample it again" in errors


def test_another_selection_costs_no_sampling(command, tmp_path):
    path = write_recipe(tmp_path, small_recipe(tmp_path))
    command(path)
    before = rows_of(tmp_path)
    code, output, _ = command(path)
    assert code == 0 and "finished before, its result again" in output
    code, output, errors = command(path, "select.rule=best_of_n", "select.pass_rate=null")
    assert code == 0, errors
    assert "0 completions sampled and 0 scored, 60 held before" in output
    assert len(rows_of(tmp_path)) == 20 != len(before)
    code, _, errors = command(path, "experts[0].rollout.temperature=0.5")
    assert code == 2 and "in use by another recipe" in errors


def test_what_a_killed_selection_wrote_is_not_reported_as_the_one_before(command, tmp_path, monkeypatch):
    path = write_recipe(tmp_path, small_recipe(tmp_path, prompts=2))
    command(path, "select.pass_rate=null")
    other = ["select.rule=best_of_n", "select.pass_rate=null"]

    def killed(*_):
        raise MemoryError

    with monkeypatch.context() as patched, pytest.raises(MemoryError):
        patched.setattr(RunFolder, "write_exit", killed)
        command(path, *other)
    rows = rows_of(tmp_path)
    code, output, errors = command(path, *other)
    assert code == 0, errors
    assert f"{len(rows)} kept" in output and len(rows) == 4


def test_a_mixture_takes_of_each_expert_what_its_weight_says(command, tmp_path):
    path = write_recipe(tmp_path, small_recipe(tmp_path, prompts=30, select={"rule": "all_correct"}))
    command(path, "experts[0].original=response")
    all_rows = rows_of(tmp_path)
    held = Counter(row["expert"] for row in all_rows)
    assert min(held.values()) > 4 and set(held) == {"one", "one/original", "two"}

    mix = "mix={counts: {one: 2, one/original: 3, two: 4}}"
    code, output, errors = command(path, "experts[0].original=response", mix)
    assert code == 0, errors
    assert f"{len(all_rows)} kept -> 9 mixed" in output and "0 completions sampled and 0 scored" in output
    rows, rejected = rows_of(tmp_path), [row for row in rows_of(tmp_path, "rejected") if row["reason"] == "mix"]
    assert Counter(row["expert"] for row in rows) == {"one": 2, "one/original": 3, "two": 4}
    assert all(row | {"recipe_hash": ""} in [other | {"recipe_hash": ""} for other in all_rows] for row in rows)
    assert len(rejected) == len(all_rows) - 9 == result_of(tmp_path)["rejected"]["mix"]
    assert rejected[0]["detail"] == f"2 of {held['one']} rows of one are taken"
    card = (tmp_path / "outputs/curation/curated/README.md").read_text()
    assert "By rows, seed 1." in card and "| one/original | 3 | 33.3% |" in card and "| mixed | 9 |" in card

    code, output, errors = command(path, "experts[0].original=response", "mix={weights: {one: 3, one/original: 1, two: 1}, unit: tokens}")
    assert code == 0, errors
    parts = {part["path"]: part for part in result_of(tmp_path)["mix"]["sources"]}
    tokens = Counter()
    for row in rows_of(tmp_path):
        tokens[row["expert"]] += row["tokens"]
    assert tokens == {name: part["units"] for name, part in parts.items()}
    assert parts["one"]["share"] == pytest.approx(0.6, abs=0.04)
    assert "source | rows | tokens | share" in (tmp_path / "outputs/curation/curated/README.md").read_text()

    code, _, errors = command(path, "experts[0].original=response", "mix={counts: {one: 2000, one/original: 3, two: 4}}")
    assert code == 1 and f"mix: one: holds {held['one']} and 2,000 are wanted; take less, or set repeat" in errors
    code, output, errors = command(path, "experts[0].original=response", mix)
    assert code == 0 and rows_of(tmp_path) == rows, "the same rows in the same order"


def test_both_row_shapes_and_the_system_prompt_kept_or_dropped(command, tmp_path):
    recipe = small_recipe(tmp_path, prompts=4, select={"rule": "all_correct"})
    template = "{%- for m in messages -%}{{- m['content'] + ';' -}}{%- endfor -%}"
    for number, expert in enumerate(recipe["experts"], start=1):
        (tmp_path / f"expert-{number}/chat_template.jinja").write_text(template)
        expert |= {"system": "AB", "keep_system": number == 2, "original": "response"}
    code, _, errors = command(write_recipe(tmp_path, recipe))
    assert code == 0, errors
    shapes = {}
    for row in rows_of(tmp_path):
        shapes.setdefault(row["expert"], set()).add(tuple(message["role"] for message in row["messages"]))
    assert shapes == {
        "one": {("user", "assistant")},
        "one/original": {("user", "assistant")},
        "two": {("system", "user", "assistant")},
    }
    originals = [row for row in rows_of(tmp_path) if row["expert"] == "one/original"]
    assert [row["messages"][-1]["content"] for row in originals] == ["04", "14", "24", "34"], "each is right: it has a 4"
    assert not [row for row in rows_of(tmp_path) if row["expert"] == "two/original"], "the same rows, so one of each stays"
    assert result_of(tmp_path)["rejected"]["exact_duplicate"] == 4


def test_contaminated_and_repeated_prompts_are_not_sampled(command, tmp_path):
    recipe = small_recipe(tmp_path, prompts=6)
    rows = [json.loads(line) for line in (tmp_path / "prompts.jsonl").read_text().splitlines()]
    (tmp_path / "held_out.jsonl").write_text(json.dumps({"prompt": rows[2]["prompt"]}) + "\n")
    rows.append(rows[4] | {"id": "again"})
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe["clean"]["against"] = {"paths": ["held_out.jsonl"]}
    code, output, errors = command(write_recipe(tmp_path, recipe))
    assert code == 0, errors
    assert "14 prompts -> 10 prompts kept -> 30 completions" in output
    with Journal(tmp_path / "outputs/curation/journal.sqlite", read_only=True) as journal:
        asked = {row[0] for row in journal._db.execute("SELECT DISTINCT prompt_id FROM attempt")}
    assert asked == {"q0", "q1", "q3", "q4", "q5"}
    rejected = {(row["id"], row["reason"]) for row in rows_of(tmp_path, "rejected") if "group_id" not in row["content"]}
    assert rejected == {("q2", "contamination"), ("again", "exact_duplicate")}


def renamed(completions, group_id):
    return tuple(replace(completion, group_id=group_id) for completion in completions)


def test_what_a_training_run_has_sampled_is_taken_and_not_judged_again(command, tmp_path):
    recipe = small_recipe(tmp_path, prompts=4)
    run = tmp_path / "outputs/trained"
    run.mkdir(parents=True)
    made = make_groups([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]], seed=3)
    groups = [
        Group(f"trained/q{i}/0", Prompt(f"q{i}", "x", "x", g.prompt.token_ids), 0, renamed(g.completions, f"trained/q{i}/0"), g.scores)
        for i, g in enumerate(made)
    ]
    with Journal(run / "journal.sqlite") as journal:
        journal.begin([Slot("trained", i, f"q{i}") for i in range(4)], 2, step=5)  # of the last one nothing was sampled
        for group in groups:
            journal.put_completions(group.completions)
            journal.put_scores(group.id, dict(enumerate(group.scores)))
        journal.use(groups[0].id, 5, "trained")
        journal.contain(6, oldest=6)  # its tokens are gone: the text is what there is
    write_completions(run / "completions", 6, groups[:1], [["12", "AB"]], [[None, None]], [["trained"] * 2])
    prompts = {"path": "prompts.jsonl"}
    trained = {"run": {"name": "trained"}, "policy": {"path": "expert-1"}, "prompts": prompts, "rewards": recipe["rewards"]}
    (run / "recipe.yaml").write_text(resolved_yaml(parse(trained, TrainRecipe, "test")))
    recipe["experts"] = [{"name": "trained", "path": "expert-1", "prompts": {"path": "prompts.jsonl"}, "sampled": "outputs/trained"}]
    code, output, errors = command(write_recipe(tmp_path, recipe))
    assert code == 0, errors
    assert "0 completions sampled and 0 scored" in output
    rows = rows_of(tmp_path)
    assert [row["prompt_id"] for row in rows] == ["q0", "q1", "q2"]
    assert rows[0]["messages"][-1]["content"] == "12"
    assert [row["tokens"] for row in rows[1:]] == [len(groups[1].completions[1].token_ids), len(groups[2].completions[0].token_ids)]
    assert json.loads(rows[0]["sampling"])["group_id"] == "trained/q0/0"
    rewards = parse(recipe["rewards"], RewardsConfig, "test")
    for versions, scored in ((reward_versions(rewards), 0), ({"regex": "older"}, 6)):
        with Journal(run / "journal.sqlite") as journal:
            journal.set_meta(reward_versions=versions)
        code, other, errors = command(tmp_path / "recipe.yaml", f"run.name=scored-{scored}", "select.pass_rate=null")
        assert (code in (0, 1)) and f"and {scored} scored" in other + errors, other + errors
    code, output, _ = command(tmp_path / "outputs/curation/curated", 0, module=sft.why)
    assert code == 0 and "not sampled again: a training run sampled it" in output


def test_a_grader_that_fails_stops_the_run_and_is_asked_again_when_mended(command, tmp_path):
    plugin = tmp_path / "grader.py"
    plugin.write_text("def grader(completions, **_):\n    raise RuntimeError('out of order')\n")
    path = write_recipe(
        tmp_path, small_recipe(tmp_path, rewards={"plugins": ["./grader.py:grader"], "parts": [{"name": "grader"}], "workers": 1})
    )
    code, _, errors = command(path)
    assert code == 1
    assert "more than rewards.max_error_rate 0.2 allows" in errors and "out of order" in errors
    plugin.write_text("def grader(completions, **_):\n    return [float(i % 2) for i, _ in enumerate(completions)]\n")
    code, output, errors = command(path)
    assert code == 0, errors
    sampled, scored = (int(output.split(f" {word}")[0].split()[-1]) for word in ("completions sampled", "scored"))
    assert scored == 60 and sampled < 60, "completions of before are judged, not sampled again"


def test_scores_of_a_grader_that_changed_are_not_taken_for_its_own(command, tmp_path):
    plugin = tmp_path / "grader.py"
    plugin.write_text("def grader(completions, **_):\n    return [1.0 for _ in completions]\n")
    rewards = {"plugins": ["./grader.py:grader"], "parts": [{"name": "grader"}], "workers": 1}
    path = write_recipe(tmp_path, small_recipe(tmp_path, prompts=2, select={}, rewards=rewards))
    assert command(path)[0] == 0
    rows = rows_of(tmp_path)
    plugin.write_text("def grader(completions, **_):\n    return [0.5 for _ in completions]\n")
    for overrides in ([], ["select.rule=best_of_n"]):
        code, _, errors = command(path, *overrides)
        assert code == 2 and len(errors.strip().splitlines()) == 1
        assert "rewards: 'grader' has changed since outputs/curation was scored; restore it, or choose another run.name" in errors
    assert rows_of(tmp_path) == rows
    code, output, _ = command(path, "run.name=anew", "select.rule=best_of_n")
    assert code == 0 and "12 scored" in output


def test_prompts_of_two_files_may_share_ids_and_max_per_prompt_has_a_reason_of_its_own(command, tmp_path):
    recipe = small_recipe(tmp_path, prompts=3, select={"rule": "all_correct", "max_per_prompt": 1})
    recipe["rewards"]["parts"][0]["options"]["pattern"] = ""
    rows = [json.loads(line) | {"prompt": f"{n}+"} for n, line in enumerate((tmp_path / "prompts.jsonl").read_text().splitlines())]
    (tmp_path / "others.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = write_recipe(tmp_path, recipe)
    code, _, errors = command(path, "experts[1].prompts.path=others.jsonl", "run.name=two")
    assert code == 0, errors
    report = json.loads((tmp_path / "outputs/two/exit.json").read_text())["result"]
    assert (report["counts"]["selected"], report["rejected"]["max_per_prompt"]) == (6, 12)
    held = list(read_rows(tmp_path / "outputs/two/curated/train.parquet"))
    assert {row["expert"] for row in held if row["prompt_id"] == "q1"} == {"one", "two"}
    rejected = list(read_rows(tmp_path / "outputs/two/curated/rejected.parquet"))
    assert {row["detail"] for row in rejected if row["reason"] == "max_per_prompt"} == {"1 of its prompt are taken"}
    code, _, errors = command(path)
    assert code == 0, errors
    one_file = result_of(tmp_path)
    assert (one_file["counts"]["selected"], one_file["rejected"]["max_per_prompt"]) == (3, 15)


def test_where_nothing_is_right_the_run_says_so(command, tmp_path):
    rewards = {"parts": [{"name": "regex", "options": {"pattern": "zzz"}}], "workers": 1}
    code, _, errors = command(write_recipe(tmp_path, small_recipe(tmp_path, prompts=2, rewards=rewards)))
    assert code == 1
    assert "no row is left: of 12 completions 0 were right" in errors


def test_the_data_set_is_read_as_it_is(command, tmp_path):
    command(write_recipe(tmp_path, small_recipe(tmp_path)))
    folder = str(tmp_path / "outputs/curation/curated")
    read = datasets.load_dataset(folder, cache_dir=str(tmp_path / "cache"))["train"]
    assert read[0]["messages"][-1]["role"] == "assistant"
    assert len(read) == len(rows_of(tmp_path))
    pairs = rows_of(tmp_path, "pairs")
    assert pairs and all(set(pair) >= {"prompt", "chosen", "rejected"} and pair["margin"] == 1.0 for pair in pairs)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["experts=[]"], "experts"),
        (["experts[0].path=./nothere"], "experts: one: policy.path: no folder 'nothere'"),
        (["experts[1].prompts.path=nothere.jsonl"], "experts: two: nothere.jsonl: no such file"),
        (["experts[0].nam=x"], "experts[0].nam: no such key; did you mean 'name'?"),
        (["experts[1].name=one"], "the name 'one' stands twice"),
        (["experts[0].since_step=3"], "since_step goes with `sampled`"),
        (["experts[0].sampled=outputs/nothere"], "experts: one: sampled: 'outputs/nothere' is no run of rl.train"),
        (["select.rule=best"], "select.rule"),
        (["rewards.parts[0].name=mth"], "no reward named 'mth'; did you mean 'math_answer'?"),
        (["clean.against={paths: [nothere.jsonl]}"], "clean.against: no file 'nothere.jsonl'"),
        (["mix={weights: {one: 1, too: 1}}"], "mix: no expert 'too'; did you mean 'two'?"),
        (["mix={weights: {one: 1}}"], "mix: 'two' has no number; give it one, or take its expert out"),
        (["mix={counts: {one: 1, two: 1}, total: 2}"], "mix: `total` goes with weights"),
        (["mix={weights: {one: 1, two: 0}}"], "mix: 'two' has 0; a weight or count is above 0"),
        (["experts[0].original=solution"], "has no text in the column 'solution'"),
        (["experts[0].prompts.columns={prompt: question}"], "no column 'question'"),
    ],
)
def test_a_mistake_is_one_line_with_code_2(command, tmp_path, overrides, message):
    path = write_recipe(tmp_path, small_recipe(tmp_path, prompts=2))
    code, _, errors = command(path, *overrides)
    assert code == 2
    assert message in errors
    assert len(errors.strip().splitlines()) == 1, errors


def test_a_dry_run_counts_what_would_be_sampled_and_writes_nothing(command, tmp_path):
    path = write_recipe(tmp_path, small_recipe(tmp_path))
    code, output, errors = command(path, "experts[1].path=outputs/later/final", "--dry-run")
    assert code == 0, errors
    assert "30 completions (3 a prompt, 180 tokens at most), by hf" in output
    assert "experts: two: policy.path: no folder 'outputs/later/final'" in output
    assert not (tmp_path / "outputs").exists()
    assert yaml.safe_load(output[: output.index("expert one:")])["run"]["name"] == "curation"


def test_two_experts_at_once_write_the_same_rows_as_one_after_the_other(command, tmp_path):
    path = write_recipe(tmp_path, small_recipe(tmp_path, prompts=4))
    command(path, "run.name=after")
    code, _, errors = command(path, "run.name=beside", "experts_at_once=2")
    assert code == 0, errors
    after, beside = (list(read_rows(tmp_path / f"outputs/{name}/curated/train.parquet")) for name in ("after", "beside"))
    assert [row | {"recipe_hash": ""} for row in after] == [row | {"recipe_hash": ""} for row in beside]


def test_asked_to_end_it_says_how_to_go_on(tmp_path):
    write_recipe(tmp_path, small_recipe(tmp_path, prompts=60))
    curation = Killed(tmp_path)
    pid = curation.start()
    while not curation.notes.read_text():
        time.sleep(0.01)
    os.kill(pid, signal.SIGTERM)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 75
    assert json.loads((tmp_path / "outputs/curation/exit.json").read_text())["code"] == 75
    completions, _ = curation.held()
    assert curation.run_for(300.0) == 0
    asked, _, _ = curation.asked_since(0)
    assert len(completions) < len(asked) == 360


@pytest.mark.slow
def test_killed_and_started_again_writes_the_same_bytes_and_repeats_nothing(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
        write_recipe(folder, small_recipe(folder, prompts=16, mix={"weights": {"one": 2, "two": 1}, "unit": "tokens"}))
    began = time.monotonic()
    assert Killed(whole).run_for(300) == 0
    taken = time.monotonic() - began
    curation = Killed(killed)
    line = 0
    for seconds in (0.5 * taken, 0.4 * taken, 0.3 * taken, 300.0):
        completions, scored = curation.held()
        code = curation.run_for(seconds)
        asked, judged, line = curation.asked_since(line)
        assert not asked & completions, "sampled again"
        assert not judged & scored, "scored again"
        assert seconds != 0.5 * taken or code is None, "the first one was to be killed"
    assert code == 0
    assert files_of(killed / "outputs/curation/curated") == files_of(whole / "outputs/curation/curated")
