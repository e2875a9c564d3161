"""Prompts: what a row becomes, every way a row can be wrong, and a stream that can begin anywhere."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from data.prompt_config import PromptsConfig
from data.prompt_stream import PromptStream, permutation
from data.prompts import check_prompts, read_prompts
from data.recipe import InputError, parse
from data.values import Prompt

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "[{{ message.role }}]{{ message.content }}{% endfor %}{% if add_generation_prompt %}[assistant]<think>{% endif %}"
)


def byte_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """One token a byte (2 to 257), and <s> (0) before every text; the chat template writes <s> itself and opens <think>."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0, "</s>": 1} | {letter: i for i, letter in enumerate(letters, start=2)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>", chat_template=chat_template
    )


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(*rows: dict | str, name: str = "p.jsonl") -> str:
    Path(name).write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8")
    return name


def config(path: str | None = "p.jsonl", **values) -> PromptsConfig:
    return PromptsConfig(path=path, **values)


def one(tokenizer, **values) -> Prompt:
    (prompt,) = read_prompts(config(**values), tokenizer, None).prompts
    return prompt


# --- What a row becomes -----------------------------------------------------------------------------------------------


def test_text_keeps_its_columns_and_gets_the_special_tokens_of_text(tokenizer):
    write({"prompt": "1+1=", "answer": "2", "level": 3})
    prompt = one(tokenizer)
    assert (prompt.id, prompt.prompt, prompt.text, prompt.columns) == ("p-1", "1+1=", "1+1=", {"answer": "2", "level": 3})
    assert prompt.token_ids.dtype == np.int32
    assert prompt.token_ids.tolist() == tokenizer("1+1=")["input_ids"] and prompt.token_ids[0] == 0


def test_a_template_that_opens_think_leaves_it_at_the_end_and_bos_comes_once(tokenizer):
    write({"prompt": [{"role": "user", "content": "1+1="}]})
    prompt = one(tokenizer)
    assert prompt.text == "<s>[user]1+1=[assistant]<think>"
    assert prompt.token_ids.tolist().count(0) == 1
    assert tokenizer.decode(prompt.token_ids) == prompt.text
    expected = tokenizer.apply_chat_template(prompt.prompt, add_generation_prompt=True, tokenize=True, return_dict=True)
    assert prompt.token_ids.tolist() == expected["input_ids"]


def test_system_makes_a_text_prompt_a_chat_and_leaves_a_system_message_of_the_rows_own(tokenizer):
    own = [{"role": "system", "content": "own"}, {"role": "user", "content": "b"}]
    write({"prompt": "a"}, {"prompt": [{"role": "user", "content": "b"}]}, {"prompt": own})
    prompts = read_prompts(config(system="be brief"), tokenizer, None).prompts
    assert prompts[0].prompt == [{"role": "system", "content": "be brief"}, {"role": "user", "content": "a"}]
    assert [prompt.text for prompt in prompts] == [
        "<s>[system]be brief[user]a[assistant]<think>",
        "<s>[system]be brief[user]b[assistant]<think>",
        "<s>[system]own[user]b[assistant]<think>",
    ]


def test_chat_makes_a_text_prompt_a_chat_of_one_user_message(tokenizer):
    write({"prompt": "a"}, {"prompt": [{"role": "user", "content": "b"}]})
    prompts = read_prompts(config(chat=True), tokenizer, None).prompts
    assert [prompt.prompt for prompt in prompts] == [[{"role": "user", "content": "a"}], [{"role": "user", "content": "b"}]]
    assert [prompt.text for prompt in prompts] == ["<s>[user]a[assistant]<think>", "<s>[user]b[assistant]<think>"]


def test_columns_are_renamed_and_hide_those_that_had_our_name(tokenizer):
    write({"question": "q", "prompt": "not this", "final": "7", "uid": 12})
    prompt = one(tokenizer, columns={"prompt": "question", "answer": "final", "id": "uid"})
    assert (prompt.id, prompt.prompt, prompt.columns) == ("12", "q", {"answer": "7", "id": 12})


def test_ids_without_a_column_name_the_line_blank_lines_counted(tokenizer):
    write({"prompt": "a"}, "", {"prompt": "b"})
    assert [prompt.id for prompt in read_prompts(config(), tokenizer, None).prompts] == ["p-1", "p-3"]


def test_parquet_gives_what_jsonl_gives(tokenizer):
    rows = [{"prompt": f"{i}+1=", "answer": str(i + 1), "tags": ["a", "b"]} for i in range(5)]
    write(*rows)
    pq.write_table(pa.Table.from_pylist(rows), "p.parquet")
    lines, table = (read_prompts(config(path), tokenizer, None).prompts for path in ("p.jsonl", "p.parquet"))
    for a, b in zip(lines, table, strict=True):
        assert (a.id, a.text, a.columns, a.token_ids.tobytes()) == (b.id, b.text, b.columns, b.token_ids.tobytes())


