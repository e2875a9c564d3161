"""The rule-based rewards, by hand."""

import json
import sqlite3

import pytest

from rewards.choice_letter import choice_letter
from rewards.countdown import countdown
from rewards.exact_text import exact_text
from rewards.instruction_constraints import instruction_constraints
from rewards.instruction_kinds import KINDS
from rewards.json_schema import json_schema
from rewards.language_consistency import language_consistency
from rewards.length import by_group, cosine, length, soft_overlong
from rewards.pattern import regex
from rewards.repetition import repetition
from rewards.sql_result import sql_result
from rewards.tag_count import tag_count


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("<think>A or B?</think>B", 1.0),
        (r"so \boxed{\text{(B)}}", 1.0),
        ("<answer>(B)</answer>", 1.0),
        ("B) because A is too small", 1.0),
        ("The answer is **B**.", 1.0),
        ("The correct option is (B), as said.", 1.0),
        ("Answer: B", 1.0),
        ("Answer: A", 0.0),
        ("Answer: A or B", 0.0),
        ("B. or C", 0.0),
        ("Bananas", 0.0),
        ("<think>B", 0.0),
        ("A B C D", 0.0),
        ("The answer is a", 0.0),
        ("The answer is (B). Option A is wrong because it is too small.", 1.0),
        ("The answer is B. Choice A is incorrect.", 1.0),
        ("The answer is option B. Option A is wrong.", 1.0),
        ("So the answer is B, not option D.", 1.0),
        ("So the answer is D, not option B.", 0.0),
        ("The answer is A. No: the answer is B.", 1.0),
        ("Option A is wrong, option B is not.", 0.0),
        ("The answer is **option B**.", 1.0),
        ("The answer is: **(B)**. Answer choice A is wrong.", 1.0),
        ("The answer I found is option B.", 1.0),
        ("I choose answer choice B.", 1.0),
        ("Answer choice B is wrong because x. Option C is right.", 0.0),
        ("Looking at answer choice B, it fails. The right one is option C.", 0.0),
        ("The answer B is wrong, so I choose option C.", 0.0),
        ("Answer choice A is wrong. The answer is B.", 1.0),
        ("The answer is" + " " * 50000 + "b", 0.0),
    ],
)
def test_choice_letter_wants_one_letter(text, reward):
    assert choice_letter(["q"], [text], answer=["B"]) == [reward]


def test_choice_letter_takes_gold_as_the_text_of_a_choice():
    assert choice_letter(["q"] * 2, ["C", "B"], answer=["red"] * 2, choices=[["blue", "green", "red"]] * 2) == [1.0, 0.0]
    assert choice_letter(["q"], ["C"], answer=["black"], choices=[["blue", "red"]]) == [None]
    assert choice_letter(["q"], ["C"]) == [None]


def test_exact_text_evens_spaces_and_case():
    texts = ["<think>Rome</think>  New   york. ", "<answer>new york</answer>", "in New York", "<think>New York"]
    assert exact_text(["q"] * 4, texts, answer=["New York"] * 4) == [1.0, 1.0, 0.0, 0.0]
    assert exact_text(["q"], ["new york"], answer=["New York"], ignore_case=False) == [0.0]
    assert exact_text(["q"], ["NYC"], answer=[["New York", "NYC"]]) == [1.0]
    assert exact_text(["q"], ["NYC"]) == [None]


def test_regex_searches_the_answer_and_stops_a_pattern_that_explodes():
    texts = ["<think>cat</think>dog", "a cat"]
    assert regex(["q"] * 2, texts, r"\bcat\b") == [0.0, 1.0]
    assert regex(["q"] * 2, texts, r"\bcat\b", reasoning=True) == [1.0, 1.0]
    assert regex(["q"] * 2, texts, "dog", full=True) == [1.0, 0.0]
    with pytest.raises(TimeoutError, match=r"took more than 0\.1 s"):
        regex(["q"], ["a" * 40 + "b"], r"(a|aa)+$", full=True, limit_s=0.1)


SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ('<think>{}</think>{"n": 1}', 1.0),
        ('Here:\n```json\n{"n": 1}\n```\n', 1.0),
        ('<answer>{"n": 1}</answer>', 1.0),
        ('{"n": "1"}', 0.0),
        ('{"n": 1', 0.0),
        ('{"n": NaN}', 0.0),
        ("[" * 100_000, 0.0),
    ],
)
def test_json_schema_accepts_what_the_schema_accepts(text, reward):
    assert json_schema(["q"], [text], schema=SCHEMA) == json_schema(["q"], [text], schema=[json.dumps(SCHEMA)]) == [reward]


def test_json_nested_deeper_than_a_schema_can_follow_is_wrong():
    nested = {"type": "array", "items": {"$ref": "#"}}
    assert json_schema(["q"] * 2, ["[[]]", "[" * 900 + "]" * 900], schema=nested) == [1.0, 0.0]


