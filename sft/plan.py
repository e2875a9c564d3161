"""What an SFT run would do, in numbers: parameters, tokens a step, memory. Sizes come from the config; no weights are loaded."""

from typing import Any

import psutil
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from sft.config import SftPolicyConfig, SftRecipe
from sft.init import build_tokenizer, init_config
from sft.tokens import NoneLeft, tokenise, unknown_line
from sft.trainer import marked_template

BYTES_PER_PARAMETER = 16
"""FP32 weight, gradient and two AdamW moments."""
MEASURED_ROWS = 1000


def describe(recipe: SftRecipe, rows: list[dict[str, Any]]) -> str:
    """A few lines about policy, rows and memory."""
    tokenizer = _tokenizer(recipe.policy)
    some = rows[:MEASURED_ROWS]
    limit = recipe.sft.max_length or getattr(_config(recipe.policy), "max_position_embeddings", None)
    while True:
        try:
            tokens = tokenise(some, tokenizer, limit, recipe.sft.too_long, marked_template)
            break
        except NoneLeft:
            if len(some) == len(rows):
                raise
            some = rows[: 10 * len(some)]
    lengths = [len(row["input_ids"]) for row in tokens.rows]
    parameters = _parameters(recipe.policy)
    needed, available = parameters * BYTES_PER_PARAMETER, _memory()
    fits = "fits" if needed < available else "does not fit on one rank: shard it with an FSDP2 config"
    return (
        f"policy: {parameters:,} parameters, {len(tokenizer)} tokens in the vocabulary\n"
        f"rows: {len(rows):,}, {sum(lengths) / len(lengths):.0f} tokens on average, {max(lengths)} at most"
        + (f", {tokens.skipped} of the first {len(some):,} too long and left out" if tokens.skipped else "")
        + "\n"
        + (f"  of the first {len(some):,}, {unknown_line(tokens.unknown, tokenizer)}\n" if tokens.unknown else "")
        + f"first row: {rows[0]}\n"
        f"a step: {recipe.sft.batch_size} rows, about {recipe.sft.batch_size * sum(lengths) // len(lengths):,} tokens\n"
        f"memory: {needed / 2**30:.2f} GiB for weights, gradients and optimizer, besides activations; "
        f"{available / 2**30:.1f} GiB available: {fits}"
    )


def _tokenizer(policy: SftPolicyConfig) -> PreTrainedTokenizerBase:
    if policy.tokenizer is not None:
        return build_tokenizer(policy.tokenizer)
    return AutoTokenizer.from_pretrained(policy.path, revision=policy.revision)


def _config(policy: SftPolicyConfig) -> PretrainedConfig:
    if policy.init is not None:
        return init_config(policy.init, _tokenizer(policy))
    return AutoConfig.from_pretrained(policy.path, revision=policy.revision)


def _parameters(policy: SftPolicyConfig) -> int:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(_config(policy)).num_parameters()


def _memory() -> int:
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    return psutil.virtual_memory().available
