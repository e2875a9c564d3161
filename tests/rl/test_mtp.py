"""The multi-token prediction module against the paper's formulas written out on one row at a time, in float64."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import policies
import pytest
import torch
from made import (
    MAX_TOKENS,
    TEMPERATURE,
    NoFloat32,
    deepseek_v3_with_module,
    distance,
    gradients,
    make_groups,
    make_learner,
    reference_model,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3DecoderLayer

from data.recipe import InputError
from data.values import Group, Prompt
from rl.advantage import group_advantage
from rl.attention import layout_of
from rl.batch import Normaliser, TrainBatch, items_of, pack
from rl.config import AdvantageConfig, LearnerConfig, LossConfig, MtpConfig, PolicyConfig
from rl.fp8.folder import engine_policy
from rl.learner import Learner
from rl.logp import logp_and_entropy
from rl.mtp import MtpLayer, MtpLoss, acceptance, load_mtp, mtp_hidden, mtp_layer
from rl.open_run import _check_vocabulary
from rl.policy import checkpoint_specs, checkpoint_views, load_model, save_policy
from rl.shard import output_head

REWARDS = [[1, 0, 0, 1], [0, 1, 0, 0], [1, 1, 0.5, 0]]


@pytest.fixture(autouse=True)
def no_float32() -> Iterator[None]:
    with NoFloat32():
        yield


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny DeepSeek-V3 with a module, in the published layout."""
    return deepseek_v3_with_module(tmp_path_factory.mktemp("policy") / "published", seed=0)


def batch_of(groups: list[Group], share_prompt: bool = True) -> TrainBatch:
    advantages = torch.ones(len(groups), len(groups[0].completions))
    work, normaliser = items_of(groups, advantages, False, skip_zero=False)
    return pack(work, normaliser, temperature=TEMPERATURE, max_tokens=MAX_TOKENS, share_prompt=share_prompt)


def packed_loss(model: PreTrainedModel, batch: TrainBatch, detach: bool) -> torch.Tensor:
    hidden = model.get_decoder()(
        input_ids=batch.tokens_T[None], position_ids=batch.position_T[None], use_cache=False, cohort=layout_of(batch)
    ).last_hidden_state[0]
    ahead = mtp_hidden(model, model.get_input_embeddings()(batch.tokens_T), hidden, batch, detach)
    head = output_head(model)
    return -logp_and_entropy(head, ahead, batch.target_N, TEMPERATURE, model.config.vocab_size)[0].sum()


def plain_loss(published: Path, groups: list[Group], detach: bool) -> tuple[torch.Tensor, PreTrainedModel]:
    """Equations 21 to 24 row by row, on transformers' own attention."""
    model = reference_model(published)
    load_mtp(model, published)
    layer, decoder = mtp_layer(model), model.get_decoder()
    assert isinstance(layer, MtpLayer)
    total = torch.zeros((), dtype=torch.float64)
    for group in groups:
        for c in group.completions:
            prompt = len(group.prompt.token_ids)
            ids = torch.from_numpy(np.concatenate([group.prompt.token_ids, c.token_ids]).astype(np.int64))[None]
            hidden, embedded = decoder(ids).last_hidden_state, decoder.embed_tokens(ids)
            if detach:
                hidden, embedded = hidden.detach(), embedded.detach()
            embedded = torch.cat([torch.zeros_like(embedded[:, :1]), embedded[:, 2:]], dim=1)  # that of position 0 is blanked
            x = layer.eh_proj(torch.cat([layer.enorm(embedded), layer.hnorm(hidden[:, :-1])], dim=-1))
            position = torch.arange(x.shape[1])[None]
            mask = torch.full((x.shape[1],) * 2, -torch.inf, dtype=torch.float64).triu(1)[None, None]
            rotary = decoder.rotary_emb(x, position)
            out = DeepseekV3DecoderLayer.forward(layer, x, attention_mask=mask, position_ids=position, position_embeddings=rotary)
            logits = model.lm_head(layer.shared_head["norm"](out))[0] / TEMPERATURE
            # Row r has read tokens 0 to r+1 and predicts token r+2: completion tokens from the prompt's last but one on.
            logp = logits[prompt - 2 : -1].log_softmax(-1).gather(-1, ids[0, prompt:, None]).squeeze(-1)
            total = total - logp[torch.from_numpy(c.mask.astype(bool))].sum()
    return total, model


