"""The learner's gradients against transformers' padded, unshared forward, in float64."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import policies
import pytest
import torch
from made import (
    MAX_TOKENS,
    NoFloat32,
    distance,
    gradients,
    make_groups,
    make_learner,
    near,
    padded_logp,
    reference_model,
)
from transformers import AutoTokenizer

from data.values import Group
from rl.advantage import group_advantage
from rl.batch import Item, Normaliser, items_of, pack
from rl.config import AdvantageConfig, LossConfig
from rl.policy import save_policy
from rl.router import gates
from rl.stream import RunStopped

REWARDS = [[1, 0, 0, 1], [0, 1, 0, 0], [1, 1, 0.5, 0]]
KINDS = ("grpo", "dr_grpo", "dapo", "gspo", "cispo")


@pytest.fixture(autouse=True)
def no_float32() -> Iterator[None]:
    with NoFloat32():
        yield


def _all_items(groups: list[Group]) -> tuple[list[list[Item]], Normaliser]:
    return items_of(groups, group_advantage(groups, AdvantageConfig()), mask_truncated=False, skip_zero=False)


@pytest.fixture(scope="module", params=["qwen3_moe", "deepseek_v3", "qwen3"])
def policy(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return getattr(policies, f"tiny_{request.param}")(tmp_path_factory.mktemp("policy") / request.param, seed=0)


@pytest.fixture(scope="module", params=["qwen3_moe", "deepseek_v3"])
def moe(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return getattr(policies, f"tiny_{request.param}")(tmp_path_factory.mktemp("policy") / request.param, seed=0)


def reference_gradients(policy: Path, groups: list[Group], loss: LossConfig, kl_policy: Path | None) -> dict[str, torch.Tensor]:
    """The papers' formulas written once more, row by row, on the padded model."""
    model = reference_model(policy)
    kl_model = reference_model(kl_policy) if kl_policy else None
    adv_PG = group_advantage(groups, AdvantageConfig())
    rows = [
        (group, c, float(a)) for group, adv_G in zip(groups, adv_PG, strict=True) for c, a in zip(group.completions, adv_G, strict=True)
    ]
    kept = [row for row in rows if not (loss.mask_truncated and row[1].finish_reason == "length")]
    tokens = sum(int(c.mask.sum()) for _, c, _ in kept)
    total = torch.zeros((), dtype=torch.float64)
    for group, c, adv in kept:
        wrote = torch.from_numpy(c.mask.astype(bool))
        logp = padded_logp(model, group.prompt, c)[wrote]
        old = torch.from_numpy(c.engine_logp.astype(np.float64))[wrote]
        log_ratio = logp - old
        if loss.kind == "gspo":
            log_ratio = log_ratio.mean().expand(len(logp))
        ratio = log_ratio.exp()
        if loss.kind == "cispo":
            term = -ratio.detach().clamp(max=1 + loss.clip_high) * adv * logp
        else:
            clipped = ratio.clamp(1 - loss.clip_low, 1 + loss.clip_high)
            term = -torch.minimum(ratio * adv, clipped * adv)
        if kl_model is not None:
            d = padded_logp(kl_model, group.prompt, c).detach()[wrote] - logp
            kl = {"k1": -d, "k2": d**2 / 2, "k3": d.exp() - d - 1}[loss.kl]
            term = term + loss.kl_coef * kl
        if loss.kind in ("grpo", "gspo"):
            total = total + term.mean() / len(rows)
        elif loss.kind == "dr_grpo":
            total = total + term.sum() / (len(rows) * MAX_TOKENS)
        else:
            total = total + term.sum() / tokens
    total.backward()
    return {name: p.grad if p.grad is not None else torch.zeros_like(p) for name, p in model.named_parameters()}


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_equal_the_padded_unshared_reference(policy: Path, kind: str) -> None:
    groups = near(make_groups(REWARDS), policy)
    loss = LossConfig(kind=kind, ratio_base="engine")
    ours = gradients(make_learner(policy, loss), groups)
    assert distance(ours, reference_gradients(policy, groups, loss, None)) < 1e-10


