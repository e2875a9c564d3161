"""A checkpoint in DeepSeek-V3's published layout, written without a model: names, shapes, types and config as the released files have them.

It imports neither transformers nor anything of `rl`: what is here is the layout as described with the weights (README_WEIGHTS.md,
config.json of deepseek-ai/DeepSeek-V3), at a tiny size, so that a loader is held against the layout and not against its own writer.

    V  vocabulary      D  hidden size      H  heads
"""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

V, D, H, WIDTH, EXPERT, EXPERTS = 64, 256, 2, 384, 128, 8
Q_RANK, KV_RANK, NOPE, ROPE, VALUE = 128, 512, 128, 64, 128
LAYERS, DENSE = 3, 1

CONFIG = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_deepseek.DeepseekV3Config",
        "AutoModel": "modeling_deepseek.DeepseekV3Model",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
    },
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": DENSE,
    "hidden_act": "silu",
    "hidden_size": D,
    "initializer_range": 0.02,
    "intermediate_size": WIDTH,
    "kv_lora_rank": KV_RANK,
    "max_position_embeddings": 512,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": EXPERT,
    "moe_layer_freq": 1,
    "n_group": 2,
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": H,
    "num_experts_per_tok": 2,
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": H,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": Q_RANK,
    "qk_nope_head_dim": NOPE,
    "qk_rope_head_dim": ROPE,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 2,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 256,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.33.1",
    "use_cache": True,
    "v_head_dim": VALUE,
    "vocab_size": V,
}
QUANTIZATION = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
"""The released config names no module that stays in BF16."""


def shapes() -> Iterator[tuple[str, tuple[int, ...], bool]]:
    """Name and shape of every weight, and whether the release has it in FP8."""
    yield "model.embed_tokens.weight", (V, D), False
    for layer in range(LAYERS):
        yield from decoder_layer(f"model.layers.{layer}.", dense=layer < DENSE)
    yield "model.norm.weight", (D,), False
    yield "lm_head.weight", (V, D), False
    # The multi-token prediction module stands as one layer more; its embedding and head are those of the main model, once more.
    module = f"model.layers.{LAYERS}."
    yield module + "embed_tokens.weight", (V, D), False
    yield module + "enorm.weight", (D,), False
    yield module + "hnorm.weight", (D,), False
    yield module + "eh_proj.weight", (D, 2 * D), False
    yield from decoder_layer(module, dense=False)
    yield module + "shared_head.norm.weight", (D,), False
    yield module + "shared_head.head.weight", (V, D), False


def decoder_layer(prefix: str, dense: bool) -> Iterator[tuple[str, tuple[int, ...], bool]]:
    attention = prefix + "self_attn."
    yield prefix + "input_layernorm.weight", (D,), False
    yield attention + "q_a_proj.weight", (Q_RANK, D), True
    yield attention + "q_a_layernorm.weight", (Q_RANK,), False
    yield attention + "q_b_proj.weight", (H * (NOPE + ROPE), Q_RANK), True
    yield attention + "kv_a_proj_with_mqa.weight", (KV_RANK + ROPE, D), True  # 576 rows: four blocks and a half
    yield attention + "kv_a_layernorm.weight", (KV_RANK,), False
    yield attention + "kv_b_proj.weight", (H * (NOPE + VALUE), KV_RANK), True
    yield attention + "o_proj.weight", (D, H * VALUE), True
    yield prefix + "post_attention_layernorm.weight", (D,), False
    if dense:
        yield from mlp(prefix + "mlp.", WIDTH)
        return
    yield prefix + "mlp.gate.weight", (EXPERTS, D), False
    yield prefix + "mlp.gate.e_score_correction_bias", (EXPERTS,), False
    for expert in range(EXPERTS):
        yield from mlp(f"{prefix}mlp.experts.{expert}.", EXPERT)
    yield from mlp(prefix + "mlp.shared_experts.", EXPERT)


def mlp(prefix: str, width: int) -> Iterator[tuple[str, tuple[int, ...], bool]]:
    yield prefix + "gate_proj.weight", (width, D), True
    yield prefix + "up_proj.weight", (width, D), True
    yield prefix + "down_proj.weight", (D, width), True


def tensors(fp8: bool, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights; codes and scales are drawn as such, so no quantiser of ours can have chosen them."""
    random = torch.Generator().manual_seed(seed)
    found: dict[str, torch.Tensor] = {}
    for name, shape, coded in shapes():
        values = torch.randn(shape, generator=random)
        if name.endswith("e_score_correction_bias"):
            found[name] = 0.1 * values
        elif name.endswith("norm.weight"):
            found[name] = (1 + 0.1 * values).bfloat16()
        elif coded and fp8:
            found[name] = (100 * values).clamp(-448, 448).to(torch.float8_e4m3fn)
            blocks = [-(-size // 128) for size in shape]
            found[name + "_scale_inv"] = 0.001 * (0.5 + torch.rand(blocks, generator=random))
        else:
            found[name] = (0.1 * values).bfloat16()
    for again, name in (("embed_tokens", "model.embed_tokens"), ("shared_head.head", "lm_head")):
        found[f"model.layers.{LAYERS}.{again}.weight"] = found[f"{name}.weight"].clone()
    return found


def values(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the weights are: code times the scale of its block, in float32."""
    out = {}
    for name, tensor in found.items():
        if name.endswith("_scale_inv"):
            continue
        scales = found.get(name + "_scale_inv")
        if scales is None:
            out[name] = tensor.float()
        else:
            rows, columns = tensor.shape
            out[name] = tensor.float() * scales.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
    return out


def write(folder: Path, fp8: bool, seed: int = 0) -> dict[str, torch.Tensor]:
    """Config, two shards and their index, as a release has them (a tokenizer has to be added); returns what was written."""
    folder.mkdir(parents=True)
    found = tensors(fp8, seed)
    names = sorted(found)
    shards = (names[: len(names) // 2], names[len(names) // 2 :])  # a weight and its scales may stand in different files
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):06d}.safetensors"
        save_file({name: found[name] for name in shard}, folder / file)
        weight_map |= dict.fromkeys(shard, file)
    total = sum(tensor.nbytes for tensor in found.values())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(CONFIG | ({"quantization_config": QUANTIZATION} if fp8 else {})))
    return found