def grads(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("share_prompt", [True, False], ids=["shared", "unshared"])
@pytest.mark.parametrize("detach", [True, False], ids=["detached", "through"])
def test_loss_and_gradients_equal_the_plain_formulas(published: Path, detach: bool, share_prompt: bool) -> None:
    groups = make_groups(REWARDS, tools=True)
    model = load_model(published, torch.float64)
    loss = packed_loss(model, batch_of(groups, share_prompt), detach)
    loss.backward()
    expected, reference = plain_loss(published, groups, detach)
    expected.backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-12)
    assert distance(grads(model), grads(reference)) < 1e-10
    trunk = {name: grad for name, grad in grads(model).items() if "layers.2." not in name and name != "lm_head.weight"}
    assert all(grad.any() for grad in trunk.values() if grad.dim() == 2) != detach


def test_a_checkpoint_with_the_module_goes_round_bit_by_bit_in_the_published_names(published: Path, tmp_path: Path) -> None:
    saved = load_file(published / "model.safetensors")
    module = {name.removeprefix("model.layers.2.") for name in saved if name.startswith("model.layers.2.")}
    assert {"enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight", "shared_head.head.weight"} <= module
    assert {"embed_tokens.weight", "mlp.experts.7.down_proj.weight", "mlp.gate.e_score_correction_bias"} <= module
    assert torch.equal(saved["model.layers.2.shared_head.head.weight"], saved["lm_head.weight"])
    model = load_model(published, torch.float32)
    assert model.config.num_nextn_predict_layers == 1
    save_policy(tmp_path, checkpoint_views(model), model, AutoTokenizer.from_pretrained(published))
    again = load_file(tmp_path / "model.safetensors")
    assert saved.keys() == again.keys() and all(torch.equal(saved[name], again[name]) for name in saved)
    assert {name: shape for name, _, shape in checkpoint_specs(model)} == {name: tuple(t.shape) for name, t in saved.items()}


def test_in_block_fp8_the_module_is_coded_too_but_for_its_projection(published: Path, tmp_path: Path) -> None:
    folder = engine_policy(PolicyConfig(path=str(published), precision="fp8"), published, tmp_path / "coded")
    saved = load_file(folder / "model.safetensors")
    name = "model.layers.2.self_attn.o_proj.weight"
    assert saved[name].dtype is torch.float8_e4m3fn and saved["model.layers.2.eh_proj.weight"].dtype is torch.bfloat16
    layer = mtp_layer(load_model(folder, torch.float32))
    assert layer is not None
    values = saved[name].float() * saved[f"{name}_scale_inv"].repeat_interleave(128, 0).repeat_interleave(128, 1)
    assert torch.equal(layer.self_attn.o_proj.weight, values)
    assert torch.equal(layer.eh_proj.weight, saved["model.layers.2.eh_proj.weight"].float())


def test_the_trunk_is_what_transformers_loads_from_the_same_folder(published: Path) -> None:
    ids = torch.arange(2, 12)[None]
    ours = load_model(published, torch.float64, attention_name="sdpa")
    theirs = AutoModelForCausalLM.from_pretrained(published, dtype=torch.float64, experts_implementation="eager").eval()
    assert torch.equal(ours(ids).logits, theirs(ids).logits)


def test_a_folder_that_lost_its_module_says_so_no_more(published: Path, tmp_path: Path) -> None:
    """transformers drops the module and keeps the number of it."""
    AutoModelForCausalLM.from_pretrained(published).save_pretrained(tmp_path)
    model = load_model(tmp_path, torch.float32)
    assert mtp_layer(model) is None and model.config.num_nextn_predict_layers == 0