def test_json_schema_without_a_schema_cannot_judge_and_fetches_nothing():
    assert json_schema(["q"], ["{}"]) == [None]
    with pytest.raises(Exception, match="Unresolvable"):
        json_schema(["q"], ["{}"], schema={"$ref": "http://127.0.0.1:1/schema.json"})


def test_tag_count_is_the_share_of_tags_that_stand_once():
    texts = ["<think>a</think><answer>b</answer>", "a</think><answer>b</answer>", "<think><think>a</think>"]
    assert tag_count(["q"] * 3, texts) == [1.0, 0.75, 0.25]
    assert tag_count(["q"], [texts[1]], prompt_texts=["<think>\n"]) == [1.0]


def test_soft_overlong_is_equation_13():
    assert [soft_overlong(n, 100, 20) for n in (0, 80, 90, 99, 100, 500)] == [0.0, 0.0, -0.5, -0.95, -1.0, -1.0]
    assert length(["q"], ["x"], [[1] * 95], kind="soft_overlong", max_tokens=100) == [-0.75]


def test_what_a_tool_wrote_is_no_length_of_the_policys():
    assert length(["q"], ["x"], [[1] * 95], completion_masks=[[1] * 50 + [0] * 5 + [1] * 40], max_tokens=100) == [-0.5]


def test_cosine_falls_for_right_answers_and_rises_for_wrong_ones():
    assert [round(cosine(n, 100, (1.0, 0.5)), 6) for n in (0, 50, 100, 200)] == [1.0, 0.75, 0.5, 0.5]
    ids = [[1] * 50] * 3
    assert length(["q"] * 3, ["#### 4", "#### 5", r"\boxed{four-ish}"], ids, answer=["4", "4", "x y z"], kind="cosine", max_tokens=100)[
        :2
    ] == [pytest.approx(0.75), pytest.approx(-0.75)]


def test_group_length_compares_siblings():
    assert by_group([10, 20, 30, 10, (None and 0) or 30], [1.0, 1.0, 1.0, 0.0, 0.0]) == [0.5, 0.0, -0.5, 0.0, -0.5]
    assert by_group([7, 7], [1.0, 0.0]) == [0.0, 0.0]
    assert by_group([1, 3], [None, 1.0]) == [None, -0.5]


def test_length_names_what_is_missing():
    with pytest.raises(ValueError, match="needs the option max_tokens"):
        length(["q"], ["x"], [[1]], kind="cosine")
    with pytest.raises(ValueError, match="has no kind 'short'"):
        length(["q"], ["x"], [[1]], kind="short")


def test_repetition_is_the_share_of_ngrams_said_again():
    assert repetition(["q"] * 3, ["a b c d", "a b a b a b", "a"], ngram=2) == [0.0, pytest.approx(-0.6), 0.0]
    assert repetition(["q"], ["好好好好好"], ngram=2, penalty=2.0) == [pytest.approx(-1.5)]


ENGLISH = "First we add the three apples to the four pears. So there are seven pieces of fruit in the basket."
GERMAN = "Zuerst addieren wir die drei Äpfel zu den vier Birnen. Also liegen sieben Früchte in dem Korb."
MIXED = "First we add the three apples to the four pears. Also liegen sieben Früchte in diesem großen Korb da."


@pytest.mark.parametrize(
    ("text", "language", "low", "high"),
    [
        (ENGLISH, "en", 1.0, 1.0),
        (GERMAN, "de", 1.0, 1.0),
        (GERMAN, "en", 0.0, 0.0),
        (ENGLISH, "de", 0.0, 0.0),
        (MIXED, "en", 0.4, 0.6),
        ("First we 加 the three apples to the four pears.", "en", 0.9, 0.99),
        ("首先我们把三个苹果加到四个梨上。所以一共有七个水果。", "zh", 1.0, 1.0),
        ("首先我们把三个苹果加到四个梨上。", "en", 0.0, 0.0),
        ("Сначала мы складываем три яблока и четыре груши.", "ru", 1.0, 1.0),
        (r"Let $\alpha + \beta = 7$ and so \(x = 3\), which gives the answer we want.", "en", 1.0, 1.0),
        (f"{ENGLISH}</think>{GERMAN}", "en", 1.0, 1.0),
    ],
)
def test_language_consistency_by_script_and_by_identifier(text, language, low, high):
    (share,) = language_consistency(["q"], [text], language=language)
    assert low <= share <= high


