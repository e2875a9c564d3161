"""The rewards section: every mistake in it is one line, before any reward function is imported."""

import subprocess
import sys
from pathlib import Path

import pytest

from data.recipe import InputError, Section, parse
from rewards.config import RewardsConfig
from rewards.versions import reward_versions

CHECKOUT = Path(__file__).resolve().parents[2]


class Recipe(Section):
    rewards: RewardsConfig


def mistake(rewards: dict) -> str:
    with pytest.raises(InputError) as caught:
        parse({"rewards": rewards}, Recipe, "x.yaml")
    return str(caught.value)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text("raise SystemExit('not to be run when a recipe is read')\ndef brevity(completions, **kwargs): ...\n")
    Path("broken.py").write_text("def brevity(:\n")
    return tmp_path


PART = {"name": "math_answer"}


@pytest.mark.parametrize(
    ("rewards", "line"),
    [
        ({"parts": [{"name": "mth"}]}, "x.yaml: rewards.parts[0].name: no reward named 'mth'; did you mean 'math_answer'?"),
        ({"parts": [{"name": "regex"}]}, "x.yaml: rewards.parts[0]: regex needs the option 'pattern'"),
        (
            {"parts": [{"name": "math_answer", "requires": "think"}]},
            "x.yaml: rewards.parts[0].requires: no reward named 'think'; did you mean 'think_format'?",
        ),
        (
            {"parts": [PART, PART]},
            "x.yaml: rewards.parts[1].name: 'math_answer' stands twice; a part is scored once, or give one an alias",
        ),
        ({"parts": [{**PART, "weight": 0}]}, "x.yaml: rewards.parts: every part has weight 0, so nothing would be judged"),
        (
            {"parts": [{**PART, "clip": [1, 0]}]},
            "x.yaml: rewards.parts[0].clip: the lower bound 1 is above the upper bound 0",
        ),
        (
            {"parts": [{**PART, "alias": "think_format"}]},
            "x.yaml: rewards.parts[0].alias: 'think_format' is a reward function; choose another alias",
        ),
        (
            {"parts": [PART], "route": {"column": "domain", "parts": {"math": ["math_answr"]}}},
            "x.yaml: rewards.route.parts.math[0]: no part is called 'math_answr'; did you mean 'math_answer'?",
        ),
        (
            {
                "parts": [PART, {"name": "think_format", "weight": 0}],
                "route": {"column": "d", "parts": {"a": ["math_answer"], "b": []}},
            },
            "x.yaml: rewards.route.parts.b: no part with a weight would judge these rows",
        ),
        ({"parts": [PART], "shadow": [PART]}, "x.yaml: rewards.shadow[0].name: 'math_answer' stands twice; "),
        ({"parts": [PART], "shadow": [{"name": "think_format", "weight": 1}]}, "x.yaml: rewards.shadow[0].weight: 1 should be 0"),
        (
            {"parts": [{**PART, "options": {"tol": 1}}]},
            "x.yaml: rewards.parts[0].options.tol: math_answer has no option 'tol'",
        ),
        (
            {"plugins": ["./mine.py:brevit"], "parts": [PART]},
            "x.yaml: rewards.plugins[0]: ./mine.py has no function 'brevit'; did you mean 'brevity'?",
        ),
        ({"plugins": ["broken.py:brevity"], "parts": [PART]}, "x.yaml: rewards.plugins[0]: broken.py:1: not valid Python: "),
        ({"plugins": ["no.py:brevity"], "parts": [{"name": "brevity"}]}, "x.yaml: rewards.plugins[0]: no file 'no.py' "),
        (
            {"plugins": ["no_pkg.mod:f"], "parts": [PART]},
            "x.yaml: rewards.plugins[0]: no module 'no_pkg.mod' ('no_pkg' is not found;",
        ),
        (
            {"plugins": ["brevity"], "parts": [PART]},
            "x.yaml: rewards.plugins[0]: no entry point 'brevity' in the group cohort.rewards",
        ),
    ],
)
def test_a_mistake_is_one_line_with_its_place_and_the_way_out(folder, rewards, line):
    said = mistake(rewards)
    assert said.startswith(line) and "\n" not in said