def test_a_module_with_a_hole_is_refused(published: Path, tmp_path: Path) -> None:
    tensors = load_file(published / "model.safetensors")
    for file in published.glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    del tensors["model.layers.2.mlp.experts.3.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"model\.layers\.2\.mlp\.experts\.3\.up_proj\.weight is missing"):
        load_model(tmp_path, torch.float32)


def test_a_prompt_of_one_token_is_refused(published: Path) -> None:
    groups = make_groups([[1, 0]], prompt_tokens=1)
    model = load_model(published, torch.float64)
    with pytest.raises(ValueError, match="a prompt of one token"):
        packed_loss(model, batch_of(groups), detach=True)


def test_a_prompt_of_one_token_is_found_before_a_run_begins() -> None:
    recipe = SimpleNamespace(learner=LearnerConfig(mtp=MtpConfig(weight=0.1)))
    run = SimpleNamespace(recipe=recipe, learner=SimpleNamespace(model=SimpleNamespace(config=SimpleNamespace(vocab_size=64))))
    with pytest.raises(InputError, match=r"learner\.mtp\.weight: prompt 'short' has one token"):
        _check_vocabulary([Prompt("long", "", "", np.array([1, 2])), Prompt("short", "", "", np.array([1]))], run)  # type: ignore[arg-type]


def test_a_pass_of_weight_zero_runs_the_module_too(published: Path) -> None:
    model = load_model(published, torch.float64)
    empty = pack([], Normaliser(1.0, 1.0), temperature=TEMPERATURE, max_tokens=MAX_TOKENS)
    assert float(packed_loss(model, empty, detach=True).detach()) == 0.0


def test_acceptance_is_the_overlap_of_draft_and_policy() -> None:
    head = torch.nn.Linear(3, 3, bias=False)
    head.weight.data = torch.eye(3)
    p, q = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.8, 0.1]]), torch.tensor([[0.2, 0.3, 0.5], [0.1, 0.8, 0.1]])
    assert acceptance(head, p.log(), q.log(), 1.0) == pytest.approx(((0.2 + 0.3 + 0.2) + 1.0) / 2)


def steps(learner: Learner, count: int) -> list[dict[str, float]]:
    groups = make_groups(REWARDS)
    rows = []
    for _ in range(count):
        for batch in learner.batches(groups, group_advantage(groups, AdvantageConfig())):
            learner.step(batch)
        rows.append(learner.mtp_loss.collect())
    return rows


def test_a_detached_module_learns_beside_a_policy_that_does_not_notice(published: Path) -> None:
    with_module = make_learner(published, LossConfig(), mtp=MtpConfig(weight=0.3), lr=3e-3, micro_tokens=40, max_grad_norm=0.01)
    without = make_learner(published, LossConfig(), lr=3e-3, micro_tokens=40, max_grad_norm=0.01)
    rows = steps(with_module, 30)
    steps(without, 30)
    policies_differ = [
        name
        for (name, one), (_, other) in zip(with_module.model.named_parameters(), without.model.named_parameters(), strict=True)
        if not torch.equal(one, other)
    ]
    assert policies_differ and all(name.startswith("model.layers.2.") for name in policies_differ)
    assert rows[-1]["mtp/loss"] < 0.5 * rows[0]["mtp/loss"]


def test_with_weight_zero_gradients_are_those_of_the_policy_without_the_module(published: Path) -> None:
    """To the bit; and with a weight, not detached, they are not."""
    groups = make_groups(REWARDS)
    alone = gradients(make_learner(published.parent / "published-trunk", LossConfig()), groups)
    beside = gradients(make_learner(published, LossConfig()), groups)
    assert alone.keys() <= beside.keys() and all(torch.equal(alone[name], beside[name]) for name in alone)
    through = gradients(make_learner(published, LossConfig(), mtp=MtpConfig(weight=0.3, detach=False)), groups)
    assert distance({name: through[name] for name in alone}, alone) > 0.01


def test_numbers_of_the_module_do_not_depend_on_how_a_step_is_cut(published: Path) -> None:
    one, many = (make_learner(published, LossConfig(), mtp=MtpConfig(weight=0.3), micro_tokens=n) for n in (10_000, 30))
    (first,), (second,) = steps(one, 1), steps(many, 1)
    assert first.keys() == {"mtp/loss", "mtp/acceptance"}
    assert all(first[name] == pytest.approx(second[name], rel=1e-10) for name in first)
    assert 0.0 < first["mtp/acceptance"] < 1.0


def test_a_policy_without_the_module_cannot_train_it(tmp_path: Path) -> None:
    learner = make_learner(policies.tiny_deepseek_v3(tmp_path, seed=0), LossConfig())
    with pytest.raises(InputError, match=r"learner\.mtp\.weight"):
        MtpLoss(learner.model, MtpConfig(weight=0.1), learner.ranks)
