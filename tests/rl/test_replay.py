"""Routing replay: the choice is frozen and nothing else, and every route is read where it belongs."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue

import numpy as np
import policies
import pytest
import torch
from made import NoFloat32, distance, gradients, make_groups, make_learner, near, padded_logp, random_routes, reference_model, routed
from transformers import AutoConfig, PreTrainedModel

from data.values import Completion, Group, Prompt, Score
from rl.advantage import group_advantage
from rl.config import AdvantageConfig, LoraConfig, LossConfig
from rl.engines.base import Event, Finished, Pulse, Request, Sampling
from rl.engines.hf import HfEngine
from rl.learner import Learner
from rl.lora import add_adapter
from rl.policy import load_model
from rl.ranks import Ranks
from rl.replay import RouteRecorder, gate_weights, moe_layers, routes_of_pass
from rl.router import gates

REWARDS = [[1, 0, 0, 1], [0, 1, 0, 0]]
ENGINE = {"kind": "dapo", "ratio_base": "engine"}


@pytest.fixture(scope="module", params=["qwen3_moe", "deepseek_v3"])
def policy(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return getattr(policies, f"tiny_{request.param}")(tmp_path_factory.mktemp("policy") / request.param, seed=0)


def own_routes(policy: Path, groups: Sequence[Group]) -> list[Group]:
    """What the policy itself chooses, one padded row at a time."""
    model = reference_model(policy)
    recorder = RouteRecorder(model)
    rows = []
    for group in groups:
        rows.append([])
        for c in group.completions:
            ids = torch.tensor([*group.prompt.token_ids, *c.token_ids[:-1]])[None].long()
            with torch.no_grad(), recorder.recording() as notes:
                model(ids)
            rows[-1].append(routes_of_pass(notes).numpy())
    return routed(groups, rows)


def test_weights_of_the_own_choice_are_the_gates_own(policy: Path) -> None:
    for gate in gates(load_model(policy, torch.float32)):
        logits_TE, weights_TK, chosen_TK = gate(torch.randn(50, 128))
        assert torch.equal(gate_weights(gate, logits_TE, chosen_TK), weights_TK)


def test_deepseeks_weights_of_a_recorded_choice_are_of_the_unbiased_scores(tmp_path: Path) -> None:
    gate = gates(load_model(policies.tiny_deepseek_v3(tmp_path / "p", seed=0), torch.float32))[0]
    logits_TE = torch.tensor([[0.0, 1.0, -1.0, 2.0, 0.0, 0.0, 0.0, 0.0]])
    gate.e_score_correction_bias.copy_(torch.arange(8.0))
    weights = gate_weights(gate, logits_TE, torch.tensor([[3, 2]]))
    high, low = torch.sigmoid(torch.tensor(2.0)), torch.sigmoid(torch.tensor(-1.0))
    assert torch.allclose(weights, gate.routed_scaling_factor * torch.stack([high, low])[None] / (high + low))


@pytest.mark.parametrize("micro_tokens", [10_000, 40])
def test_where_no_route_differs_gradients_with_and_without_replay_are_equal(policy: Path, micro_tokens: int) -> None:
    with NoFloat32():
        groups = own_routes(policy, near(make_groups(REWARDS), policy))
        plain, replayed = (
            gradients(make_learner(policy, LossConfig(**ENGINE, replay=kind), micro_tokens=micro_tokens), groups)
            for kind in ("none", "rollout")
        )
    assert distance(replayed, plain) < 1e-12


def force(model: PreTrainedModel, routes_TLK: np.ndarray) -> list[torch.utils.hooks.RemovableHandle]:
    """A padded row's own replay: layer by layer, these experts."""

    def hook(layer: int):  # type: ignore[no-untyped-def]
        chosen = torch.from_numpy(routes_TLK[:, layer].astype(np.int64))
        return lambda gate, inputs, output: (output[0], gate_weights(gate, output[0], chosen), chosen)

    return [gate.register_forward_hook(hook(layer)) for layer, gate in enumerate(gates(model))]


def test_replayed_gradients_equal_padded_rows_with_the_same_experts(policy: Path) -> None:
    """Shared prompts, several groups in a pass, random routes, also where a tool wrote: each token's experts are its own, and gates
    keep their gradient."""
    with NoFloat32():
        model = reference_model(policy)
        groups = random_routes(near(make_groups(REWARDS, tools=True), policy), len(gates(model)))
        learner = make_learner(policy, LossConfig(**ENGINE, replay="rollout"))
        ours = gradients(learner, groups)
        advantages = group_advantage(groups, AdvantageConfig())
        tokens = sum(int(c.mask.sum()) for g in groups for c in g.completions)
        for group, adv_G in zip(groups, advantages, strict=True):
            for c, adv in zip(group.completions, adv_G, strict=True):
                assert c.routes is not None
                handles = force(model, np.concatenate([c.routes[:-1], c.routes[:1]]))  # padded rows forward the last token too
                wrote = torch.from_numpy(c.mask.astype(bool))
                logp = padded_logp(model, group.prompt, c)[wrote]
                ratio = (logp - torch.from_numpy(c.engine_logp).double()[wrote]).exp()
                (-torch.minimum(ratio * adv, ratio.clamp(0.8, 1.28) * adv).sum() / tokens).backward()
                for handle in handles:
                    handle.remove()
        wanted = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
    assert distance(ours, wanted) < 1e-10
    assert all(float(ours[name].abs().max()) > 0 for name in ours if name.endswith("gate.weight"))