def test_limit_stops_before_later_rows_are_looked_at(tokenizer):
    write({"prompt": "a"}, {"prompt": "b"}, "{broken")
    assert len(read_prompts(config(limit=2), tokenizer, None).prompts) == 2


def test_more_rows_than_a_batch_keep_their_order(tokenizer, monkeypatch):
    monkeypatch.setattr("data.prompts.BATCH_ROWS", 3)
    write(*({"prompt": f"p{i}" if i % 2 else [{"role": "user", "content": f"p{i}"}]} for i in range(10)))
    texts = [prompt.text for prompt in read_prompts(config(), tokenizer, None).prompts]
    assert texts == [f"p{i}" if i % 2 else f"<s>[user]p{i}[assistant]<think>" for i in range(10)]


def test_a_task_is_read_by_name(tokenizer):
    prompts = read_prompts(config(None, task="arithmetic", limit=3), tokenizer, None).prompts
    assert len({prompt.id for prompt in prompts}) == 3
    assert all(prompt.text.endswith("=") and prompt.columns["answer"].isdigit() for prompt in prompts)


def test_gsm8k_through_the_column_mapping(tokenizer):
    here = Path(__file__).resolve().parents[2]
    folder = Path(os.environ.get("COHORT_TEST_DATA", here.parent / "shared" / "data"))
    path = folder / "gsm8k" / "train.jsonl"
    if not path.is_file():
        pytest.skip(f"no GSM8K at {path}; set COHORT_TEST_DATA to the folder that holds gsm8k/train.jsonl")
    columns = {"prompt": "question", "answer": "answer"}
    check_prompts(config(str(path), columns=columns))
    found = read_prompts(config(str(path), columns=columns), tokenizer, 4096)
    assert (len(found.prompts), found.skipped) == (7473, {})
    assert found.prompts[0].id == "train-1" and found.prompts[0].text.startswith("Natalia sold clips")
    assert found.prompts[0].columns["answer"].endswith("#### 72")


# --- What can be wrong ------------------------------------------------------------------------------------------------

GOOD = {"id": "a", "prompt": "good"}
BAD_ROWS = {
    "broken_json": ('{"prompt": "x"', "not valid JSON (Expecting ',' delimiter at column 15); write one JSON object a line"),
    "not_an_object": (
        "[1]",
        'holds a JSON list where a row is an object; write one JSON object a line, as in {"prompt": ...}',
    ),
    "missing_column": (
        {"promt": "x", "answer": "1"},
        "no prompt: the row has the columns promt, answer; say which is the prompt, as in columns: {prompt: promt}",
    ),
    "empty_prompt": ({"prompt": " \n"}, "the prompt is empty; fill it in"),
    "empty_chat": ({"prompt": []}, "the prompt is empty; fill it in"),
    "wrong_type": ({"prompt": 17}, "the prompt is int ('17'); a prompt is text or a list of chat messages"),
    "wrong_message": (
        {"prompt": [{"role": "user"}]},
        "message 1 of the prompt is not {role: text, content: text}; correct it",
    ),
    "assistant_last": (
        {"prompt": [{"role": "assistant", "content": "x"}]},
        "the prompt ends with the assistant's message; end it with the user's",
    ),
    "wrong_id": ({"id": 1.5, "prompt": "x"}, "the id is 1.5; an id is a text or an integer"),
    "duplicate_id": ({"id": "a", "prompt": "x"}, "id 'a' stands twice, first at p.jsonl:1; give each row its own id"),
}


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_a_bad_row_is_one_line_with_its_place_and_the_way_out(kind, tokenizer):
    row, problem = BAD_ROWS[kind]
    message = f"p.jsonl:2: {problem}, or set skip_bad: true"
    write(GOOD, row)
    with pytest.raises(InputError) as error:
        read_prompts(config(), tokenizer, None)
    assert str(error.value) == message
    with pytest.raises(InputError) as error:
        check_prompts(config())
    assert str(error.value) == message


def test_text_that_is_not_utf8_is_a_bad_row(tokenizer):
    Path("p.jsonl").write_bytes(b'{"prompt": "a"}\n{"prompt": "\xff"}\n')
    with pytest.raises(InputError, match=r"p\.jsonl:2: not UTF-8 text \(invalid start byte at byte 12 of the line\)"):
        read_prompts(config(), tokenizer, None)


def test_skipped_rows_are_counted_by_reason(tokenizer):
    write(GOOD, *(row for row, _ in BAD_ROWS.values()), {"prompt": "x" * 30}, {"prompt": [{"role": "tool", "content": "x"}]})
    found = read_prompts(config(skip_bad=True), tokenizer, 20)
    assert [prompt.id for prompt in found.prompts] == ["a"]
    assert found.skipped == {
        "broken_json": 2, "missing_column": 1, "empty_prompt": 2, "wrong_type": 4, "duplicate_id": 1, "too_long": 1, "template": 1,
    }  # fmt: skip


