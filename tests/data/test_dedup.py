"""Dedup: planted copies are found, templates are left alone, the best of a cluster stays, and every claim is an exact Jaccard."""

import json
import random
from pathlib import Path

import pytest

from data.clean_config import NearConfig
from data.dedup import Duplicate, best_of
from data.rows import RowText, SourceRow, row_text
from data.text import words


def prompt(text: str, gold: str | None = None, completion: str | None = None) -> RowText:
    return RowText(text[:8], text, completion, gold)


def duplicates(tmp_path: Path, *rows: RowText, exact: bool = True, **near) -> dict[int, Duplicate]:
    return best_of(rows, exact, NearConfig(**near), tmp_path)


def changed(text: str, rng: random.Random) -> str:
    """Three words that hold no digit are others."""
    found = text.split()
    places = [place for place, word in enumerate(found) if not any(character.isdigit() for character in word)]
    for place in rng.sample(places, 3):
        found[place] = "".join(rng.choices("abcdefgh", k=6))
    return " ".join(found)


def gsm8k(test_data: Path, count: int) -> list[dict]:
    """Problems that 3 changed words leave similar: at least 20 words, no other alike."""
    with (test_data / "gsm8k" / "train.jsonl").open() as file:
        rows = [json.loads(line) for line in file]
    return [row for row in rows if len(row["question"].split()) >= 24][:count]


def bigrams(text: str) -> set[str]:
    """Counted pairs of words, apart from the code under test."""
    found, seen, pairs = words(text), {}, set()
    for pair in zip(found, found[1:], strict=False):
        seen[pair] = seen.get(pair, 0) + 1
        pairs.add((pair, seen[pair]))
    return pairs


def test_planted_copies_are_all_found_and_nothing_else_is(test_data, tmp_path):
    rng = random.Random(0)
    rows = gsm8k(test_data, 1_000)
    planted: list[tuple[dict, int, str]] = []
    for number in range(0, 300, 3):
        question = rows[number]["question"]
        sentences = question.split(". ")
        planted.append((rows[number] | {"question": f"  {question}\n"}, number, "exact_duplicate"))
        if len(sentences) > 1:
            planted.append((rows[number] | {"question": ". ".join(reversed(sentences))}, number, "near_duplicate"))
        planted.append((rows[number] | {"question": changed(question, rng)}, number, "near_duplicate"))
    everything = rows + [row for row, _, _ in planted]
    texts = [row_text(SourceRow("f", n, row)) for n, row in enumerate(everything)]
    found = best_of(texts, True, NearConfig(), tmp_path)
    for place, (_, original, reason) in enumerate(planted, start=len(rows)):
        assert place in found, everything[place]
        assert (found[place].of, found[place].reason) == (original, reason)
    assert [everything[index]["question"] for index in found if index < len(rows)] == []
    for index, duplicate in found.items():
        ours, theirs = bigrams(everything[index]["question"]), bigrams(everything[duplicate.of]["question"])
        assert duplicate.similarity == pytest.approx(len(ours & theirs) / len(ours | theirs))


def test_a_record_with_three_words_changed_is_found_without_a_gold_answer(test_data, tmp_path):
    rng = random.Random(1)
    rows = [row for row in gsm8k(test_data, 1_000) if len(f"{row['question']} {row['answer']}".split()) >= 80][:300]
    texts = [RowText(str(n), row["question"], row["answer"], None) for n, row in enumerate(rows)]
    copies = [RowText("c", changed(text.prompt, rng), text.completion, None) for text in texts[:100]]
    found = best_of([*texts, *copies], True, NearConfig(), tmp_path)
    assert {index: duplicate.of for index, duplicate in found.items()} == {300 + n: n for n in range(100)}


NAMES = ["Ann", "Ben", "Cleo", "Dan", "Eve", "Finn", "Gus", "Hana", "Ida", "Jon", "Kim", "Leo"]
ITEMS = ["apples", "books", "coins", "dates", "eggs", "figs", "grapes", "hats", "inks", "jars"]
TEMPLATES = [
    "{a} has {x} {i} and buys {y} more. {b} takes {z} of them. How many {i} does {a} have now?",
    "A box holds {x} {i}. {a} fills {y} boxes and {b} empties {z} of them. How many {i} are left in the boxes?",
    "{a} and {b} share {x} {i} equally, then {a} loses {y}. How many {i} must {b} give so that both have {z}?",
    "You are a careful assistant. Read the question, think step by step, and give nothing but the answer in the last line of your"
    " reply, without any words around it. Question: does {a} or {b} own more {i} if the first one owns {x} and the other {y}?",
    "{a} is taller than {b}. {b} is taller than {c}. {c} is taller than {d}. Who of the four is the {e} tallest?",
]


def templated(count: int, seed: int) -> dict[str, str]:
    """Text -> its gold answer: a number, or a name where names alone fill the places."""
    rng = random.Random(seed)
    texts: dict[str, str] = {}
    while len(texts) < count:
        a, b, c, d = rng.sample(NAMES, 4)
        x, y, z = rng.sample(range(2, 400), 3)
        values = {"a": a, "b": b, "c": c, "d": d, "x": x, "y": y, "z": z, "i": rng.choice(ITEMS), "e": rng.choice(["first", "second"])}
        number = len(texts) % len(TEMPLATES)
        texts[TEMPLATES[number].format(**values)] = str((x + y - z, x * y - z, x - y + z, a, a)[number])
    return texts


