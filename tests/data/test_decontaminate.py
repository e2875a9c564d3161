"""Decontamination: what is planted is found, with the text that matched; a turn of phrase is no leak; the allow-list takes back."""

import json
from pathlib import Path

import pytest

from data.clean_config import AgainstConfig
from data.decontaminate import Decontaminator, Hit
from data.recipe import InputError
from data.rows import RowText, SourceRow, row_text

LONG = "Natalia sold clips to forty eight of her friends in April, and then she sold half as many clips in May."
SHORT = "Evaluate $\\log_2 (4^2)$."


def evaluation(tmp_path: Path, *prompts: str) -> str:
    path = tmp_path / "evaluation.jsonl"
    path.write_text("".join(json.dumps({"question": text}) + "\n" for text in prompts))
    return str(path)


def hits(tmp_path: Path, text: str, *prompts: str, completion: str | None = None, **config) -> list[Hit]:
    against = AgainstConfig(paths=[evaluation(tmp_path, *prompts)], **config)
    return Decontaminator(against).hits(RowText("row", text, completion, None))


@pytest.mark.parametrize(
    "text",
    [LONG, LONG.upper(), f"Here is a problem for you. {LONG} Say why, in your own words.", LONG.replace(",", " ,").replace(" ", "\n")],
)
def test_a_prompt_is_found_whole_reformatted_and_inside_a_longer_text(text, tmp_path):
    (hit,) = hits(tmp_path, text, "Another question about something that nobody asks, ever, in any place.", LONG)
    assert (hit.coverage, hit.part, hit.allowed) == (1.0, "prompt", False)
    assert hit.evaluation.endswith("evaluation.jsonl:2") and hit.evaluation_text == LONG
    assert hit.matched == LONG.lower().replace(",", "").rstrip(".")


def test_a_completion_is_looked_at_too(tmp_path):
    (hit,) = hits(tmp_path, "Tell me a story.", LONG, completion=f"Gladly. {LONG}")
    assert hit.part == "completion"


@pytest.mark.parametrize(
    "text", [SHORT, "  evaluate $\\log_2(4^2)$ ", f"Do this by hand.\n{SHORT}\nShow your work.", f"Now. {SHORT} Fine."]
)
def test_a_short_prompt_is_found_whole_or_as_a_sentence(text, tmp_path):
    (hit,) = hits(tmp_path, text, SHORT)
    assert (hit.coverage, hit.matched) == (1.0, "evaluate log 2 4 ^ 2")


@pytest.mark.parametrize(
    "text",
    [
        "Question: What is 47+85?\nAnswer:",
        "Q: What is 47+85?",
        "Question 3: What is 47+85?",
        "Work it out. 3. What is 47+85?",
        "(3) What is 47+85? Say why.",
        "**Problem 2:** What is 47+85?",
        "Instruction: What is\n47+85?",
    ],
)
def test_a_label_is_no_part_of_a_short_prompt(text, tmp_path):
    (hit,) = hits(tmp_path, text, "What is 47+85?")
    assert hit.matched == "what is 47 + 85"


def test_a_label_that_the_evaluation_has_too_is_found(tmp_path):
    assert len(hits(tmp_path, "Now. Q: What is 47+85? Go.", "Q: What is 47+85?")) == 1
    assert hits(tmp_path, "Question: What is 47+85+1?", "What is 47+85?") == []
    assert hits(tmp_path, "3.5 What is 47+85?", "What is 47+85?") == []


def test_a_short_prompt_within_a_sentence_that_goes_on_is_another_problem(tmp_path):
    assert hits(tmp_path, "Evaluate $\\log_2 (4^2) + \\log_3 (9)$.", SHORT) == []
    assert hits(tmp_path, "Evaluate $\\log_2 (8^2)$.", SHORT) == []


def test_coverage_counts_the_evaluation_prompts_ngrams(tmp_path):
    # 20 words have 13 8-grams; the first 13 words hold 6 of them.
    words = [f"w{letter}" for letter in "abcdefghijklmnopqrst"]
    prompt, part = " ".join(words), " ".join(words[:13]) + " and nothing more of it"
    assert hits(tmp_path, part, prompt, coverage=0.5) == []
    (hit,) = hits(tmp_path, part, prompt, coverage=0.46)
    assert hit.coverage == pytest.approx(6 / 13)
    assert hit.matched == " ".join(words[:13])


def test_a_phrase_that_all_use_is_no_hit(tmp_path):
    phrase = "Express your answer as a common fraction in lowest terms."
    prompt = f"A fair die is thrown three times in a row. What is the probability of no six at all? {phrase}"
    assert hits(tmp_path, f"What share of the cards in this deck are black and not a king? {phrase}", prompt) == []


def test_the_allow_list_takes_back_a_row_and_a_phrase(tmp_path):
    allow = tmp_path / "allow.txt"
    allow.write_text("# known\nevaluation.jsonl:1\n")
    (hit,) = hits(tmp_path, LONG, LONG, allow=str(allow))
    assert hit.allowed
    allow.write_text(LONG + "\n")
    assert hits(tmp_path, LONG, LONG, "Another question that is long enough to have n-grams of its own.", allow=str(allow)) == []
    half = " ".join(LONG.split()[:14])
    allow.write_text(half + "\n")
    assert hits(tmp_path, half + " and so on", LONG, allow=str(allow)) == []


def test_every_hit_is_reported_and_one_that_is_not_allowed_comes_first(tmp_path):
    allow = tmp_path / "allow.txt"
    allow.write_text("evaluation.jsonl:1\n")
    other = "Weng earns twelve dollars an hour for babysitting and yesterday she did fifty minutes of it."
    found = hits(tmp_path, f"{LONG} {other}", LONG, other, allow=str(allow))
    assert [(hit.allowed, hit.evaluation[-1]) for hit in found] == [(False, "2"), (True, "1")]


def test_an_evaluation_file_without_prompts_is_refused(tmp_path):
    with pytest.raises(InputError, match="no evaluation prompts"):
        Decontaminator(AgainstConfig(paths=[evaluation(tmp_path)]))
    with pytest.raises(InputError, match="no such file"):
        Decontaminator(AgainstConfig(paths=[str(tmp_path / "nothing.jsonl")]))


def test_all_planted_contamination_is_found_in_real_text(test_data):
    """Every prompt of MATH-500 and a part of GSM8K's test set: as it is, and inside a longer text."""
    math, gsm = test_data / "math500" / "test.jsonl", test_data / "gsm8k" / "test.jsonl"
    decontaminator = Decontaminator(AgainstConfig(paths=[str(math), str(gsm)]))
    with math.open() as file, gsm.open() as other:
        prompts = [(f"{math}:{n}", json.loads(line)["problem"]) for n, line in enumerate(file, 1)]
        prompts += [(f"{gsm}:{n}", json.loads(line)["question"]) for n, line in enumerate(other, 1) if n % 10 == 0]
    for place, text in prompts:
        for planted in (text, f"Please solve this.\n{text}\nExplain each step."):
            found = decontaminator.hits(row_text(SourceRow("f", 1, {"prompt": planted})))
            assert place in [hit.evaluation for hit in found if hit.coverage == 1.0], planted