@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
def test_gradients_with_a_kl_term_equal_the_reference(moe: Path, tmp_path: Path, kl: str) -> None:
    other = getattr(policies, f"tiny_{moe.name}")(tmp_path / "other", seed=1)
    groups = near(make_groups(REWARDS), moe)
    loss = LossConfig(kind="dapo", ratio_base="engine", kl_coef=0.1, kl=kl)
    ours = gradients(make_learner(moe, loss, reference=other), groups)
    assert distance(ours, reference_gradients(moe, groups, loss, other)) < 1e-10


@pytest.mark.parametrize("kind", ["grpo", "dapo"])
def test_truncated_completions_teach_nothing_if_masked(moe: Path, kind: str) -> None:
    groups = near(make_groups(REWARDS, truncate=True), moe)
    loss = LossConfig(kind=kind, ratio_base="engine", mask_truncated=True)
    ours = gradients(make_learner(moe, loss), groups)
    assert distance(ours, reference_gradients(moe, groups, loss, None)) < 1e-10


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_tool_wrote_is_read_and_neither_trained_nor_asked_for_a_log_prob(moe: Path, kind: str) -> None:
    groups = near(make_groups(REWARDS, seed=3, tools=True), moe)
    assert any(np.isnan(c.engine_logp).any() for g in groups for c in g.completions)
    loss = LossConfig(kind=kind, ratio_base="engine")
    ours = gradients(make_learner(moe, loss, micro_tokens=40), groups)
    assert distance(ours, reference_gradients(moe, groups, loss, None)) < 1e-10


def test_targets_of_a_pass_are_what_the_policy_wrote_and_all_of_it_is_forwarded() -> None:
    groups = make_groups(REWARDS, seed=3, tools=True)
    first = next(c for c in groups[0].completions if not c.mask.all())
    batch = pack(*_all_items(groups), temperature=1.0, max_tokens=MAX_TOKENS)
    assert len(batch.target_N) == sum(int(c.mask.sum()) for g in groups for c in g.completions)
    own = batch.target_N[batch.completion_N == list(groups[0].completions).index(first)]
    assert own.tolist() == first.token_ids[first.mask == 1].tolist() and bool(torch.isfinite(batch.engine_logp_N).all())
    assert len(batch.tokens_T) == sum(len(g.prompt.token_ids) + sum(len(c.token_ids) - 1 for c in g.completions) for g in groups)


def test_clipping_is_active_in_these_tests(moe: Path) -> None:
    groups = near(make_groups(REWARDS), moe)
    wide = LossConfig(kind="dapo", ratio_base="engine", clip_low=1.0, clip_high=1e9)
    narrow = LossConfig(kind="dapo", ratio_base="engine")
    assert distance(gradients(make_learner(moe, narrow), groups), gradients(make_learner(moe, wide), groups)) > 0.01


def test_micro_batches_change_nothing(moe: Path) -> None:
    groups = near(make_groups(REWARDS * 2), moe)
    loss = LossConfig(kind="grpo", ratio_base="engine")
    whole = gradients(make_learner(moe, loss), groups)
    learner = make_learner(moe, loss, micro_tokens=45)
    advantages = group_advantage(groups, AdvantageConfig())
    assert len(next(iter(learner.batches(groups, advantages)))) >= 4
    assert distance(gradients(learner, groups), whole) < 1e-10


def test_groups_of_equal_rewards_are_not_forwarded_but_counted(moe: Path) -> None:
    groups = near(make_groups([*REWARDS, [1, 1, 1, 1], [0, 0, 0, 0]]), moe)
    loss = LossConfig(kind="dapo", ratio_base="engine")
    learner = make_learner(moe, loss)
    batches = next(iter(learner.batches(groups, group_advantage(groups, AdvantageConfig()))))
    assert sum(batch.completions for batch in batches) == 12
    assert distance(gradients(make_learner(moe, loss), groups), reference_gradients(moe, groups, loss, None)) < 1e-10