@pytest.mark.parametrize("gold", [True, False])
def test_a_thousand_rows_that_share_only_templates_all_stay(gold, tmp_path):
    rows = [prompt(text, answer if gold else None) for text, answer in templated(1_000, seed=3).items()]
    assert duplicates(tmp_path, *rows) == {}


def test_the_same_pairs_of_words_in_another_order_are_another_text_and_other_punctuation_is_not(tmp_path):
    a = "Ann is taller than Ben. Ben is taller than Cleo. Cleo is taller than Dan. Who is the tallest?"
    b = "Ann is taller than Cleo. Cleo is taller than Ben. Ben is taller than Dan. Who is the tallest?"
    assert bigrams(a) == bigrams(b)
    found = duplicates(tmp_path, prompt(a), prompt(b), prompt(a.replace(". ", "; ")))
    assert {index: (duplicate.of, duplicate.similarity) for index, duplicate in found.items()} == {2: (0, 1.0)}


def test_one_long_instruction_with_another_word_in_each_row_is_no_copy(tmp_path):
    words_of = [f"{first}{second}" for first in ("ba", "de", "fi", "go", "hu") for second in "klmnprstvwxz"]
    rows = [prompt(TEMPLATES[3].split("Question")[0] + f"Question: what is the capital of {name}land?") for name in words_of]
    assert len(rows) == 60 and duplicates(tmp_path, *rows) == {}


def test_other_numbers_or_signs_make_another_problem(tmp_path):
    text = "A train leaves at {} and goes {} miles an hour until it meets the other train that left the station before it did"
    rows = [prompt(text.format(5, 60)), prompt(text.format(6, 60)), prompt("47+85="), prompt("47-85="), prompt("85-47=")]
    assert duplicates(tmp_path, *rows) == {}


def test_other_gold_answers_make_another_problem_and_the_same_one_needs_less_similarity(tmp_path):
    a = "A farmer keeps white hens and brown hens in a yard behind the old house, and every hen lays an egg on most days"
    b = "A farmer keeps white ducks and brown ducks in a yard behind the new house, and every hen lays an egg on most days"
    assert duplicates(tmp_path, prompt(a, "12"), prompt(b, "13")) == {}
    assert duplicates(tmp_path, prompt(a), prompt(b)) == {}
    assert duplicates(tmp_path, prompt(a, "12"), prompt(b, "12"))[1].reason == "near_duplicate"


def test_other_answers_to_one_long_prompt_are_no_copies(tmp_path):
    question = " ".join(f"word{'abcdefghij'[n % 10]}{'klmnopqrst'[n // 10]}" for n in range(90))
    rows = [prompt(question, None, "Add both numbers and halve."), prompt(question, None, "Draw a triangle, then measure it.")]
    assert duplicates(tmp_path, *rows) == {}


def test_repeated_words_count(tmp_path):
    assert (
        duplicates(
            tmp_path,
            prompt("Let f be odd. Is f(f(x)) odd?", "odd"),
            prompt("Let f be odd. Is f(f(f(f(f(x))))) odd?", "odd"),
            same_answer=0.8,
        )
        == {}
    )


def test_the_best_of_a_cluster_stays_and_then_the_first(tmp_path):
    from data.dedup import Dedup

    row = prompt("the same text of some words")
    with Dedup(True, NearConfig(), tmp_path) as dedup:
        for quality in (0.0, 1.0, 1.0):
            dedup.add(row, quality)
        found = dedup.duplicates()
    assert {index: duplicate.of for index, duplicate in found.items()} == {0: 1, 2: 1}


def test_a_row_goes_only_for_one_that_stays_and_is_similar_to_it(tmp_path):
    # a ~ b ~ c, but a and c are too far apart: b goes for a, and c stays.
    base = [f"w{'abcdefghijklmnopqrstuvwxyz'[n % 26]}{'xyz'[n // 26]}" for n in range(60)]
    b, c = list(base), list(base)
    b[10] = b[20] = "new"
    c[10] = c[20] = "new"
    c[30] = c[40] = c[50] = "newer"
    rows = [prompt(" ".join(found)) for found in (base, b, c)]
    found = duplicates(tmp_path, *rows, threshold=0.8)
    assert {index: duplicate.of for index, duplicate in found.items()} == {1: 0}


def test_without_near_only_the_same_text_is_a_duplicate(tmp_path):
    rows = [prompt("A b  c"), prompt("A b c"), prompt("A b c d")]
    assert {k: v.reason for k, v in best_of(rows, True, None, tmp_path).items()} == {1: "exact_duplicate"}
    assert best_of(rows, False, None, tmp_path) == {}


def test_dedup_leaves_no_file_and_takes_no_rows_at_all(tmp_path):
    assert best_of([], True, NearConfig(), tmp_path) == {}
    duplicates(tmp_path, prompt("a b c"), prompt("a b c"), prompt("?!"), prompt("?!."))
    assert list(tmp_path.iterdir()) == []


def test_few_pairs_of_rows_from_templates_are_compared(tmp_path):
    # What is in many rows proposes no candidates: the number of pairs that are compared stays far below that of all pairs.
    from data.near import NearDuplicates

    compared = 0

    class Counting(NearDuplicates):
        def similarity(self, a: int, b: int) -> float | None:
            nonlocal compared
            compared += 1
            return super().similarity(a, b)

    with Counting(NearConfig(), tmp_path) as near:
        for text in templated(3_000, seed=9):
            near.add(words(text), None, None)
        assert near.copies([0.0] * 3_000) == {}
    assert compared < 0.02 * 3_000 * 3_000 / 2
