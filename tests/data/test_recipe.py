"""The recipe reader: YAML by its 1.2 rules, overrides, and one line with file, place and way out for each mistake."""

from pathlib import Path
from typing import Any, Literal

import pytest

from data.recipe import InputError, Section, nearest, parse, read_recipe, resolved_yaml


class Part(Section):
    name: Literal["first", "second"] = "first"
    weight: float = 1.0


class Learner(Section):
    lr: float = 1e-3
    steps: int = 60
    schedule: Literal["constant", "linear"] = "constant"
    betas: tuple[float, float] = (0.9, 0.999)


class Recipe(Section):
    learner: Learner = Learner()
    parts: list[Part] = [Part()]
    note: str | None = None
    extra: Part | None = None


@pytest.fixture
def read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)

    def read(text: str, *overrides: str) -> Recipe:
        Path("r.yaml").write_text(text)
        return read_recipe("r.yaml", overrides, Recipe)

    return read


def mistakes(read: Any, text: str, *overrides: str) -> list[str]:
    with pytest.raises(InputError) as caught:
        read(text, *overrides)
    return str(caught.value).split("\n")


# --- YAML -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", ["no", "No", "on", "off", "yes", "y", "1_000", "0x1f", "12:30", "2026-11-22", "1.2.3"])
def test_what_yaml_1_1_would_convert_is_a_word(read: Any, word: str) -> None:
    assert read(f"note: {word}").note == word
    assert read("learner: {}", f"note={word}").note == word


@pytest.mark.parametrize("number", ["1e-4", "1E-4", "1.0e-4", ".0001", "0.0001"])
def test_a_number_is_one_in_a_file_and_in_an_override(read: Any, number: str) -> None:
    assert read(f"learner: {{lr: {number}}}").learner.lr == 1e-4
    assert read("learner: {}", f"learner.lr={number}").learner.lr == 1e-4


def test_null_and_booleans_are_those_of_yaml_1_2(read: Any) -> None:
    assert read("note: ~").note is None
    assert read("note: null").note is None
    assert mistakes(read, "note: true") == ["r.yaml:1: note: true should be a valid string"]


def test_a_text_is_no_number(read: Any) -> None:
    assert mistakes(read, 'learner: {steps: "60"}') == ['r.yaml:1: learner.steps: "60" should be a valid integer']
    assert mistakes(read, "learner: {steps: 60.5}")[0].startswith("r.yaml:1: learner.steps: 60.5 should be a valid integer")


def test_a_list_is_a_tuple_of_its_length(read: Any) -> None:
    assert read("learner: {betas: [0.9, 0.99]}").learner.betas == (0.9, 0.99)
    assert mistakes(read, "learner: {betas: [0.9]}")[0].startswith("r.yaml:1: learner.betas[1]: missing")


# --- mistakes ---------------------------------------------------------------------------------------------------------


def test_a_mistyped_key_has_its_line_and_the_nearest_name(read: Any) -> None:
    text = "learner:\n  steps: 5\n  stps: 6\nprats: []\n"
    assert mistakes(read, text) == [
        "r.yaml:3: learner.stps: no such key; did you mean 'steps'?",
        "r.yaml:4: prats: no such key; did you mean 'parts'?",
    ]


def test_a_key_that_is_near_to_none_gets_the_list(read: Any) -> None:
    assert mistakes(read, "xyz: 1") == ["r.yaml:1: xyz: no such key; known: extra, learner, note, parts"]


def test_a_wrong_value_in_a_list_has_its_place_and_line(read: Any) -> None:
    text = "parts:\n  - name: first\n  - name: secnd\n    weight: much\n"
    assert mistakes(read, text) == [
        "r.yaml:3: parts[1].name: \"secnd\" should be 'first' or 'second'; did you mean 'second'?",
        'r.yaml:4: parts[1].weight: "much" should be a valid number',
    ]


def test_a_mistake_in_an_override_names_the_override(read: Any) -> None:
    assert mistakes(read, "learner: {}", "learner.stps=5") == [
        "override 'learner.stps=5': learner.stps: no such key; did you mean 'steps'?"
    ]
    assert mistakes(read, "learner: {steps: 5}", "learner.steps=many") == [
        "override 'learner.steps=many': learner.steps: \"many\" should be a valid integer"
    ]


