"""Groups made by hand for learner tests: random prompts, completions and engine log-probs near a policy's own."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import policies
import torch
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, PreTrainedModel

from data.values import Completion, Group, Prompt, Score
from rl.advantage import group_advantage
from rl.config import AdvantageConfig, LearnerConfig, LossConfig
from rl.learner import Learner
from rl.mixed import residual_in_fp32
from rl.mtp import attach
from rl.policy import checkpoint_views, load_model, load_tokenizer, save_policy
from rl.ranks import Ranks
from rl.replay import with_routes

MAX_TOKENS = 12
TEMPERATURE = 0.7


def deepseek_v3_with_module(path: Path, *, seed: int, dtype: torch.dtype = torch.float32, **config: object) -> Path:
    """A tiny DeepSeek-V3 with a multi-token prediction module; `<path>-trunk` is the same without. Returns `path`."""
    trunk = policies.tiny_deepseek_v3(path.with_name(f"{path.name}-trunk"), seed=seed, dtype=dtype, **config)  # type: ignore[arg-type]
    model = load_model(trunk, dtype)
    attach(model, seed=seed + 3)
    save_policy(path, checkpoint_views(model), model, load_tokenizer(trunk))
    return path


class NoFloat32(TorchFunctionMode):
    """Keeps float64 where a model would compute in float32 (norms, router softmax): in float64 nothing but the order of sums is left.

    Those islands round the gradient that passes through them to float32, so paths that add up the same terms in another order would
    agree to 1e-7 only.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = dict(kwargs or {})
        x = args[0] if args else None
        if isinstance(x, torch.Tensor) and x.dtype is torch.float64:
            if function is torch.Tensor.float:
                return x
            args = tuple(torch.float64 if a is torch.float32 else a for a in args)
            if kwargs.get("dtype") is torch.float32:
                kwargs["dtype"] = torch.float64
        return function(*args, **kwargs)