LIKE = {
    "hi": "पहले हम तीन सेबों को चार नाशपातियों में जोड़ते हैं। इसलिए टोकरी में सात फल हैं और वे सभी ताज़े हैं।",
    "mr": "प्रथम आपण तीन सफरचंदे आणि चार नाशपाती एकत्र करतो. म्हणून टोपलीत सात फळे आहेत आणि ती सर्व ताजी आहेत.",
    "ne": "पहिले हामी तीन वटा स्याउलाई चार वटा नासपातीमा थप्छौं। त्यसैले टोकरीमा सात वटा फलफूल छन् र ती सबै ताजा छन्।",
    "ur": "پہلے ہم تین سیبوں کو چار ناشپاتیوں میں جمع کرتے ہیں۔ اس لیے ٹوکری میں سات پھل ہیں اور وہ سب تازہ ہیں۔",
    "fa": "ابتدا سه سیب را به چهار گلابی اضافه می‌کنیم. بنابراین هفت میوه در سبد وجود دارد و همه آنها تازه هستند.",
    "te": "మొదట మనం మూడు ఆపిల్ పండ్లను నాలుగు బేరి పండ్లకు కలుపుతాము. కాబట్టి బుట్టలో ఏడు పండ్లు ఉన్నాయి.",
    "sw": "Kwanza tunaongeza matufaha matatu kwa peasi nne. Kwa hiyo kuna matunda saba kwenye kikapu na yote ni mabichi.",
    "en": ENGLISH,
}


@pytest.mark.parametrize("language", LIKE)
def test_languages_that_share_a_script_are_told_apart(language):
    assert language_consistency(["q"] * len(LIKE), list(LIKE.values()), language=language) == [float(one == language) for one in LIKE]


def test_language_consistency_of_formulas_alone_is_unknown():
    assert language_consistency(["q"], ["$x^2$ 12 + 3 = 15"]) == [None]
    with pytest.raises(ValueError, match="does not know the language 'xx'"):
        language_consistency(["q"], ["a"], language="xx")


SETUP = "CREATE TABLE t (name TEXT, n INTEGER); INSERT INTO t VALUES ('a', 1), ('b', 2), ('c', 2);"


@pytest.mark.parametrize(
    ("query", "gold", "reward"),
    [
        ("SELECT name FROM t WHERE n = 2", "SELECT name FROM t WHERE n > 1", 1.0),
        ("```sql\nSELECT name FROM t WHERE n = 2 ORDER BY name DESC\n```", "SELECT name FROM t WHERE n > 1", 1.0),
        ("SELECT name FROM t ORDER BY name DESC", "SELECT name FROM t ORDER BY name", 0.0),
        ("SELECT DISTINCT n FROM t", "SELECT n FROM t", 0.0),
        ("SELECT 2/3.0", "SELECT 4/6.0", 1.0),
        ("SELECT nothing FROM t", "SELECT n FROM t", 0.0),
        ("SELECT name FROM t; DROP TABLE t", "SELECT name FROM t", 0.0),
        ("DROP TABLE t", "SELECT n FROM t", 0.0),
        ("ATTACH DATABASE '/tmp/x.db' AS x", "SELECT n FROM t", 0.0),
        ("PRAGMA table_info(t)", "SELECT n FROM t", 0.0),
        ("SELECT load_extension('x')", "SELECT n FROM t", 0.0),
        ("WITH RECURSIVE r(x) AS (SELECT 1 UNION ALL SELECT x+1 FROM r) SELECT count(*) FROM r", "SELECT n FROM t", 0.0),
        ("SELECT hex(zeroblob(1000000000))", "SELECT n FROM t", 0.0),
        ("WITH RECURSIVE r(x) AS (SELECT 1 UNION ALL SELECT x+1 FROM r) SELECT zeroblob(1000000) FROM r", "SELECT n FROM t", 0.0),
        ("SELECT n FROM t WHERE n > 1 OR 1 ORDER BY n DESC", "SELECT n FROM t WHERE n IN (SELECT n FROM t ORDER BY n)", 1.0),
        ("", "SELECT n FROM t", 0.0),
        ("SELECT n FROM t", [[1], [2], [2]], 1.0),
    ],
)
def test_sql_result_reads_and_compares_rows(query, gold, reward):
    assert sql_result(["q"], [query], answer=[gold], setup=[SETUP], limit_s=0.3) == [reward]