def test_a_prompt_longer_than_the_context_says_both_numbers(tokenizer):
    write({"prompt": "x" * 9}, {"prompt": "x" * 10})
    with pytest.raises(InputError) as error:
        read_prompts(config(), tokenizer, 10)
    assert str(error.value) == (
        "p.jsonl:2: the prompt is 11 tokens long and the context has room for 10; shorten it, raise rollout.max_model_len, "
        "or set skip_bad: true"
    )


def test_messages_that_the_template_refuses_are_a_bad_row(tokenizer):
    write({"prompt": [{"role": "tool", "content": "x"}]})
    with pytest.raises(InputError, match=r"^p\.jsonl:1: the chat template refuses these messages \(no tools here\); correct it"):
        read_prompts(config(), tokenizer, None)


def test_a_chat_needs_a_template_whatever_skip_bad_says(tokenizer):
    write({"prompt": "x"})
    with pytest.raises(InputError, match=r"^p\.jsonl:1: the prompt is a chat .* has no chat template; give text prompts without"):
        read_prompts(config(system="s", skip_bad=True), byte_tokenizer(chat_template=None), None)


def test_a_mapped_column_that_is_not_there_names_the_nearest(tokenizer):
    write({"question": "q", "answer": "7"})
    message = r"^p\.jsonl:1: no column 'anwser'; did you mean 'answer'\?; correct `columns`, or set skip_bad: true$"
    with pytest.raises(InputError, match=message):
        read_prompts(config(columns={"prompt": "question", "answer": "anwser"}), tokenizer, None)


def test_a_parquet_row_is_named_by_its_number(tokenizer):
    pq.write_table(pa.table({"prompt": ["a", None]}), "p.parquet")
    with pytest.raises(InputError, match=r"^p\.parquet: row 2: no prompt: the row has the columns prompt"):
        read_prompts(config("p.parquet"), tokenizer, None)
    Path("p.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(InputError, match=r"^p\.parquet: not a parquet file that can be read"):
        read_prompts(config("p.parquet"), tokenizer, None)


@pytest.mark.parametrize("lines", [[], ["", " "]])
def test_a_file_without_rows_is_an_error(lines, tokenizer):
    write(*lines)
    for skip_bad in (False, True):
        with pytest.raises(InputError, match=r"^p\.jsonl: holds no prompts; a prompt file has one JSON object a line"):
            read_prompts(config(skip_bad=skip_bad), tokenizer, None)
        with pytest.raises(InputError, match=r"^p\.jsonl: holds no prompts"):
            check_prompts(config(skip_bad=skip_bad))


def test_a_file_with_nothing_but_bad_rows_is_an_error(tokenizer):
    write("{", "{", {"prompt": ""})
    with pytest.raises(InputError) as error:
        read_prompts(config(skip_bad=True), tokenizer, None)
    assert str(error.value) == (
        "p.jsonl: no prompt is left, all rows were skipped (broken_json 2, empty_prompt 1); set skip_bad: false to see the first one"
    )


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("q.jsonl", r"^q\.jsonl: no such file; did you mean 'p\.jsonl'\?; paths are relative to the working folder, /"),
        ("none/p.jsonl", r"^none/p\.jsonl: no such file: there is no folder 'none' in /"),
        ("folder", r"^folder: is a folder; name the prompt file in it$"),
    ],
)
def test_a_missing_file_comes_with_a_hint(path, message, tokenizer):
    write(GOOD)
    Path("folder").mkdir()
    with pytest.raises(InputError, match=message):
        check_prompts(config(path))
    with pytest.raises(InputError, match=message):
        read_prompts(config(path), tokenizer, None)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "x: give either a path (file or hub id) or a task"),
        ({"path": "p.jsonl", "task": "arithmetic"}, "x: give either a path (file or hub id) or a task"),
        ({"path": "p.jsonl", "options": {"digits": 2}}, "x: options belong to a task, and 'p.jsonl' is a path; leave them out"),
        ({"task": "arithmetc"}, "x: task: no task named 'arithmetc'; did you mean 'arithmetic'?"),
    ],
)
def test_the_section_is_checked_without_reading_anything(values, message):
    with pytest.raises(InputError) as error:
        parse(values, PromptsConfig, "x")
    assert message in str(error.value)


