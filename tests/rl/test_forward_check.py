"""A policy whose own forward is not what the learner computes is refused before it is trained."""

from pathlib import Path
from typing import Any

import policies
import pytest
import torch
import transformers
from made import MAX_TOKENS, TEMPERATURE, deepseek_v3_with_module, make_learner
from transformers import PreTrainedModel

from data.recipe import InputError
from rl.config import Fp8Config, LearnerConfig, LossConfig
from rl.forward_check import check_forward
from rl.fp8.convert import fp8_model
from rl.learner import Learner
from rl.policy import drop_nothing, load_model
from rl.ranks import Ranks

SMALL: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 32, "tie_word_embeddings": False, "max_position_embeddings": 256, "initializer_range": 0.3,
}  # fmt: skip
OTHERS: dict[str, dict[str, Any]] = {
    "Granite": {"logits_scaling": 8.0},
    "Cohere": {"logit_scale": 0.0625},
    "Gemma2": {"query_pre_attn_scalar": 32, "attn_logit_softcapping": None, "final_logit_softcapping": 30.0},
    "Lfm2": {"layer_types": ["conv", "full_attention"], "conv_L_cache": 3},
}


def saved(name: str, folder: Path, **config: Any) -> Path:
    torch.manual_seed(0)
    model: PreTrainedModel = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**config))
    model.save_pretrained(folder)
    return folder


def learner_of(model: PreTrainedModel) -> Learner:
    return Learner(model, LossConfig(), LearnerConfig(), Ranks(), temperature=TEMPERATURE, max_tokens=MAX_TOKENS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["qwen3", "qwen3_moe", "deepseek_v3"])
def test_policies_that_the_learner_computes_pass(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    learner = make_learner(getattr(policies, f"tiny_{name}")(tmp_path / name, seed=0), LossConfig(), dtype=dtype)
    attention = learner.model.config._attn_implementation
    check_forward(learner)
    assert learner.model.config._attn_implementation == attention


def test_a_policy_in_fp8_and_one_with_a_module_pass(tmp_path: Path) -> None:
    folder = deepseek_v3_with_module(tmp_path / "policy", seed=0)
    check_forward(learner_of(load_model(folder, torch.float32)))
    check_forward(learner_of(fp8_model(folder, Fp8Config(), torch.device("cpu"), masters="trained")))


@pytest.mark.parametrize("name", OTHERS)
def test_an_architecture_that_does_more_is_refused(name: str, tmp_path: Path) -> None:
    model = load_model(saved(name, tmp_path / name, **SMALL | OTHERS[name]), torch.float32)
    with pytest.raises(InputError, match="is trained wrongly by this learner"):
        check_forward(learner_of(model))


def test_capped_attention_scores_are_refused(tmp_path: Path) -> None:
    model = load_model(saved("Gemma2", tmp_path / "g", **SMALL, query_pre_attn_scalar=32, final_logit_softcapping=None), torch.float32)
    with pytest.raises(InputError, match="its attention caps scores"):
        check_forward(learner_of(model))


def test_in_training_mode_nothing_is_dropped(tmp_path: Path) -> None:
    """OPT drops by default, through functions as well as layers."""
    sizes = {
        "vocab_size": 64,
        "hidden_size": 64,
        "ffn_dim": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "word_embed_proj_dim": 64,
    }
    model = load_model(saved("OPT", tmp_path / "opt", **sizes, dropout=0.5, layerdrop=0.5, max_position_embeddings=256), torch.float32)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    drop_nothing(model)
    check_forward(learner_of(model))
