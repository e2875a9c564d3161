"""Which tokens of a row are learned, and what becomes of a row that is too long."""

import pytest

from data.recipe import InputError
from sft.init import build_tokenizer
from sft.tokens import IGNORED, tokenise, unknown_line
from sft.trainer import marked_template

TOKENIZER = build_tokenizer("characters")
QWEN = (
    "{%- for m in messages -%}{{- '<' + m['role'] + '>' + m['content'] + eos_token + '\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<assistant>' -}}{%- endif -%}"
)


def learned(row, tokenizer=TOKENIZER):
    (only,) = tokenise([row], tokenizer, None, "refuse", marked_template).rows
    assert len(only["input_ids"]) == len(only["labels"])
    return tokenizer.decode(only["input_ids"]), tokenizer.decode([t for t in only["labels"] if t != IGNORED])


def chat(*turns):
    return [{"role": role, "content": content} for role, content in turns]


def test_of_a_text_the_completion_and_its_end_are_learned():
    assert learned({"prompt": "1+1=", "completion": "2"}) == ("1+1=2<eos>", "2<eos>")


def test_what_a_tool_wrote_is_read_and_not_learned_and_begins_a_token():
    row = {"prompt": "1+1=", "completion": "<calc>1+1</calc>2</think>2", "tool_spans": [[16, 17]]}
    assert learned(row) == ("1+1=<calc>1+1</calc>2</think>2<eos>", "<calc>1+1</calc></think>2<eos>")
    # A tokenizer with one token for `</` or `2<` would make it across the edge of what was sampled: each side is tokenised by itself.
    merging = build_tokenizer("bytes")
    merging.add_tokens(["2</think>", "c>2"])
    assert learned(row, merging)[1] == "<calc>1+1</calc></think>2<eos>"


def test_of_a_record_the_assistant_turn_alone_is_learned():
    row = {"messages": chat(("system", "Add."), ("user", "1+1="), ("assistant", "<think>1</think>2"))}
    whole, part = learned(row)
    assert whole == "system: Add.\nuser: 1+1=\nassistant: <think>1</think>2<eos>"
    assert part == "<think>1</think>2<eos>"


def test_every_assistant_turn_is_learned_and_no_other():
    row = {"messages": chat(("user", "1+1="), ("assistant", "2"), ("user", "3"), ("assistant", "4"))}
    assert learned(row) == ("user: 1+1=\nassistant: 2<eos>user: 3\nassistant: 4<eos>", "2<eos>4<eos>")


def test_what_a_template_writes_behind_the_end_is_not_learned():
    tokenizer = build_tokenizer("characters")
    tokenizer.chat_template = QWEN
    whole, part = learned({"messages": chat(("user", "1+1="), ("assistant", "2"))}, tokenizer)
    assert (whole, part) == ("<user>1+1=<eos>\n<assistant>2<eos>", "2<eos>")


def test_several_turns_need_a_template_that_marks_them():
    tokenizer = build_tokenizer("characters")
    tokenizer.chat_template = QWEN
    row = {"messages": chat(("user", "1"), ("assistant", "2"), ("user", "3"), ("assistant", "4"))}
    with pytest.raises(InputError, match="data: row 1: "):
        tokenise([row], tokenizer, None, "refuse", marked_template)


def test_a_row_longer_than_the_context_is_refused_or_left_out_whole():
    rows = [{"prompt": "1+1=", "completion": "2" * n} for n in (1, 9, 2)]
    with pytest.raises(InputError, match="data: row 2 has 14 tokens and there is room for 8"):
        tokenise(rows, TOKENIZER, 8, "refuse", marked_template)
    kept = tokenise(rows, TOKENIZER, 8, "skip", marked_template)
    assert (len(kept.rows), kept.skipped, kept.longest) == (2, 1, 7)
    assert [TOKENIZER.decode(row["input_ids"]) for row in kept.rows] == ["1+1=2<eos>", "1+1=22<eos>"]
    with pytest.raises(InputError, match="all 3 rows are longer than 3 tokens"):
        tokenise(rows, TOKENIZER, 3, "skip", marked_template)


def test_text_that_a_tokenizer_does_not_know_is_counted():
    rows = [{"prompt": "1+1=", "completion": "\u4e8c"}, {"prompt": "1+1=", "completion": "2"}]
    found = tokenise(rows, TOKENIZER, None, "refuse", marked_template)
    assert found.unknown == 1
    assert unknown_line(found.unknown, TOKENIZER).startswith("1 tokens are <unk>: text that this tokenizer does not know")
    assert tokenise(rows, build_tokenizer("bytes"), None, "refuse", marked_template).unknown == 0