def test_bad_options_and_splits_of_a_task_are_found_before_a_tokenizer_is_there():
    with pytest.raises(InputError, match="digit"):
        check_prompts(config(None, task="arithmetic", options={"digit": 2}))
    with pytest.raises(InputError, match="dev"):
        check_prompts(config(None, task="arithmetic", split="dev"))


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("data.prompt_config", {"torch", "pyarrow", "datasets", "transformers", "numpy"}),
        ("data.prompts, data.journal, data.completions", {"torch", "pyarrow", "datasets", "transformers"}),
    ],
)
def test_importing_loads_nothing_heavy(module, heavy):
    code = f"import sys, {module}; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


# --- Hub data sets ----------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch) -> None:
    """`datasets` takes a folder `org/name` for a hub data set of that name, so the library itself runs, without a network."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    Path("acme/sums").mkdir(parents=True)
    write({"question": "1+1", "answer": "2"}, {"question": "1+2", "answer": "3"}, name="acme/sums/train.jsonl")
    write({"question": "2+2", "answer": "4"}, name="acme/sums/test.jsonl")
    main = "- config_name: main\n  data_files:\n  - {split: train, path: train.jsonl}\n  - {split: test, path: test.jsonl}\n"
    small = "- config_name: small\n  data_files: test.jsonl\n"
    Path("acme/sums/README.md").write_text(f"---\nconfigs:\n{main}{small}---\n")


def test_a_hub_data_set_is_read_by_configuration_and_split(hub, tokenizer):
    columns = {"prompt": "question"}
    found = read_prompts(config("acme/sums:main", columns=columns), tokenizer, None).prompts
    assert [(p.id, p.text, p.columns) for p in found] == [("sums-1", "1+1", {"answer": "2"}), ("sums-2", "1+2", {"answer": "3"})]
    found = read_prompts(config("acme/sums:main", split="test", columns=columns), tokenizer, None).prompts
    assert [p.text for p in found] == ["2+2"]


@pytest.mark.parametrize(
    ("path", "split", "message"),
    [
        ("acme/sums:main", "dev", r"Unknown split \"dev\"\. Should be one of \['train', 'test'\]\.; a configuration is"),
        ("acme/sums", "train", r"available configs: \['main', 'small'\]; a configuration is named as acme/sums:NAME"),
        ("acme/sums:mian", "train", r"BuilderConfig 'mian' not found\. Available: \['main', 'small'\]"),
    ],
)
def test_a_wrong_split_or_configuration_lists_those_there_are(path, split, message, hub, tokenizer):
    check_prompts(config(path, split=split))
    with pytest.raises(InputError, match=f"^{path}: .*{message}") as error:
        read_prompts(config(path, split=split), tokenizer, None)
    assert "\n" not in str(error.value)


def test_a_name_that_no_hub_has_is_one_line(tokenizer, monkeypatch):
    def offline(*_args, **_kwargs):
        raise ConnectionError("Couldn't reach 'acme/none' on the Hub")

    monkeypatch.setattr("datasets.load_dataset", offline)
    with pytest.raises(InputError, match=r"^acme/none: no such file, nor a hub data set to be had \(Couldn't reach"):
        read_prompts(config("acme/none"), tokenizer, None)


# --- The stream -------------------------------------------------------------------------------------------------------


def prompts(count: int) -> list[Prompt]:
    return [Prompt(str(i), str(i), str(i), np.array([i], np.int32)) for i in range(count)]


def ids(handed_out: list[tuple[int, Prompt]]) -> list[str]:
    return [prompt.id for _, prompt in handed_out]


def test_the_order_of_an_epoch_never_changes():
    assert permutation(8, seed=0, epoch=0).tolist() == [3, 2, 1, 6, 0, 7, 4, 5]
    assert permutation(8, seed=0, epoch=1).tolist() == [7, 4, 5, 1, 6, 2, 0, 3]
    assert permutation(8, seed=1, epoch=0).tolist() == [2, 4, 7, 5, 0, 6, 3, 1]


def test_every_epoch_hands_out_every_prompt_once_in_another_order():
    stream = PromptStream(prompts(50), seed=3)
    first, second = ids(stream.take(50)), ids(stream.take(50))
    assert sorted(first, key=int) == sorted(second, key=int) == [str(i) for i in range(50)]
    assert first != second != ids(PromptStream(prompts(50), seed=4).take(50))


@given(st.integers(1, 20), st.integers(0, 2**40), st.lists(st.integers(0, 30), max_size=8), st.integers(0, 100))
def test_a_resumed_stream_gives_what_one_that_never_stopped_gives(count, seed, takes, stop):
    whole = PromptStream(prompts(count), seed).take(stop + sum(takes))
    stream = PromptStream(prompts(count), seed, position=stop)
    resumed = [handed_out for take in takes for handed_out in stream.take(take)]
    assert stream.position == stop + sum(takes)
    assert [(place, prompt.id) for place, prompt in resumed] == [(place, prompt.id) for place, prompt in whole[stop:]]
    assert [place for place, _ in whole] == list(range(len(whole)))
