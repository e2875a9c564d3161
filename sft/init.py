"""A policy from nothing: a small architecture with random weights, and a tokenizer that needs no training.

This is what the quickstart starts from, on any machine and without a download. Architecture and tokenizer are transformers'
own, so that what is saved loads everywhere as a normal model folder: transformers, vLLM, trl.

`characters` has one token for each printable ASCII character; anything else is <unk>. `bytes` has one token for each byte, so
that any text goes through and comes back exactly. Both have <think>, </think>, <answer> and </answer> as single tokens that
stay in the decoded text, and a chat template that names the speakers.
"""

from collections.abc import Iterable
from typing import Any, Literal

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from data.recipe import InputError, nearest

TokenizerKind = Literal["characters", "bytes"]

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
UNDECLARED = ("head_dim",)
"""Config fields that model code reads though some configs do not declare them."""
PAD, EOS, UNK = "<pad>", "<eos>", "<unk>"

# `generation` marks what an assistant wrote, its end included: trl takes its loss mask from there.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'assistant' -%}"
    "{{- 'assistant: ' -}}{%- generation -%}{{- message['content'] + eos_token -}}{%- endgeneration -%}"
    "{%- else -%}{{- message['role'] + ': ' + message['content'] + '\n' -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- 'assistant: ' -}}{%- endif -%}"
)


def init_policy(architecture: dict[str, Any], tokenizer: TokenizerKind, seed: int) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """A float32 model with random weights that depend on the seed alone, and its tokenizer.

    `architecture` holds `model_type` and any field of that transformers config; vocabulary and special tokens come from the
    tokenizer. Raises InputError where transformers does not know the model type or a field.
    """
    made = build_tokenizer(tokenizer)
    config = init_config(architecture, made)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.config.architectures = [type(model).__name__]  # what a sharded model is called is no architecture
    made.model_max_length = config.max_position_embeddings
    return model, made


def init_config(architecture: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> PretrainedConfig:
    """The transformers config of an architecture, with the tokenizer's vocabulary; InputError for a name it does not know."""
    fields = dict(architecture)
    model_type = fields.pop("model_type")
    if model_type not in CONFIG_MAPPING:
        raise InputError(f"policy.init.model_type: transformers has no '{model_type}'{_near(model_type, CONFIG_MAPPING)}")
    kind = CONFIG_MAPPING[model_type]
    ours = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
    }
    # transformers would keep an unknown field without a word and build another model than was meant.
    known = {*kind().to_dict(), *kind.attribute_map, *UNDECLARED}
    for name in fields:
        if name in ours:
            raise InputError(f"policy.init.{name}: the tokenizer decides it; leave it out")
        if name not in known:
            raise InputError(f"policy.init.{name}: no field of transformers' {kind.__name__}{_near(name, known)}")
    return kind(**fields, **ours)


def build_tokenizer(kind: TokenizerKind) -> PreTrainedTokenizerFast:
    """A transformers tokenizer with pad, eos and a chat template; decoding gives back the text exactly."""
    core = _characters() if kind == "characters" else _bytes()
    # Part of the text, so neither special (decoding would drop them) nor stripped.
    core.add_tokens([AddedToken(tag, normalized=False, special=False) for tag in TAGS])
    made = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNK if kind == "characters" else None,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
    made.chat_template = CHAT_TEMPLATE
    return made


def _characters() -> Tokenizer:
    alphabet = ["\n", *(chr(code) for code in range(0x20, 0x7F))]
    vocabulary = {token: number for number, token in enumerate([PAD, EOS, UNK, *alphabet])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token=UNK))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    core.decoder = decoders.Fuse()
    return core


def _bytes() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([PAD, EOS, *alphabet])}
    core = Tokenizer(models.BPE(vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    return core


def _near(word: str, names: Iterable[str]) -> str:
    """The nearest of names that are too many to list."""
    hint = nearest(word, sorted(names))
    return hint if "did you mean" in hint else ""