def make_groups(
    rewards: Sequence[Sequence[float | None]],
    *,
    seed: int = 0,
    vocab_size: int = 64,
    truncate: bool = False,
    prompt_tokens: int | None = None,
    tools: bool = False,
) -> list[Group]:
    """One group for each row of rewards; lengths 1 to MAX_TOKENS. tools: one wrote the middle third of each, which has no log-prob."""
    rng = np.random.default_rng(seed)
    groups = []
    for g, values in enumerate(rewards):
        prompt = Prompt(f"p{g}", "", "", rng.integers(2, vocab_size, prompt_tokens or rng.integers(2, 9)).astype(np.int32))
        completions = []
        for i in range(len(values)):
            n = int(rng.integers(1, MAX_TOKENS + 1))
            mask = np.ones(n, np.uint8)
            mask[n // 3 : 2 * n // 3] = 1 - tools
            completions.append(
                Completion(
                    prompt_id=prompt.id,
                    group_id=f"run/p{g}/0",
                    index=i,
                    attempt=0,
                    seed=i,
                    token_ids=rng.integers(2, vocab_size, n).astype(np.int32),
                    mask=mask,
                    engine_logp=np.where(mask == 1, rng.normal(-4.0, 0.4, n), np.nan).astype(np.float32),
                    policy_version=np.zeros(n, np.int32),
                    finish_reason="length" if truncate and i == 1 else "stop",
                    engine="engine-0",
                )
            )
        scores = tuple(Score(v) if v is not None else Score(None, "error", detail="x: failed") for v in values)
        groups.append(Group(f"run/p{g}/0", prompt, 0, tuple(completions), scores))
    return groups


def routed(groups: Sequence[Group], routes: Sequence[Sequence[np.ndarray]]) -> list[Group]:
    """The groups with routes of all positions but the last."""
    return [
        replace(g, completions=tuple(with_routes(c, r) for c, r in zip(g.completions, rows, strict=True)))
        for g, rows in zip(groups, routes, strict=True)
    ]


def random_routes(groups: Sequence[Group], layers: int) -> list[Group]:
    """Any two of eight experts; those of a prompt are the same in all of its completions."""
    rng = np.random.default_rng(3)

    def some(count: int) -> np.ndarray:
        return rng.permuted(np.tile(np.arange(8), (count, layers, 1)), axis=-1)[..., :2].astype(np.uint8)

    rows = []
    for group in groups:
        prompt = some(len(group.prompt.token_ids))
        rows.append([np.concatenate([prompt, some(len(c.token_ids) - 1)]) for c in group.completions])
    return routed(groups, rows)


def near(groups: list[Group], policy: Path, spread: float = 0.3) -> list[Group]:
    """The same groups with engine log-probs that lie `spread` around the policy's own, so that clipping is active on some tokens."""
    model = reference_model(policy)
    rng = np.random.default_rng(7)
    out = []
    for group in groups:
        completions = []
        for c in group.completions:
            with torch.no_grad():
                logp = padded_logp(model, group.prompt, c).numpy()
            noisy = np.where(c.mask == 1, logp + rng.normal(0.0, spread, len(logp)), np.nan).astype(np.float32)
            completions.append(Completion(**{**vars(c), "engine_logp": noisy}))
        out.append(Group(group.id, group.prompt, group.attempt, tuple(completions), group.scores))
    return out


def reference_model(policy: Path, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """transformers as it comes: padded rows, its own attention, experts one by one."""
    return AutoModelForCausalLM.from_pretrained(policy, dtype=dtype, attn_implementation="sdpa", experts_implementation="eager").eval()


def padded_logp(model: PreTrainedModel, prompt: Prompt, completion: Completion) -> torch.Tensor:
    """logp [T] of a completion by one row of its own through the whole model."""
    ids = torch.from_numpy(np.concatenate([prompt.token_ids, completion.token_ids]).astype(np.int64))[None]
    logits = model(ids).logits[0, len(prompt.token_ids) - 1 : -1] / TEMPERATURE
    targets = torch.from_numpy(completion.token_ids.astype(np.int64))
    return logits.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)


def make_learner(
    policy: Path, loss: LossConfig, *, dtype: torch.dtype = torch.float64, reference: Path | None = None, **config: object
) -> Learner:
    settings = {"lr": 1e-3, "warmup_steps": 0, "micro_tokens": 10_000} | config
    model = load_model(policy, dtype)
    if dtype is torch.bfloat16:
        residual_in_fp32(model)
    return Learner(
        model,
        loss,
        LearnerConfig(**settings),  # type: ignore[arg-type]
        Ranks(),
        temperature=TEMPERATURE,
        max_tokens=MAX_TOKENS,
        reference=load_model(reference, dtype).requires_grad_(False) if reference else None,
    )


def gradients(learner: Learner, groups: list[Group], advantage: AdvantageConfig | None = None) -> dict[str, torch.Tensor]:
    """Gradients of the first optimizer step on these groups, summed over ranks, before clipping."""
    advantages = group_advantage(groups, advantage or AdvantageConfig())
    learner._backward(next(iter(learner.batches(groups, advantages))))
    return {name: grad.clone() for name, grad in learner.optim.grads()}


def step_numbers(learner: Learner, groups: list[Group]) -> dict[str, torch.Tensor]:
    """What a whole step says of itself, its routers and the mismatch, and the load that it counted."""
    for batches in learner.batches(groups, group_advantage(groups, AdvantageConfig())):
        learner.step(batches)
    numbers = learner.watch.collect(with_kl=False) | learner.replay.collect() | learner.router.numbers() | learner.mtp_loss.collect()
    assert learner.router.load_LE is not None
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in numbers.items()} | {"load": learner.router.load_LE}


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Relative L2 distance of two sets of gradients."""
    assert a.keys() == b.keys()
    difference = sum((a[k].double() - b[k].double()).square().sum() for k in a)
    return float((difference / sum(b[k].double().square().sum() for k in b)) ** 0.5)