def test_on_policy_gradient_is_reinforce(moe: Path) -> None:
    """With old_logp the pass's own, the ratio is 1 and its gradient is that of log p times the advantage."""
    groups = make_groups(REWARDS)
    ours = gradients(make_learner(moe, LossConfig(kind="dapo", correction="none")), groups)
    model = reference_model(moe)
    tokens = sum(len(c.token_ids) for g in groups for c in g.completions)
    loss = torch.zeros((), dtype=torch.float64)
    for group, adv_G in zip(groups, group_advantage(groups, AdvantageConfig()), strict=True):
        for c, adv in zip(group.completions, adv_G, strict=True):
            loss = loss - adv * padded_logp(model, group.prompt, c).sum() / tokens
    loss.backward()
    assert distance(ours, {n: p.grad for n, p in model.named_parameters()}) < 1e-10


def test_without_prompt_sharing_gradients_are_the_same(moe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import rl.learner

    groups = near(make_groups(REWARDS), moe)
    loss = LossConfig(kind="gspo", ratio_base="engine")
    shared = gradients(make_learner(moe, loss), groups)
    pack = rl.learner.pack
    monkeypatch.setattr(rl.learner, "pack", lambda *a, **k: pack(*a, **k, share_prompt=False))
    assert distance(gradients(make_learner(moe, loss), groups), shared) < 1e-10


def test_activation_checkpointing_changes_no_gradient(moe: Path) -> None:
    groups = near(make_groups(REWARDS), moe)
    loss = LossConfig(kind="dapo", ratio_base="engine")
    plain = gradients(make_learner(moe, loss, dtype=torch.float32), groups)
    learner = make_learner(moe, loss, dtype=torch.float32)
    learner.model.gradient_checkpointing_enable({"use_reentrant": False})
    learner.model.train()
    assert distance(gradients(learner, groups), plain) < 1e-6


def test_activation_checkpointing_keeps_less_than_half(moe: Path) -> None:
    """Bytes that autograd keeps of the decoder's pass; with checkpointing only what goes into each layer, before its backward begins."""
    groups = near(make_groups(REWARDS * 4), moe)
    kept = []
    for on in (False, True):
        learner = make_learner(moe, LossConfig(kind="dapo", ratio_base="engine"), dtype=torch.float32)
        if on:
            learner.model.gradient_checkpointing_enable({"use_reentrant": False})
            learner.model.train()
        parameters = {p.untyped_storage().data_ptr() for p in learner.model.parameters()}
        tensors: dict[int, torch.Tensor] = {}

        def keep(x: torch.Tensor, tensors: dict[int, torch.Tensor] = tensors) -> torch.Tensor:
            tensors[x.untyped_storage().data_ptr()] = x
            return x

        batch = next(iter(learner.batches(groups, group_advantage(groups, AdvantageConfig()))))[0]
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            of_pass = learner._logp(learner.model, batch, grad=True)
        assert of_pass[0].requires_grad
        kept.append(sum(x.untyped_storage().nbytes() for place, x in tensors.items() if place not in parameters))
    assert kept[1] < 0.5 * kept[0], kept


def test_tokens_routed_to_each_expert_count_as_if_every_completion_had_its_own_prompt(moe: Path) -> None:
    """What an auxiliary loss counts: a shared prompt is routed once and its tokens stand for G; `count_T` says so."""
    groups = make_groups(REWARDS)
    learner = make_learner(moe, LossConfig())
    work, normaliser = items_of(groups, group_advantage(groups, AdvantageConfig()), False, True)
    loads = []
    for shared in (True, False):
        batch = pack(work, normaliser, temperature=1.0, max_tokens=MAX_TOKENS, share_prompt=shared)
        chosen: list[torch.Tensor] = []

        def note(_module: object, _inputs: object, out: tuple[torch.Tensor, ...], chosen: list[torch.Tensor] = chosen) -> None:
            chosen.append(out[-1])

        hooks = [gate.register_forward_hook(note) for gate in gates(learner.model)]
        learner._logp(learner.model, batch, grad=False)
        for hook in hooks:
            hook.remove()
        assert len(chosen) == len(hooks) > 0 and chosen[0].shape == (len(batch.tokens_T), 2)
        loads.append([torch.zeros(8, dtype=torch.int64).index_add(0, e.flatten(), batch.count_T.repeat_interleave(2)) for e in chosen])
    assert all(torch.equal(a, b) for a, b in zip(*loads, strict=True))
    tokens = sum(len(g.prompt.token_ids) + len(c.token_ids) - 1 for g in groups for c in g.completions)
    assert all(int(load.sum()) == 2 * tokens for load in loads[0])
    forwarded = sum(len(g.prompt.token_ids) + sum(len(c.token_ids) - 1 for c in g.completions) for g in groups)
    assert forwarded < tokens


def test_several_updates_keep_the_log_probs_of_before_the_first(moe: Path) -> None:
    """Two optimizer steps a batch: the second one's old_logp is that of the weights before the first."""
    groups = make_groups([*REWARDS, [0, 0, 1, 1]])
    learner = make_learner(moe, LossConfig(kind="dapo", correction="none"), steps_per_batch=2, lr=1e-2)
    advantages = group_advantage(groups, AdvantageConfig())
    steps = learner.batches(groups, advantages)
    first = next(steps)
    want = [padded_logp(reference_model(moe), groups[2].prompt, c).detach() for c in groups[2].completions]
    learner.step(first)
    second = next(steps)[0]
    moved = learner._logp(learner.model, second, grad=False)[0]
    by_length = {len(w): w for w in want}
    got = second.old_logp_N
    assert got is not None
    found = [got[second.completion_N == b] for b in range(second.completions)]
    matched = [f for f in found if len(f) in by_length and torch.allclose(f, by_length[len(f)], atol=1e-10)]
    assert len(matched) >= 3
    assert (moved - got).abs().max() > 1e-3


def test_a_step_raises_what_was_better(moe: Path, tmp_path: Path) -> None:
    groups = make_groups([[1, 0, 0, 0]])
    learner = make_learner(moe, LossConfig(kind="dapo", correction="none"), dtype=torch.float32, lr=1e-3)
    before = padded_logp(reference_model(moe), groups[0].prompt, groups[0].completions[0]).sum()
    for batches in learner.batches(groups, group_advantage(groups, AdvantageConfig())):
        learner.step(batches)
    save_policy(tmp_path / "after", learner.export(), learner.model, AutoTokenizer.from_pretrained(moe))
    after = padded_logp(reference_model(tmp_path / "after"), groups[0].prompt, groups[0].completions[0]).sum()
    assert after > before + 0.1


@pytest.mark.parametrize("steps", [1, 2], ids=["nothing of the step", "nothing of one of two updates"])
def test_a_step_without_a_completion_to_train_leaves_the_policy_whole(steps: int, tmp_path: Path) -> None:
    """All cut off, under DAPO's filter, and a loss of the router that counts what was forwarded: 0 of it."""
    policy = policies.tiny_qwen3_moe(tmp_path / "policy", seed=0)
    loss = LossConfig(kind="dapo", ratio_base="engine", mask_truncated=True)
    learner = make_learner(policy, loss, router={"aux_loss": 1e-3}, steps_per_batch=steps)
    groups = make_groups([[1, 0]] * 2)
    cut = [replace(g, completions=tuple(replace(c, finish_reason="length") for c in g.completions)) for g in groups]
    groups = cut if steps == 1 else [groups[0], cut[1]]
    for batches in learner.batches(groups, group_advantage(groups, AdvantageConfig())):
        learner.step(batches)
    assert all(p.isfinite().all() for p in learner.model.parameters())


def test_a_gradient_that_is_no_number_stops_the_run_before_the_update(moe: Path) -> None:
    learner = make_learner(moe, LossConfig(kind="dapo"))
    groups = make_groups([[1, 0, 0, 1]])
    before = {name: p.detach().clone() for name, p in learner.model.named_parameters()}
    learner.model.get_input_embeddings().weight.register_hook(lambda grad: grad * torch.nan)
    with pytest.raises(RunStopped, match="step 0: the gradient's norm is nan, so the policy was not updated"):
        for batches in learner.batches(groups, group_advantage(groups, AdvantageConfig())):
            learner.step(batches)
    assert all(torch.equal(p, before[name]) for name, p in learner.model.named_parameters())