def test_a_key_that_stands_twice_is_a_mistake(read: Any) -> None:
    text = "learner:\n  lr: 1\n  steps: 2\n  lr: 3\n"
    assert mistakes(read, text) == ["r.yaml:4: learner.lr: stands twice, first in line 2"]
    assert mistakes(read, "note: a\nlearner: {}\nnote: b\n") == ["r.yaml:3: note: stands twice, first in line 1"]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("learner: {lr: 1", "r.yaml:1: not valid YAML: "),
        ("a: 1\n\tb: 2", "r.yaml:2: not valid YAML: "),
        ("- a list", "r.yaml: a recipe is a mapping of sections, this file holds list"),
        ("", "r.yaml: a recipe is a mapping of sections, this file holds NoneType"),
        ("learner: 5", "r.yaml:1: learner: 5 "),
        ("learner: {1: x}", "r.yaml:1: learner: a key is text, not 1; quote it if it is meant"),
        ("note: x\n? [a]\n: b\n", "r.yaml:2: a key is text, not a list or mapping"),
        ("parts: &all\n  - *all\n", "r.yaml:1: parts[0]: holds itself"),
        ("note: !!python/object:os.system x", "r.yaml:1: not valid YAML: could not determine a constructor"),
    ],
)
def test_what_is_no_recipe_is_one_line(read: Any, text: str, line: str) -> None:
    (found,) = mistakes(read, text)
    assert found.startswith(line)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.yaml: cannot read this recipe: No such file or directory"):
        read_recipe(tmp_path / "none.yaml", [], Recipe)
    (tmp_path / "latin.yaml").write_bytes("note: é".encode("latin-1"))
    with pytest.raises(InputError, match=r"latin\.yaml: not UTF-8 text: .* at byte 6"):
        read_recipe(tmp_path / "latin.yaml", [], Recipe)


def test_nearest_suggests_only_what_is_near() -> None:
    assert nearest("stps", ["steps", "lr"]) == "; did you mean 'steps'?"
    assert nearest("qqq", ["steps", "lr"]) == "; known: lr, steps"
    assert nearest("qqq", []) == ""


# --- overrides --------------------------------------------------------------------------------------------------------


def test_overrides_reach_into_sections_and_lists(read: Any) -> None:
    text = "learner: {lr: 1.0}\nparts: [{name: first}, {name: second, weight: 2.0}]"
    recipe = read(text, "learner.steps=7", "parts[1].weight=0.5", "parts[0].name=second", "note=a=b")
    assert (recipe.learner.lr, recipe.learner.steps) == (1.0, 7)
    assert [(part.name, part.weight) for part in recipe.parts] == [("second", 1.0), ("second", 0.5)]
    assert recipe.note == "a=b"


def test_an_override_makes_a_section_or_replaces_it(read: Any) -> None:
    assert read("note: x", "learner.lr=0.5").learner.lr == 0.5
    assert read("extra: null", "extra.weight=3").extra == Part(weight=3.0)
    assert read("note: x", "parts=[{name: second}, {weight: 2}]").parts == [Part(name="second"), Part(weight=2.0)]
    assert read("extra: {weight: 3}", "extra=null").extra is None
    assert read("learner: {lr: 1}", "learner.lr=2", "learner.lr=3").learner.lr == 3.0, "the last one counts"


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("learner.lr", "override 'learner.lr': an override is section.key=value"),
        ("=5", "override '=5': an override is section.key=value"),
        ("learner..lr=5", "override 'learner..lr=5': an override is section.key=value"),
        ("note={", "override 'note={': the value is not valid YAML: "),
        ("parts[2].weight=1", "override 'parts[2].weight=1': nothing to set at '2': the recipe has a list of 1 there"),
        ("note.deeper=1", "override 'note.deeper=1': nothing to set at 'deeper': the recipe has 'x' there"),
    ],
)
def test_an_override_that_cannot_be_is_one_line(read: Any, override: str, line: str) -> None:
    (found,) = mistakes(read, "note: x\nparts: [{name: first}]", override)
    assert found.startswith(line)


# --- values -----------------------------------------------------------------------------------------------------------


def test_the_resolved_recipe_reads_back_as_the_same(read: Any) -> None:
    recipe = read("learner: {lr: 1e-4, betas: [0.9, 0.95]}\nnote: 'no'\nparts: [{name: second}]", "extra.weight=1e-7")
    text = resolved_yaml(recipe)
    assert read(text) == recipe
    assert "steps: 60" in text, "defaults are filled in"
    assert read(resolved_yaml(read("note: 'a: é # b'"))).note == "a: é # b"


def test_plain_values_are_parsed_under_a_name() -> None:
    assert parse({"learner": {"lr": 1}}, Recipe, "here").learner.lr == 1.0
    with pytest.raises(InputError, match=r"^here: learner\.lr: \"x\" should be a valid number$"):
        parse({"learner": {"lr": "x"}}, Recipe, "here")


def test_a_recipe_is_not_changed_after_it_is_read(read: Any) -> None:
    with pytest.raises(ValueError, match="frozen"):
        read("note: x").note = "y"


def test_a_recipe_of_another_command_is_one_line(read: Any) -> None:
    (line,) = mistakes(read, "sft: {steps: 3}\ndata: {path: x}\nlearner: {lr: 0.1}")
    assert line.startswith("r.yaml: has the sections sft, data, and those here are learner, parts, note, extra: is it a recipe of another")
    assert len(mistakes(read, "lerner: {steps: 3}\npart: []")) == 2, "two that are mistyped are two mistakes"
