"""Adapters: gradients, the reference, and what leaves the learner merged."""

from pathlib import Path

import policies
import pytest
import torch
from made import TEMPERATURE, NoFloat32, deepseek_v3_with_module, distance, make_groups, near, padded_logp, reference_model
from peft.tuners.tuners_utils import BaseTunerLayer

from data.recipe import InputError
from rl.advantage import group_advantage
from rl.config import AdvantageConfig, LearnerConfig, LoraConfig, LossConfig
from rl.learner import Learner
from rl.lora import adapter_layers, adapter_off, add_adapter
from rl.policy import checkpoint_views, load_model
from rl.ranks import Ranks

REWARDS = [[1, 0, 0, 1], [0, 1, 0, 0]]
LORA = LoraConfig(rank=4, alpha=8)


@pytest.fixture(scope="module", params=["qwen3_moe", "deepseek_v3"])
def policy(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return getattr(policies, f"tiny_{request.param}")(tmp_path_factory.mktemp("policy") / request.param, seed=0)


def adapted(policy: Path, loss: LossConfig, dtype: torch.dtype = torch.float64, moved: bool = True) -> Learner:
    model = load_model(policy, dtype)
    add_adapter(model, LORA, seed=0)
    if moved:  # B begins at zero, where A has no gradient
        torch.manual_seed(1)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_B" in name:
                    p.normal_(std=0.05)
    config = LearnerConfig(lr=1e-2, warmup_steps=0)
    return Learner(model, loss, config, Ranks(), temperature=TEMPERATURE, max_tokens=12)


def test_a_new_adapter_changes_nothing_and_alone_is_trained(policy: Path) -> None:
    learner = adapted(policy, LossConfig(), torch.float32, moved=False)
    plain = dict(checkpoint_views(load_model(policy, torch.float32)))
    merged = dict(learner.export())
    assert merged.keys() == plain.keys()
    assert all(torch.equal(merged[name], plain[name]) for name in plain)
    assert {"lora_A", "lora_B"} == {name.split(".")[-3] for name, _ in learner.optim.parameters}


def test_all_linear_is_all_but_the_output_head(policy: Path) -> None:
    """Dense layers and shared experts too, whose names peft takes for the experts'."""
    learner = adapted(policy, LossConfig(), torch.float32)
    head = learner.model.get_output_embeddings()
    linear = {
        f"{name.removesuffix('.base_layer')}.weight"
        for name, module in learner.model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head and "lora_" not in name
    }
    assert linear <= adapter_layers(learner.model).keys()


@pytest.mark.parametrize("targets", [["nope"], ["up_proj"]])
def test_targets_that_cannot_be_adapted_are_a_mistake_in_one_line(targets: list[str], tmp_path: Path) -> None:
    model = load_model(policies.tiny_deepseek_v3(tmp_path / "policy", seed=0), torch.float32)
    with pytest.raises(InputError, match=r"^policy.lora.targets: \['\w+'\]: .*$"):
        add_adapter(model, LoraConfig(targets=targets), seed=0)


def test_of_a_module_with_an_adapter_the_adapter_alone_is_trained(tmp_path: Path) -> None:
    model = load_model(deepseek_v3_with_module(tmp_path / "policy", seed=0), torch.float32)
    add_adapter(model, LORA, seed=0)
    config = LearnerConfig(mtp={"weight": 0.1})
    learner = Learner(model, LossConfig(), config, Ranks(), temperature=TEMPERATURE, max_tokens=12)
    names = [name for name, _ in learner.optim.parameters]
    assert all("lora_" in name for name in names)
    assert any(name.startswith(f"model.layers.{model.config.num_hidden_layers}.") for name in names)


def test_gradients_of_an_adapter_equal_the_padded_reference(policy: Path) -> None:
    """Old log-probs unlike the current ones, a KL to the policy without its adapter."""
    with NoFloat32():
        groups = near(make_groups(REWARDS), policy)
        learner = adapted(policy, LossConfig(kind="dapo", ratio_base="engine", kl_coef=0.1))
        advantages = group_advantage(groups, AdvantageConfig())
        batch = next(iter(learner.batches(groups, advantages)))[0]
        from rl.loss import policy_loss

        logp_N, _ = learner._logp(learner.model, batch, grad=True)
        policy_loss(batch, logp_N, None, learner.loss, batch.ref_logp_N).loss.backward()
        ours = {name: p.grad.clone() for name, p in learner.optim.parameters}

        model = reference_model(policy)
        add_adapter(model, LORA, seed=0)
        model.load_state_dict(learner.model.state_dict())
        base = reference_model(policy)
        tokens = sum(len(c.token_ids) for g in groups for c in g.completions)
        loss = torch.zeros((), dtype=torch.float64)
        for group, adv_G in zip(groups, advantages, strict=True):
            for c, adv in zip(group.completions, adv_G, strict=True):
                logp = padded_logp(model, group.prompt, c)
                ratio = (logp - torch.from_numpy(c.engine_logp).double()).exp()
                d = padded_logp(base, group.prompt, c).detach() - logp
                term = -torch.minimum(ratio * adv, ratio.clamp(0.8, 1.28) * adv) + 0.1 * (d.exp() - d - 1)
                loss = loss + term.sum() / tokens
        loss.backward()
    theirs = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert distance(ours, theirs) < 1e-10


def test_what_leaves_the_learner_is_the_merged_policy(policy: Path) -> None:
    learner = adapted(policy, LossConfig(), torch.float32)
    before = {name: p.clone() for name, p in learner.model.named_parameters()}
    merged = load_model(policy, torch.float32)
    views = dict(checkpoint_views(merged))
    with torch.no_grad():
        for name, tensor in learner.export():
            views[name].copy_(tensor)
    groups = make_groups(REWARDS)
    advantages = group_advantage(groups, AdvantageConfig())
    batch = next(iter(learner.batches(groups, advantages)))[0]
    adapter, _ = learner._logp(learner.model, batch, grad=False)
    whole, _ = learner._logp(merged, batch, grad=False)
    with adapter_off(learner.model):
        off, _ = learner._logp(learner.model, batch, grad=False)
    assert (adapter - whole).abs().max() < 1e-4
    assert (adapter - off).abs().max() > 1e-2
    assert all(torch.equal(before[name], p) for name, p in learner.model.named_parameters()), "the policy itself is never merged"
    assert any(isinstance(m, BaseTunerLayer) for m in learner.model.modules())
