"""Filters on one row: each reason by the text it is for, and by a good text that it must leave alone."""

import pytest

from data.clean_config import CleanConfig
from data.filters import FILTERS, first_objection
from data.rows import SourceRow, row_text
from data.scripts import foreign_share
from data.text import split_reasoning, words

LONG = "The first step is to count what there is, and then we add the {} apples that were bought on the way home. "


def objection(values: dict, **config) -> str | None:
    found = first_objection(row_text(SourceRow("f.jsonl", 1, values)), CleanConfig(**config))
    return found and found[0]


def completion(text: str, prompt: str = "How many?", **values) -> dict:
    return {"prompt": prompt, "completion": text, **values}


REJECTED = {
    "format": [
        {"prompt": "", "completion": "x"},
        {"prompt": "x", "completion": None},
        {"prompt": "x", "completion": " \n"},
        {"messages": []},
        {"messages": [{"role": "user", "content": "x"}]},
        {"messages": [{"role": "user", "content": 3}, {"role": "assistant", "content": "x"}]},
        {"prompt": "half \ud83d a pair", "completion": "x"},
        completion("<think>a</think>b</think>c"),
        completion("<think>a</think> "),
    ],
    "cut_off": [
        completion("The answer is 5.", finish_reason="length"),
        completion("<think>so we have"),
        completion("```python\nprint(1)"),
        completion(r"So it is \boxed{\frac{1}{2}"),
        completion(r"Hence \[ x = 5"),
        completion("There are five apples, and"),
        completion("First we add 5 +"),
        completion("It follows that the"),
    ],
    "refusal": [
        completion("I'm sorry, but I can't help with that."),
        completion("I’m sorry, but I can’t assist with this request."),
        completion("<think>hm</think>I cannot provide instructions for this."),
        completion("As an AI language model, I do not have opinions."),
        completion("I apologize, but I am unable to help."),
        completion("抱歉，我无法回答这个问题。"),
    ],
    "repetition": [
        completion("So the answer is five and we are done with it. " * 12),
        completion("".join(LONG.format(n) for n in "abcd"[:1]) + "wait let me think about that again now please " * 10 + "."),
    ],
    "mixed_language": [
        completion("We add both numbers, 因此 the result is 12."),
        completion("The answer is двенадцать, as said before, twelve."),
    ],
    "code_in_reasoning": [completion("<think>let me run it\n```python\nprint(5)\n```\nfine</think>It is 5.")],
    "long_paragraph": [completion(f"<think>{' '.join(f'w{n}' for n in range(900))}</think>It is 5.")],
}


@pytest.mark.parametrize(("reason", "values"), [(reason, row) for reason, rows in REJECTED.items() for row in rows])
def test_a_row_goes_for_its_reason(reason, values):
    assert objection(values) == reason


GOOD = [
    {"prompt": "What is 2+2?"},
    {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "47+85="}, {"role": "assistant", "content": "132"}]},
    completion("<think>7+5=12;4+8+1=13</think><answer>132</answer>", "47+85="),
    completion("a reasoning whose template opened it</think>It is 5."),
    completion("#### 72"),
    completion("The answer is **72**"),
    completion("I am sorry to hear that. The train leaves at five."),
    completion("It was written in C++"),
    completion("```python\nprint(1)\n```"),
    completion("| a | b |\n|---|---|\n" + "".join(f"| row{n} | value{n * n} |\n" for n in range(40))),
    completion("Let α and β be the roots, so α+β = π/2."),
    completion("Он сказал: двенадцать.", prompt="Переведи: he said twelve."),
    completion("答えは12です。", prompt="答えはいくつですか。"),
    completion("Das Café in Ørsted naïvely costs 5 €."),
    completion("<think>" + "\n\n".join(LONG.format(n) for n in range(3)) + "</think>It is 5."),
    completion("<think>x = 5, as `x` says</think>\n```python\nprint(5)\n```"),
]


@pytest.mark.parametrize("values", GOOD)
def test_a_good_row_passes_every_filter(values):
    assert objection(values) is None


def test_length_is_that_of_what_the_row_teaches():
    assert objection(completion("ab"), min_chars=3) == "length"
    assert objection(completion("abcd", prompt="x"), max_chars=3) == "length"
    assert objection({"prompt": "abcd"}, max_chars=3) == "length"
    assert objection(completion("abc", prompt="a long prompt"), max_chars=3) is None


def test_think_can_be_required():
    assert objection(completion("It is 5."), format="think") == "format"
    assert objection(completion("<think>a</think>It is 5."), format="think") is None


def test_what_is_switched_off_is_not_asked():
    off = {"cut_off": False, "refusals": False, "max_foreign": None, "code_in_reasoning": "keep", "max_paragraph_chars": None}
    for reason in ("refusal", "mixed_language", "code_in_reasoning", "long_paragraph"):
        assert objection(REJECTED[reason][0], **off) is None, reason
    assert objection(completion("There are five apples, and"), **off) is None


def test_a_script_can_be_made_at_home():
    assert objection(completion("We add, 因此 it is 12."), scripts=["Han"]) is None


def test_another_language_is_found_by_the_identifier_where_one_is_wanted():
    german = completion("Zuerst zählen wir alle Äpfel zusammen, danach ziehen wir die gegessenen wieder ab und erhalten fünf.")
    assert objection(german) is None
    assert objection(german, language="en") == "language"
    assert objection(completion(LONG.format("five").strip()), language="en") is None


def test_every_filter_has_a_row_that_goes_for_it():
    assert set(FILTERS) == {*REJECTED, "length", "language"}


def test_the_foreign_share_counts_letters():
    assert foreign_share("ab 因此 cd") == (2 / 6, "因此")
    assert foreign_share("αβγ", "δ") == (0.0, "")


def test_words_tell_sums_from_differences_and_leave_rules_of_tables_out():
    assert words("47+85= and 47-85 |---|") == ["47", "+", "85", "=", "and", "47", "-", "85"]
    assert words("47 × 85, 47 · 85 ÷ 5 − 1 ≠ 2 ≤ 3") == [*words("47 * 85, 47 * 85 / 5 - 1"), "≠", "2", "≤", "3"]
    assert words("47×85") == words("47*85") != words("47÷85") == words("47/85")
    assert words("Ｆｕｌｌ ｗｉｄｔｈ") == ["full", "width"]
    assert words("因此x") == ["因", "此", "x"]


@pytest.mark.parametrize(
    ("text", "parts"),
    [("<think>a</think>b", ("a", "b")), ("a</think>b", ("a", "b")), ("b", (None, "b")), ("<think>a", ("a", ""))],
)
def test_a_reasoning_ends_where_it_says(text, parts):
    assert split_reasoning(text) == parts
