"""Tiny random policies for tests, saved as transformers saves any policy: configuration, safetensors, tokenizer.

They are as small as the kernels allow: widths are multiples of 128 (block FP8 needs it), head size 32, and what DeepSeek-V3 needs
on vLLM's CPU backend (`kv_lora_rank` 512 with 64 rotary dimensions). The standard deviation of the weights is large,
so that log-probs differ between tokens and experts and a wrong expert shows.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

SPECIAL = ("<pad>", "<eos>")
PAD, EOS = 0, 1
YARN: dict[str, object] = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 2.0,
    "original_max_position_embeddings": 256,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
"""As the real DeepSeek-V3 has it."""


def character_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Token 0 pads, token 1 ends, token i is the character `chr(ord("0") + i - 2)`: `0123456789:;<=>?@ABC...`."""
    vocab = {token: i for i, token in enumerate(SPECIAL)}
    vocab |= {chr(ord("0") + i): len(SPECIAL) + i for i in range(vocab_size - len(SPECIAL))}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=SPECIAL[PAD]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=SPECIAL[PAD], eos_token=SPECIAL[EOS])


def tiny_qwen3_moe(path: Path, *, seed: int, vocab_size: int = 64, layers: int = 2, dtype: torch.dtype = torch.float32) -> Path:
    """Qwen3-MoE: hidden and expert width 128, 8 experts, 2 a token, 4 query and 2 key heads. Returns `path`."""
    config = Qwen3MoeConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=256,
        moe_intermediate_size=128,
        num_hidden_layers=layers,
        num_experts=8,
        num_experts_per_tok=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        norm_topk_prob=True,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        initializer_range=0.1,
        pad_token_id=PAD,
        eos_token_id=EOS,
    )
    return _save(Qwen3MoeForCausalLM, config, path, seed, dtype)


def tiny_qwen3(path: Path, *, seed: int, vocab_size: int = 64, layers: int = 2, dtype: torch.dtype = torch.float32) -> Path:
    """Dense Qwen3 with tied embeddings: its checkpoint holds no `lm_head.weight`. Returns `path`."""
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.1,
        pad_token_id=PAD,
        eos_token_id=EOS,
    )
    return _save(Qwen3ForCausalLM, config, path, seed, dtype)


def tiny_deepseek_v3(
    path: Path,
    *,
    seed: int,
    vocab_size: int = 64,
    layers: int = 2,
    dtype: torch.dtype = torch.float32,
    rope_parameters: dict[str, object] = YARN,
) -> Path:
    """DeepSeek-V3: one dense layer, then MoE layers of 8 experts in 2 groups, 2 a token, one shared expert. Returns `path`."""
    config = DeepseekV3Config(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=256,
        moe_intermediate_size=128,
        num_hidden_layers=layers,
        first_k_dense_replace=1,
        n_routed_experts=8,
        n_shared_experts=1,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        q_lora_rank=128,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        max_position_embeddings=512,
        rope_parameters=rope_parameters,
        tie_word_embeddings=False,
        initializer_range=0.1,
        pad_token_id=PAD,
        eos_token_id=EOS,
    )
    return _save(DeepseekV3ForCausalLM, config, path, seed, dtype)


def _save(
    kind: type[PreTrainedModel],
    config: Qwen3MoeConfig | Qwen3Config | DeepseekV3Config,
    path: Path,
    seed: int,
    dtype: torch.dtype,
) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        policy = kind(config)
        for name, buffer in policy.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(std=0.1)  # zero at first, where it could be lost without a trace
    policy.to(dtype).save_pretrained(path)
    character_tokenizer(config.vocab_size).save_pretrained(path)
    return path


class Checkpoint:
    """A saved policy in the place of the learner."""

    def __init__(self, policy: Path) -> None:
        self.policy = policy

    def export(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from load_file(self.policy / "model.safetensors").items()