def test_sql_result_opens_a_file_read_only(tmp_path):
    path = tmp_path / "d.db"
    with sqlite3.connect(path) as made:
        made.executescript(SETUP)
    texts = ["SELECT count(*) FROM t", "DELETE FROM t", "INSERT INTO t VALUES ('d', 4) RETURNING 3"]
    assert sql_result(["q"] * 3, texts, answer=["SELECT 3"] * 3, database=[str(path)] * 3) == [1.0, 0.0, 0.0]
    with pytest.raises(sqlite3.OperationalError):
        sql_result(["q"], ["SELECT 1"], answer=["SELECT nothing FROM t"], setup=[SETUP])


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("<think>hm</think><answer>(1 + 2) * 3</answer>", 1.0),
        ("<answer>(1 + 2) * 3 = 9</answer>", 1.0),
        ("<answer>(1 + 2) * 3 = 10</answer>", 0.0),
        (r"\boxed{\frac{3}{1} \times (2 + 1)}", 0.0),
        (r"\boxed{3 \times (2 + 1)}", 1.0),
        ("so\n(2+1)×3", 1.0),
        ("<answer>9</answer>", 0.0),
        ("<answer>3 * 3</answer>", 0.0),
        ("<answer>(1 + 2) * 3 + 3 - 3</answer>", 0.0),
        ("<answer>3^2 * 1</answer>", 0.0),
        ("<answer>3 / (2 - 1 - 1)</answer>", 0.0),
        ("<answer>__import__('os')</answer>", 0.0),
        ("", 0.0),
    ],
)
def test_countdown_uses_each_number_once(text, reward):
    assert countdown(["q"], [text], target=[9], numbers=[[1, 2, 3]]) == [reward]


def test_countdown_may_leave_numbers_over():
    assert countdown(["q"], ["3 * 3"], target=[9], nums=[[3, 3, 5]], use_all=False) == [1.0]
    assert countdown(["q"], ["3 * 3"], target=[9], nums=[[3, 3, 5]]) == [0.0]


@pytest.mark.parametrize(
    ("kind", "options", "followed", "broken"),
    [
        ("keywords:existence", {"keywords": ["cat", "dog"]}, "A Cat, a dog.", "cats and dog"),
        ("keywords:frequency", {"keyword": "cat", "frequency": 2, "relation": "at least"}, "cat Cat", "cat"),
        ("keywords:forbidden_words", {"forbidden_words": ["cat"]}, "concatenate", "a cat"),
        ("keywords:letter_frequency", {"letter": "a", "let_frequency": 2, "let_relation": "less than"}, "a b", "a A"),
        ("language:response_language", {"language": "de"}, GERMAN, ENGLISH),
        ("length_constraints:number_sentences", {"num_sentences": 2, "relation": "at least"}, "It is 3.5. So.", "One at 3.5"),
        ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "a\n***\nb", "a\n\nb"),
        ("length_constraints:number_words", {"num_words": 3, "relation": "less than"}, "don't stop", "one two three"),
        (
            "length_constraints:nth_paragraph_first_word",
            {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "so"},
            "a\n\nSo, b",
            "so\n\nb",
        ),
        ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[name] [address]", "[name]"),
        ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Bye.\nP.S. I forgot", "Bye."),
        ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* a\n- b", "* a\n**b**"),
        ("detectable_format:constrained_response", {}, "My answer is no.", "No."),
        ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*a* and **b**", "*a* and ** **"),
        (
            "detectable_format:multiple_sections",
            {"section_spliter": "Section", "num_sections": 2},
            "Section 1\nSection 2",
            "Section 1",
        ),
        ("detectable_format:json_format", {}, '```json\n{"a": 1}\n```', "{a: 1}"),
        ("detectable_format:title", {}, "<<Ode>>\nto joy", "<< >>"),
        ("combination:two_responses", {}, "a\n******\nb", "a\n******\na"),
        ("combination:repeat_prompt", {"prompt_to_repeat": "Say it."}, "say it. It", "It"),
        ("startend:end_checker", {"end_phrase": "The end."}, "So.\nthe end.", "The end. Or not"),
        ("startend:quotation", {}, '"So."', '"So." he said'),
        ("change_case:capital_word_frequency", {"capital_frequency": 2, "capital_relation": "at least"}, "STOP NOW", "STOP"),
        ("change_case:english_capital", {}, "STOP!", "Stop!"),
        ("change_case:english_lowercase", {}, "stop!", "Stop!"),
        ("punctuation:no_comma", {}, "a and b", "a, b"),
    ],
)
def test_instruction_kinds_tell_followed_from_broken(kind, options, followed, broken):
    rewards = instruction_constraints(["q"] * 2, [followed, broken], [[kind]] * 2, [[{**options, "unused": None}]] * 2)
    assert rewards == [1.0, 0.0]


def test_all_kinds_are_tested_and_an_unknown_one_makes_the_row_unscored():
    assert len(KINDS) == 25
    two = [["punctuation:no_comma", "change_case:english_capital"]]
    assert instruction_constraints(["q"], ["stop"], two, [[{}, {}]]) == [0.5]
    assert instruction_constraints(["q"], ["stop"], two, [[{}, None]], all_or_nothing=True) == [0.0]
    assert instruction_constraints(["q"], ["<think>A, B"], two, [[{}, {}]]) == [0.0]
    assert instruction_constraints(["q"], ["stop"], [["new:kind"]], [[{}]]) == [None]
    assert instruction_constraints(["q"], ["stop"], [["language:response_language"]], [[{"language": "xx"}]]) == [None]