def test_a_judge_has_time_for_its_retries_unless_told_and_no_less_than_a_request_takes():
    options = {"url": "http://127.0.0.1/v1", "model": "m"}
    config = RewardsConfig.model_validate({"parts": [PART, {"name": "judge", "options": options}]})
    assert [part.limit_s for part in config.parts] == [30.0, 600.0]
    waits = 5 * 30.0  # five retries, each after the half minute that a busy server asks for
    assert config.parts[1].limit_s >= 6 * 60.0 + waits
    assert mistake({"parts": [{"name": "judge", "timeout_s": 30, "options": options}]}) == (
        "x.yaml: rewards.parts[0].timeout_s: timeout_s 30 is less than one request may take (request_s 60); raise it, or lower request_s"
    )
    RewardsConfig.model_validate({"parts": [{"name": "judge", "timeout_s": 30.0, "options": {**options, "request_s": 20.0}}]})


def test_a_plugin_is_checked_without_being_run(folder):
    config = RewardsConfig.model_validate({"plugins": ["./mine.py:brevity"], "parts": [{"name": "brevity"}]})
    assert config.functions()["brevity"].source == "./mine.py"


@pytest.mark.parametrize("later", ["brevity = adapt(brevity)", "from elsewhere import brevity", "if adapt:\n    brevity = adapt(brevity)"])
def test_a_function_whose_name_is_bound_again_is_judged_when_it_is_loaded(folder, later):
    Path("adapted.py").write_text(f"def brevity(text):\n    return len(text)\n{later}\n")
    RewardsConfig.model_validate({"plugins": ["./adapted.py:brevity"], "parts": [{"name": "brevity"}]})
    Path("adapted.py").write_text("def brevity(text):\n    return len(text)\n")
    assert "brevity takes no **kwargs" in mistake({"plugins": ["./adapted.py:brevity"], "parts": [{"name": "brevity"}]})


def test_an_optional_import_of_what_is_not_there_is_no_part_of_a_version(folder):
    Path("guarded.py").write_text(
        "import data.recipe\ntry:\n    from data.tables import X\nexcept ImportError:\n    X = None\ndef brevity(**kwargs): ...\n"
    )
    config = RewardsConfig.model_validate({"plugins": ["./guarded.py:brevity"], "parts": [{"name": "brevity"}]})
    version = reward_versions(config)["brevity"]
    assert len(version) == 12
    Path("guarded.py").unlink()
    with pytest.raises(ValueError, match=r"no file '\./guarded\.py'"):
        reward_versions(config)


def test_a_function_stands_twice_under_an_alias_and_a_route_chooses_parts():
    parts = [PART, {"name": "think_format", "alias": "format", "weight": 0.1}, {"name": "think_format", "weight": 0}]
    route = {"column": "domain", "parts": {"math": ["math_answer"], "chat": ["format"]}}
    config = RewardsConfig.model_validate({"parts": parts, "route": route})
    assert {key: plugin.function for key, plugin in config.functions().items()} == {
        "math_answer": "math_answer", "format": "think_format", "think_format": "think_format",
    }  # fmt: skip
    assert [part.key for part in config.parts_for({"domain": "math"})] == ["math_answer", "think_format"]
    assert [part.key for part in config.parts_for({"domain": "chat"})] == ["format", "think_format"]
    with pytest.raises(ValueError, match="a row has domain = 'law', and routes are known for math, chat"):
        config.parts_for({"domain": "law"})


def test_importing_rewards_loads_nothing_heavy():
    code = "import rewards, rewards.config, sys; print({'torch', 'vllm', 'math_verify', 'asyncio', 'sympy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
