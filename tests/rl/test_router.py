"""Routers: what load is counted and how often, and what keeps it even."""

from pathlib import Path

import numpy as np
import policies
import pytest
import torch
from bench.router_balance import curve
from made import NoFloat32, distance, gradients, make_groups, make_learner, reference_model
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from data.values import Completion, Group
from rl.advantage import group_advantage
from rl.checkpoint import Checkpoints
from rl.config import AdvantageConfig, LearnerConfig, LoraConfig, LossConfig, RouterConfig
from rl.learner import Learner
from rl.lora import add_adapter
from rl.policy import checkpoint_views, load_model, load_tokenizer, save_policy
from rl.ranks import Ranks
from rl.router import collapsed, cut_router, gates, load_numbers

REWARDS = [[1, 0, 0, 1], [0, 1, 0, 0], [1, 1, 1, 1]]


@pytest.fixture(scope="module", params=["qwen3_moe", "deepseek_v3"])
def policy(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return getattr(policies, f"tiny_{request.param}")(tmp_path_factory.mktemp("policy") / request.param, seed=0)


def test_load_numbers_by_hand() -> None:
    numbers = load_numbers(torch.tensor([[4.0, 4.0, 4.0, 4.0], [10.0, 6.0, 0.0, 0.0]], dtype=torch.float64))
    assert numbers["moe/max_violation"] == pytest.approx(10 / 4 - 1)
    assert numbers["moe/dead_experts"] == 2 / 8
    even, uneven = 1.0, -(0.625 * -0.678071905 + 0.375 * -1.415037499) / 2  # in units of log 4: log2 over 2
    assert numbers["moe/load_entropy"] == pytest.approx((even + uneven) / 2, rel=1e-6)


def loads_of_padded_rows(policy: Path, groups: list[Group]) -> torch.Tensor:
    """Each completion forwarded alone, with its prompt: [L, E]."""
    model = load_model(policy, torch.float64, attention_name="eager")
    loads: list[torch.Tensor] = [torch.zeros(1)] * len(gates(model))

    def counter(layer: int):  # type: ignore[no-untyped-def]
        def count(module, inputs, output) -> None:  # type: ignore[no-untyped-def]
            loads[layer] = loads[layer] + torch.bincount(output[2].flatten(), minlength=output[0].shape[-1])

        return count

    for layer, gate in enumerate(gates(model)):
        gate.register_forward_hook(counter(layer))
    for group in groups:
        for completion in group.completions:
            row = torch.tensor([*group.prompt.token_ids, *completion.token_ids[:-1]])
            model(row[None].long())
    return torch.stack(loads).double()


@pytest.mark.parametrize(("steps", "epochs"), [(1, 1), (2, 3)])
def test_each_token_is_counted_once_a_step_and_a_shared_prompt_once_a_completion(policy: Path, steps: int, epochs: int) -> None:
    groups = make_groups(REWARDS)
    learner = make_learner(policy, LossConfig(), steps_per_batch=steps, epochs_per_batch=epochs, micro_tokens=40, lr=1e-9)
    run_step(learner, groups)
    expected = loads_of_padded_rows(policy, groups[:2])  # the third teaches nothing and is not forwarded
    assert learner.router.load_LE is not None and torch.equal(learner.router.load_LE, expected)
    assert learner.router.numbers() == load_numbers(expected) | {"moe/skipped_groups": 1 / 3}
    run_step(learner, groups)
    assert torch.equal(learner.router.load_LE, expected), "each step counts anew"


def run_step(learner: Learner, groups: list[Group]) -> None:
    for batch in learner.batches(groups, group_advantage(groups, AdvantageConfig())):
        learner.step(batch)


def test_a_dense_policy_has_no_router_numbers(tmp_path: Path) -> None:
    learner = make_learner(policies.tiny_qwen3(tmp_path / "dense", seed=0), LossConfig())
    assert gates(learner.model) == []
    run_step(learner, make_groups(REWARDS))
    assert learner.router.numbers() == {}


def test_recomputed_activations_are_not_counted_twice(policy: Path) -> None:
    plain, recomputing = make_learner(policy, LossConfig()), make_learner(policy, LossConfig())
    recomputing.model.gradient_checkpointing_enable({"use_reentrant": False})
    recomputing.model.train()
    groups = make_groups(REWARDS)
    for learner in (plain, recomputing):
        run_step(learner, groups)
    assert recomputing.router.numbers() == plain.router.numbers() != {}


# --- the bias -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return policies.tiny_deepseek_v3(tmp_path_factory.mktemp("policy") / "v3", seed=0, layers=3)


def biases(learner: Learner) -> torch.Tensor:
    """[L, E]."""
    return torch.stack([gate.e_score_correction_bias for gate in learner.router.gates]).clone()


@pytest.mark.parametrize(("steps", "epochs"), [(1, 1), (2, 2)])
def test_the_bias_moves_once_a_step_against_each_experts_load(deepseek: Path, steps: int, epochs: int) -> None:
    router = RouterConfig(bias_step=0.01)
    learner = make_learner(
        deepseek, LossConfig(), dtype=torch.float32, steps_per_batch=steps, epochs_per_batch=epochs, router=router, micro_tokens=40
    )
    groups = make_groups(REWARDS)
    before = biases(learner)
    run_step(learner, groups)
    load_LE = learner.router.load_LE
    assert load_LE is not None and torch.equal(load_LE, loads_of_padded_rows(deepseek, groups[:2]))
    wanted = before + 0.01 * (load_LE.mean(1, keepdim=True) - load_LE).sign().float()
    assert torch.equal(biases(learner), wanted) and not torch.equal(wanted, before)
    run_step(make_learner(deepseek, LossConfig(), dtype=torch.float32), groups)
    assert torch.equal(before, biases(make_learner(deepseek, LossConfig(), dtype=torch.float32))), "without a step nothing moves"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bias_leaves_with_the_policy_to_the_bit(deepseek: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    learner = make_learner(deepseek, LossConfig(), dtype=dtype, router=RouterConfig(bias_step=1e-3))
    assert biases(learner).dtype is torch.float32, "in bf16 a bias of 0.5 could not move by 0.001"
    for _ in range(3):
        run_step(learner, make_groups(REWARDS))
    save_policy(tmp_path / "saved", learner.export(), learner.model, load_tokenizer(deepseek))
    again = make_learner(tmp_path / "saved", LossConfig(), dtype=dtype)
    assert torch.equal(biases(again), biases(learner)) and not torch.equal(biases(again), biases(make_learner(deepseek, LossConfig())))
    engine = dict(checkpoint_views(load_model(deepseek, dtype, attention_name="sdpa")))  # what the hf engine writes through
    for name, tensor in learner.export():
        engine[name].copy_(tensor)
    sent = [tensor for name, tensor in engine.items() if name.endswith("e_score_correction_bias")]
    assert torch.equal(torch.stack(sent), biases(learner))


def test_a_checkpoint_gives_an_adapters_run_its_bias_back(deepseek: Path, tmp_path: Path) -> None:
    """An adapter's policy is loaded from where it began, so its bias is in the trainer's state; the reference keeps the first."""

    def adapted() -> Learner:
        model = load_model(deepseek, torch.float32)
        add_adapter(model, LoraConfig(rank=2), seed=0)
        config = LearnerConfig(lr=1e-3, warmup_steps=0, router=RouterConfig(bias_step=0.05))
        return Learner(model, LossConfig(kl_coef=0.1), config, Ranks(), temperature=0.7, max_tokens=12)

    learner, groups = adapted(), make_groups(REWARDS)
    first = biases(learner)
    reference = next(iter(learner.batches(groups, group_advantage(groups, AdvantageConfig()))))[0].ref_logp_N
    run_step(learner, groups)
    moved = biases(learner)
    checkpoints = Checkpoints(tmp_path, 1, Ranks())
    checkpoints.save(1, learner, load_tokenizer(deepseek), {})
    again = adapted()
    assert torch.equal(biases(again), first)
    checkpoints.load(1, again)
    assert torch.equal(biases(again), moved) and not torch.equal(moved, first)
    batch = next(iter(again.batches(groups, group_advantage(groups, AdvantageConfig()))))[0]
    assert torch.equal(batch.ref_logp_N, reference), "the reference is the policy as it was, its bias too"
    assert torch.equal(biases(again), moved)


def test_a_collapsed_router_finds_its_balance_by_the_bias_alone(tmp_path: Path) -> None:
    """One expert is in nearly every token's choice; without the bias that stays so."""
    found = {step: curve(tmp_path / f"{step}", bias_step=step, steps=60) for step in (0.0, 0.01)}
    assert all(violations[0] > 2.7 for violations in found.values()), "of 3, where every token goes to one of eight, two a token"
    assert min(found[0.0]) > 2.0
    assert sum(found[0.01][-5:]) / 5 < 1.0


# --- losses -------------------------------------------------------------------------------------------------------------


def padded_logits(model: torch.nn.Module, group: Group) -> list[tuple[list[torch.Tensor], Completion]]:
    """Each completion alone with its prompt: the routers' logits by layer [T, E]."""
    rows = []
    for completion in group.completions:
        logits: list[torch.Tensor] = []
        handles = [g.register_forward_hook(lambda gate, inputs, output, logits=logits: logits.append(output[0])) for g in gates(model)]
        model(torch.tensor([*group.prompt.token_ids, *completion.token_ids[:-1]])[None].long())
        for handle in handles:
            handle.remove()
        rows.append((logits, completion))
    return rows


def of_router_alone(policy: Path, groups: list[Group], router: RouterConfig, **config: object) -> dict[str, torch.Tensor]:
    """Gradients with the router's loss less those without."""
    both, plain = (gradients(make_learner(policy, LossConfig(kind="grpo"), router=r, **config), groups) for r in (router, RouterConfig()))
    return {name: both[name] - plain[name] for name in both}


@pytest.mark.parametrize("micro_tokens", [10_000, 40])
def test_the_auxiliary_loss_equals_padded_unshared_rows_however_the_step_is_cut(tmp_path: Path, micro_tokens: int) -> None:
    """Prompts count once a completion, groups of zero advantage count, and the load is the whole step's."""
    policy = policies.tiny_qwen3_moe(tmp_path / "moe", seed=0)
    groups = make_groups(REWARDS)
    with NoFloat32():
        ours = of_router_alone(policy, groups, RouterConfig(aux_loss=0.5), micro_tokens=micro_tokens)
        model = reference_model(policy)
        rows = [logits for group in groups for logits, _ in padded_logits(model, group)]
        logits_TE = torch.cat([layer for row in rows for layer in row])
        p_TE = logits_TE.softmax(-1)
        f_E = torch.bincount(p_TE.topk(2).indices.flatten(), minlength=8).double() / len(p_TE)
        loss = 8 * (f_E * p_TE.mean(0)).sum()
        (0.5 * loss).backward()
        wanted = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
        theirs = load_balancing_loss_func(tuple(torch.cat(layer) for layer in zip(*rows, strict=True)), 8, 2)
    assert distance(ours, wanted) < 1e-10
    assert theirs.item() == pytest.approx(loss.item(), rel=1e-6)  # transformers counts in float32


def test_the_sequence_loss_equals_padded_unshared_rows(deepseek: Path) -> None:
    """arXiv:2412.19437, equations 17 to 20, sequence by sequence; summed over layers, mean over sequences."""
    groups = make_groups(REWARDS)
    with NoFloat32():
        ours = of_router_alone(deepseek, groups, RouterConfig(sequence_loss=0.5), micro_tokens=40)
        model = reference_model(deepseek)
        loss = torch.zeros((), dtype=torch.float64)
        for group in groups:
            for logits, _ in padded_logits(model, group):
                for logits_TE in logits:
                    s_TE = logits_TE.sigmoid()
                    f_E = 8 / (2 * len(s_TE)) * torch.bincount(s_TE.topk(2).indices.flatten(), minlength=8).double()
                    loss = loss + (f_E * (s_TE / s_TE.sum(-1, keepdim=True)).mean(0)).sum()
        (0.5 * loss / 12).backward()
        wanted = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
    assert distance(ours, wanted) < 1e-10


def test_a_router_loss_survives_recomputation(tmp_path: Path) -> None:
    policy, groups = policies.tiny_qwen3_moe(tmp_path / "moe", seed=0), make_groups(REWARDS)
    plain, recomputing = (make_learner(policy, LossConfig(), router=RouterConfig(aux_loss=0.5)) for _ in range(2))
    recomputing.model.gradient_checkpointing_enable({"use_reentrant": False})
    recomputing.model.train()
    assert distance(gradients(recomputing, groups), gradients(plain, groups)) < 1e-12


# --- what is watched ----------------------------------------------------------------------------------------------------


def test_a_collapse_is_said_once_until_it_is_over(deepseek: Path) -> None:
    router = make_learner(deepseek, LossConfig()).router
    even, one, few = [4.0] * 8, [16.0, *[16 / 7] * 7], [16.0, 16.0, *[0.0] * 6]
    said = []
    for loads in ([even, even], [even, one], [even, one], [even, even], [few, one]):
        router.load_LE = torch.tensor(loads, dtype=torch.float64)
        said.append(router.alarms())
    assert [len(lines) for lines in said] == [0, 1, 0, 0, 2]
    assert said[1][0].startswith("alarm: routing has collapsed in MoE layer 1: expert 0 has 100 % of its tokens")
    assert "layer 0: expert 0 has 100 % of its tokens" in said[4][0]
    assert "its tokens go to 2.9 of 8 experts" in collapsed(torch.tensor([[11.0, 11.0, 7.0, 0, 0, 0, 0, 0]]), top_k=2)[0]
    assert collapsed(torch.tensor([[10.0, 10.0, 10.0, 10.0, 0, 0, 0, 0]]), top_k=2) == {}


def test_load_and_bias_stand_in_a_file_a_step(deepseek: Path, tmp_path: Path) -> None:
    learner = make_learner(deepseek, LossConfig(), router=RouterConfig(bias_step=0.01))
    for step in (1, 2):
        run_step(learner, make_groups(REWARDS))
        learner.router.write(tmp_path, step)
    with np.load(tmp_path / "step-2.npz") as found:
        assert np.array_equal(found["load"], learner.router.load_LE) and found["load"].dtype == np.uint32
        assert np.array_equal(found["bias"], biases(learner).float())
    cut_router(tmp_path, 2)
    assert [p.name for p in tmp_path.iterdir()] == ["step-1.npz"]
