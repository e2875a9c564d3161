"""Random policies and their tokenizers: what goes in comes back exactly, and everything follows from the seed."""

import pytest
import torch
from transformers import AutoTokenizer

from data.arithmetic import demonstrations
from data.recipe import InputError
from sft.init import TAGS, build_tokenizer, init_policy

TINY = {
    "model_type": "qwen3_moe",
    "num_hidden_layers": 2,
    "hidden_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "max_position_embeddings": 256,
    "head_dim": 32,
}
ASCII = "47+85= <think>7+5=12;4+8+1=13</think>\n<answer>132</answer>  a , b . don't\n\n{x}"
ANY = ASCII + " héllo — 世界 🙂 \x00\t\r\n"


@pytest.fixture(params=["characters", "bytes"])
def reloaded(request, tmp_path):
    """A tokenizer as it comes back from a saved policy folder."""
    model, tokenizer = init_policy(TINY, request.param, seed=0)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return AutoTokenizer.from_pretrained(tmp_path)


def test_a_reloaded_tokenizer_gives_every_text_back(reloaded):
    text = ANY if reloaded.unk_token is None else ASCII
    ids = reloaded(text)["input_ids"]
    assert reloaded.decode(ids) == text
    assert reloaded.decode(ids, skip_special_tokens=True) == text


def test_a_token_is_a_character_or_a_tag(reloaded):
    ids = reloaded("<think>7+5</think>")["input_ids"]
    assert reloaded.convert_ids_to_tokens(ids) == ["<think>", "7", "+", "5", "</think>"]
    assert all(len(reloaded(tag)["input_ids"]) == 1 for tag in TAGS)


def test_prompt_and_completion_never_merge_at_their_border(reloaded):
    for row in demonstrations({"carry_error": 0.5}, 20, seed=0):
        both = reloaded(row["prompt"] + row["completion"])["input_ids"]
        assert both == reloaded(row["prompt"])["input_ids"] + reloaded(row["completion"])["input_ids"]


def test_bytes_take_one_token_a_byte_and_characters_know_ascii_alone():
    assert len(build_tokenizer("bytes")("世")["input_ids"]) == 3
    characters = build_tokenizer("characters")
    assert characters("世")["input_ids"] == [characters.unk_token_id]


def test_the_chat_template_ends_in_the_assistants_turn_and_marks_it(reloaded):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2?"}]
    prompt = reloaded.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt == "system: Be brief.\nuser: 2+2?\nassistant: "
    whole = [*messages, {"role": "assistant", "content": "4"}]
    made = reloaded.apply_chat_template(whole, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    written = [token for token, mask in zip(made["input_ids"], made["assistant_masks"], strict=True) if mask]
    assert reloaded.decode(made["input_ids"]) == prompt + "4<eos>"
    assert reloaded.decode(written) == "4<eos>"


def test_weights_follow_the_seed_and_leave_the_global_generator_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, again, other = (init_policy(TINY, "characters", seed)[0].state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_config_and_tokenizer_agree():
    model, tokenizer = init_policy(TINY, "bytes", seed=0)
    assert model.config.vocab_size == len(tokenizer) == 262
    assert (model.config.pad_token_id, model.config.eos_token_id) == (tokenizer.pad_token_id, tokenizer.eos_token_id)
    assert tokenizer.model_max_length == 256


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hiden_size": 64}, "policy.init.hiden_size: no field of transformers' Qwen3MoeConfig; did you mean 'hidden_size'?"),
        ({"model_type": "qwen3_mo"}, "transformers has no 'qwen3_mo'; did you mean 'qwen3_moe'?"),
        ({"vocab_size": 99}, "policy.init.vocab_size: the tokenizer decides it; leave it out"),
    ],
)
def test_a_wrong_architecture_is_one_line(change, message):
    with pytest.raises(InputError) as error:
        init_policy({**TINY, **change}, "characters", seed=0)
    assert message in str(error.value)