def test_recomputed_activations_take_the_same_routes(policy: Path) -> None:
    groups = random_routes(near(make_groups(REWARDS), policy), len(gates(reference_model(policy))))
    plain, recomputing = (make_learner(policy, LossConfig(**ENGINE, replay="rollout")) for _ in range(2))
    recomputing.model.gradient_checkpointing_enable({"use_reentrant": False})
    recomputing.model.train()
    assert distance(gradients(recomputing, groups), gradients(plain, groups)) < 1e-12


def chosen_by_pass(learner: Learner, groups: list[Group]) -> list[torch.Tensor]:
    """[T, L, K] of the pass for old log-probs and of each update, sorted, after replay has had its way."""
    recorder = RouteRecorder(learner.model)
    seen: list[torch.Tensor] = []
    with recorder.recording() as notes:
        for batches in learner.batches(groups, group_advantage(groups, AdvantageConfig())):
            learner.step(batches)
    for n in range(len(notes[0])):
        seen.append(torch.stack([layer[n] for layer in notes], dim=1).sort(-1).values)
    return seen


def test_later_updates_of_a_step_take_the_routes_of_its_start(policy: Path) -> None:
    groups = near(make_groups(REWARDS), policy)
    first, *later = chosen_by_pass(make_learner(policy, LossConfig(replay="learner"), epochs_per_batch=3, lr=0.05), groups)
    assert len(later) == 3 and all(torch.equal(first, routes) for routes in later)
    first, *later = chosen_by_pass(make_learner(policy, LossConfig(), epochs_per_batch=3, lr=0.05), groups)
    assert not torch.equal(first, later[-1]), "without replay the weights have moved far enough to flip an expert"


def test_tokens_without_valid_routes_take_the_live_router_and_are_counted(policy: Path) -> None:
    with NoFloat32():
        model = reference_model(policy)
        groups = random_routes(near(make_groups(REWARDS[:1]), policy), len(gates(model)))
        (group,) = groups
        blind = [replace(c, routes_valid=np.zeros_like(c.routes_valid)) for c in group.completions]
        live = gradients(make_learner(policy, LossConfig(**ENGINE)), groups)
        learner = make_learner(policy, LossConfig(**ENGINE, replay="rollout"))
        assert distance(gradients(learner, [replace(group, completions=tuple(blind))]), live) < 1e-12
        assert learner.replay.collect() == {"replay/live_tokens": 1.0}

        # All tokens of the last completion but one: its routes are not known.
        last = replace(group.completions[-1], routes=None, routes_valid=None)
        learner = make_learner(policy, LossConfig(**ENGINE, replay="rollout"))
        gradients(learner, [replace(group, completions=(*group.completions[:-1], last))])
        forwarded = len(group.prompt.token_ids) + sum(len(c.token_ids) - 1 for c in group.completions)
        numbers = learner.replay.collect()
        assert numbers["replay/live_tokens"] == pytest.approx((len(last.token_ids) - 1) / forwarded)
        assert 0.5 < numbers["mismatch/flipped_tokens"] <= 1.0, "two of eight experts at random are the router's own one time in 28"


def test_flips_of_the_live_router_are_counted_without_replay_too(policy: Path) -> None:
    groups = own_routes(policy, near(make_groups(REWARDS[:1]), policy))
    learner = make_learner(policy, LossConfig(**ENGINE))
    gradients(learner, groups)
    assert learner.replay.collect() == {"mismatch/flipped_tokens": 0.0, "mismatch/flipped_routes": 0.0}
    first, *others = groups[0].completions
    assert first.routes is not None
    routes = first.routes.copy()
    position = len(routes) - 2  # the last that is forwarded
    routes[position, -1] = [e for e in range(8) if e not in routes[position, -1]][:2]
    gradients(learner, [replace(groups[0], completions=(replace(first, routes=routes), *others))])
    forwarded = len(groups[0].prompt.token_ids) + sum(len(c.token_ids) - 1 for c in groups[0].completions)
    assert learner.replay.collect()["mismatch/flipped_tokens"] == pytest.approx(1 / forwarded)


def test_the_reference_of_an_adapter_reads_no_routes(policy: Path) -> None:
    groups = random_routes(near(make_groups(REWARDS), policy), len(gates(reference_model(policy))))
    found = []
    for kind in ("none", "rollout"):
        model = load_model(policy, torch.float64)
        add_adapter(model, LoraConfig(rank=2), seed=0)
        config = make_learner(policy, LossConfig()).config
        learner = Learner(model, LossConfig(kl_coef=0.1, replay=kind), config, Ranks(), temperature=0.7, max_tokens=12)
        (batch,) = next(iter(learner.batches(groups, group_advantage(groups, AdvantageConfig()))))
        found.append(batch.ref_logp_N)
    assert torch.equal(*found)


