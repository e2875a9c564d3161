"""Mean |log-prob of the engine - log-prob of the learner| where both have the same weights, by precision and engine.

    PYTHONPATH=tests python -m bench.fp8_mismatch outputs/quickstart/final [--prompts 64] [--engines hf,vllm]

Completions of the arithmetic task's prompts, 8 each at temperature 1, sampled by each engine with the same seeds; the learner scores them
packed, as it does in training. FP8 policies have the rest in BF16. `fp8` is the learner as a recipe has it; `fp8_weights` is the learner
without quantised activations, as vLLM on a CPU computes. Intervals (95 %) are over prompts. Aim: hf in FP8 at most 1.3 times hf in BF16.
"""

import argparse
import tempfile
from pathlib import Path
from queue import SimpleQueue

import numpy as np
import torch
from transformers import PreTrainedModel

from data.arithmetic import rows
from data.values import Completion, Group, Prompt, Score
from rl.advantage import group_advantage
from rl.config import AdvantageConfig, Fp8Config, LearnerConfig, LossConfig, PolicyConfig
from rl.engines.base import Engine, Event, Finished, Pulse, Request, Sampling
from rl.engines.hf import HfEngine
from rl.engines.vllm import VllmEngine
from rl.fp8.convert import fp8_model
from rl.fp8.folder import engine_policy
from rl.learner import Learner
from rl.mixed import residual_in_fp32
from rl.policy import load_model, load_tokenizer
from rl.ranks import Ranks

CPU = torch.device("cpu")
MAX_TOKENS = 48


def bf16_learner(folder: Path) -> PreTrainedModel:
    model = load_model(folder, torch.bfloat16)
    residual_in_fp32(model)
    return model


LEARNERS = {
    "bf16": lambda folder: bf16_learner(folder),
    "fp8": lambda folder: fp8_model(folder, Fp8Config(), CPU),
    "fp8_weights": lambda folder: fp8_model(folder, Fp8Config(quantize_activations=False), CPU),
}


def engine_of(kind: str, folder: Path, coded: bool, logs: Path) -> Engine:
    if kind == "hf":
        return HfEngine("engine", str(folder), torch.bfloat16, 64, fp8=Fp8Config() if coded else None)
    return VllmEngine("engine", folder, log_path=logs / "engine.log", dtype="bfloat16", max_model_len=128)


def sample(engine: Engine, prompts: list[Prompt]) -> list[Group]:
    """8 completions each; scores are random, so that every group is trained on."""
    mailbox: SimpleQueue[Event] = SimpleQueue()
    engine.start(mailbox)
    done: list[Completion] = []
    for n, prompt in enumerate(prompts):
        engine.submit(
            [Request(prompt.id, f"run/{prompt.id}/0", 0, i, 8 * n + i, prompt.token_ids, Sampling(MAX_TOKENS, 1.0)) for i in range(8)]
        )
    while len(done) < 8 * len(prompts):
        event = mailbox.get(timeout=600)
        assert isinstance(event, Finished | Pulse), event
        if isinstance(event, Finished):
            done.append(event.completion)
    engine.close()
    groups = []
    for prompt in prompts:
        own = tuple(sorted((c for c in done if c.prompt_id == prompt.id), key=lambda c: c.index))
        groups.append(Group(f"run/{prompt.id}/0", prompt, 0, own, tuple(Score(float(i % 2)) for i in range(8))))
    return groups


def differences(model: torch.nn.Module, groups: list[Group]) -> np.ndarray:
    """Sum of |d| and tokens of each group [P, 2]."""
    learner = Learner(
        model, LossConfig(), LearnerConfig(warmup_steps=0), Ranks(), temperature=1.0, max_tokens=MAX_TOKENS
    )  # fmt: skip
    found = []
    for group in groups:
        advantages = group_advantage([group], AdvantageConfig())
        total = np.zeros(2)
        for batch in next(iter(learner.batches([group], advantages))):
            difference = (learner._logp(learner.model, batch, grad=False)[0] - batch.engine_logp_N).abs().double()
            total += [difference.sum().item(), len(difference)]
        found.append(total)
    return np.array(found)


def mean_of(sums_P2: np.ndarray) -> tuple[float, float]:
    """Mean over tokens, and half of its 95 % interval from 2,000 draws of prompts."""
    rng = np.random.default_rng(0)
    drawn = sums_P2[rng.integers(0, len(sums_P2), (2000, len(sums_P2)))].sum(1)
    low, high = np.quantile(drawn[:, 0] / drawn[:, 1], (0.025, 0.975))
    total = sums_P2.sum(0)
    return total[0] / total[1], (high - low) / 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("policy", type=Path)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--engines", default="hf,vllm")
    given = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = load_tokenizer(given.policy)
    asked = rows({"digits": 2}, "test")[: given.prompts]
    prompts = [
        Prompt(f"p{n}", row["prompt"], row["prompt"], np.array(tokenizer(row["prompt"])["input_ids"], np.int32))
        for n, row in enumerate(asked)
    ]
    with tempfile.TemporaryDirectory() as temporary:
        logs = Path(temporary)
        folders = {
            kind: engine_policy(PolicyConfig(path=str(given.policy), precision=kind), given.policy, logs / kind) for kind in ("bf16", "fp8")
        }
        for engine in given.engines.split(","):
            base = 0.0
            for kind, learners in (("bf16", ["bf16"]), ("fp8", ["fp8", "fp8_weights"] if engine == "vllm" else ["fp8"])):
                groups = sample(engine_of(engine, folders[kind], kind == "fp8", logs), prompts)
                for name in learners:
                    sums_P2 = differences(LEARNERS[name](folders[kind]), groups)
                    mean, half = mean_of(sums_P2)
                    base = base or mean
                    print(
                        f"{engine} engine in {kind}, learner {name}: {mean:.2e} ± {half:.1e} ({int(sums_P2[:, 1].sum()):,} tokens), "
                        f"{mean / base:.3f} of bf16",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