def test_routes_of_another_policy_are_refused(policy: Path) -> None:
    groups = random_routes(near(make_groups(REWARDS[:1]), policy), 5)
    with pytest.raises(ValueError, match=r"routes are of 5 layers and 2 experts a token, the policy has \d MoE layers and 2"):
        gradients(make_learner(policy, LossConfig(replay="rollout")), groups)


def test_layers_with_experts_are_known_from_the_config(policy: Path) -> None:
    assert len(moe_layers(AutoConfig.from_pretrained(policy).to_dict())) == len(gates(reference_model(policy)))
    assert moe_layers({"model_type": "deepseek_v3", "num_hidden_layers": 6, "first_k_dense_replace": 3}) == [3, 4, 5]
    qwen = {"model_type": "qwen3_moe", "num_hidden_layers": 6, "decoder_sparse_step": 2, "mlp_only_layers": [3]}
    assert moe_layers(qwen) == [1, 5]


# --- the engine ---------------------------------------------------------------------------------------------------------


def sampled(policy: Path, dtype: torch.dtype, prompts: int, max_tokens: int = 12) -> list[Group]:
    """Groups of 8 completions by the hf engine at temperature 0.7, with routes; random scores."""
    mailbox: SimpleQueue[Event] = SimpleQueue()
    engine = HfEngine("engine-0", str(policy), dtype, slots=64, returns_routes=True)
    engine.start(mailbox)
    rng, groups = np.random.default_rng(5), []
    for p in range(prompts):
        ids = rng.integers(2, 64, 6).astype(np.int32)
        engine.submit([Request(f"p{p}", f"run/p{p}/0", 0, i, 100 * p + i, ids, Sampling(max_tokens, 0.7)) for i in range(8)])
        done: list[Completion] = []
        while len(done) < 8:
            event = mailbox.get(timeout=60)
            assert isinstance(event, Finished | Pulse), event
            if isinstance(event, Finished):
                done.append(event.completion)
        done.sort(key=lambda c: c.index)
        scores = (*(Score(float(x)) for x in rng.integers(0, 2, 7)), Score(0.5))
        groups.append(Group(f"run/p{p}/0", Prompt(f"p{p}", "", "", ids), 0, tuple(done), scores))
    engine.close()
    return groups


def test_the_hf_engine_returns_the_routes_it_used(policy: Path) -> None:
    groups = sampled(policy, torch.float32, prompts=2, max_tokens=60)
    model = load_model(policy, torch.float32, attention_name="sdpa")
    recorder = RouteRecorder(model)
    assert len({len(c.token_ids) for g in groups for c in g.completions}) > 1, "rows of unlike lengths"
    for group in groups:
        for c in group.completions:
            ids = torch.tensor([*group.prompt.token_ids, *c.token_ids[:-1]])[None].long()
            with torch.no_grad(), recorder.recording() as notes:
                model(ids)
            assert c.routes is not None and c.routes_valid is not None and c.routes.dtype == np.uint8
            assert c.routes.shape[0] == len(group.prompt.token_ids) + len(c.token_ids) == len(c.routes_valid)
            assert c.routes_valid[:-1].all() and not c.routes_valid[-1]
            assert np.array_equal(np.sort(c.routes[:-1]), np.sort(routes_of_pass(notes).numpy()))


@pytest.mark.parametrize("make", [policies.tiny_qwen3_moe, policies.tiny_deepseek_v3])
def test_replay_halves_the_mismatch_of_flipped_tokens(make: Callable[..., Path], tmp_path: Path) -> None:
    """Engine in BF16, learner in FP32: mean |d log-prob| over tokens whose own position has a flipped expert in some layer."""
    policy = make(tmp_path / "policy", seed=0, layers=4)
    groups = sampled(policy, torch.bfloat16, prompts=12)
    learner = make_learner(policy, LossConfig(replay="rollout"), dtype=torch.float32)
    (batch,) = next(iter(learner.batches(groups, group_advantage(groups, AdvantageConfig()))))
    recorder = RouteRecorder(learner.model)
    with recorder.recording() as notes:
        live_N, _ = learner._logp(learner.model, batch, grad=False)
    with learner.replay.reading(batch):
        replayed_N, _ = learner._logp(learner.model, batch, grad=False)
    assert batch.routes_TLK is not None
    flipped_T = (routes_of_pass(notes).sort(-1).values != batch.routes_TLK.sort(-1).values).flatten(1).any(-1)
    flipped_N = flipped_T[batch.source_N]
    live, replayed = ((logp_N - batch.engine_logp_N).abs()[flipped_N] for logp_N in (live_N, replayed_N))
    print(f"{int(flipped_N.sum())} of {len(flipped_N)} tokens flipped; |d log-prob| {live.mean():.4f} live, {replayed.mean():.4f} replayed")
    assert len(live) >= 20
    assert replayed.mean() <= 0.5 * live.mean()
