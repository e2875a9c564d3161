"""What the learner's benchmarks share: a policy to measure on, groups of lognormal lengths, two ways to take a step, two clocks.

One step is everything between scored completions and updated weights. trl's is its own `GRPOTrainer.training_step` on a batch
padded as its own collation pads it, then the clipping and AdamW of its `Trainer`; ours is `Learner.batches` and `Learner.step`.
trl's forward pass for old log-probs has a clock of its own, because whether it is made depends on who samples.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch; seconds of one core are what is compared

import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

CHECKOUT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(CHECKOUT), str(CHECKOUT / "tests")]

from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM  # noqa: E402

from data.values import Completion, Group, Prompt, Score  # noqa: E402
from rl.advantage import group_advantage  # noqa: E402
from rl.config import AdvantageConfig, LearnerConfig, LossConfig  # noqa: E402
from rl.learner import Learner  # noqa: E402
from rl.loss import policy_loss  # noqa: E402
from rl.policy import load_model  # noqa: E402
from rl.ranks import Ranks  # noqa: E402

torch.set_num_threads(1)

ADVANTAGE = AdvantageConfig(ddof=1)  # trl's
LOSS = LossConfig(kind="dapo", correction="none")
"""trl's default loss; the engine is the learner itself, so there is nothing to correct."""
RATE = 1e-6


@dataclass(frozen=True)
class Case:
    """A Qwen3-MoE of hidden size 256 with 16 experts of width 256, 4 a token, and a step of groups on it."""

    layers: int = 4
    vocab: int = 4096
    prompt: int = 192
    groups: int = 4
    group_size: int = 8
    median: int = 64
    """Of the completions' lengths: lognormal with sigma 0.6, cut at 4 medians."""
    zero: float = 0.0
    """Share of the groups whose rewards are all equal. They have the lengths of the others, so that half the groups are half the tokens."""


def make_policy(case: Case, folder: Path) -> Path:
    from policies import EOS, PAD, character_tokenizer

    config = Qwen3MoeConfig(
        vocab_size=case.vocab, hidden_size=256, intermediate_size=512, moe_intermediate_size=256, num_hidden_layers=case.layers,
        num_experts=16, num_experts_per_tok=4, num_attention_heads=8, num_key_value_heads=2, head_dim=32, norm_topk_prob=True,
        max_position_embeddings=8192, tie_word_embeddings=False, initializer_range=0.05, pad_token_id=PAD, eos_token_id=EOS,
    )  # fmt: skip
    torch.manual_seed(0)
    Qwen3MoeForCausalLM(config).save_pretrained(folder)
    character_tokenizer(64).save_pretrained(folder)
    return folder


def make_groups(case: Case, seed: int = 0, *, all_teach: bool = False) -> list[Group]:
    """Random tokens; rewards 0 and 1 mixed in a group that teaches, all 0 in one that does not. `all_teach`: the same tokens, no zeros."""
    rng = np.random.default_rng(seed)
    groups = []
    teaching = case.groups - round(case.zero * case.groups)
    lengths: dict[tuple[int, int], int] = {}
    for g in range(case.groups):
        prompt = Prompt(f"p{g}", "", "", rng.integers(2, case.vocab, case.prompt).astype(np.int32))
        completions = []
        for i in range(case.group_size):
            if g < teaching:
                lengths[g, i] = int(np.clip(rng.lognormal(np.log(case.median), 0.6), 1, 4 * case.median))
            n = lengths[g % teaching, i]
            completions.append(
                Completion(
                    prompt_id=prompt.id, group_id=f"bench/p{g}/0", index=i, attempt=0, seed=i,
                    token_ids=rng.integers(2, case.vocab, n).astype(np.int32), mask=np.ones(n, np.uint8),
                    engine_logp=np.full(n, -np.log(case.vocab), np.float32), policy_version=np.zeros(n, np.int32),
                    finish_reason="stop", engine="bench",
                )
            )  # fmt: skip
        teaches = all_teach or g < teaching
        scores = tuple(Score(float(teaches and i % 2 == 0)) for i in range(case.group_size))
        groups.append(Group(f"bench/p{g}/0", prompt, 0, tuple(completions), scores))
    return groups


# --- clocks -----------------------------------------------------------------------------------------------------------


@dataclass
class Clock:
    """Process CPU seconds and wall seconds of every time a phase ran."""

    cpu: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)

    @contextmanager
    def running(self) -> Iterator[None]:
        cpu, wall = time.process_time(), time.perf_counter()
        yield
        self.cpu.append(time.process_time() - cpu)
        self.wall.append(time.perf_counter() - wall)

    def numbers(self) -> dict[str, float]:
        return {
            "cpu_min_s": round(min(self.cpu), 4), "cpu_median_s": round(statistics.median(self.cpu), 4),
            "wall_min_s": round(min(self.wall), 4), "wall_median_s": round(statistics.median(self.wall), 4),
        }  # fmt: skip


def _status_bytes(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def memory_rise(action: Callable[[], object]) -> int:
    """Bytes by which the resident set's peak during `action` lies above what was resident before; Linux."""
    import ctypes

    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _status_bytes("VmRSS")
    action()
    return _status_bytes("VmHWM") - before


# --- ours -------------------------------------------------------------------------------------------------------------


def make_learner(policy: Path, **config: Any) -> Learner:
    settings = {"lr": RATE, "warmup_steps": 0} | config
    return Learner(load_model(policy, torch.float32), LOSS, LearnerConfig(**settings), Ranks(), temperature=1.0, max_tokens=4096)


def learner_step(learner: Learner, groups: Sequence[Group]) -> None:
    for batch in learner.batches(groups, group_advantage(groups, ADVANTAGE)):
        learner.step(batch)
    learner.watch.collect(with_kl=False)


def learner_gradients(learner: Learner, groups: Sequence[Group]) -> dict[str, torch.Tensor]:
    """Of one step, before clipping; changes nothing."""
    for batch in next(iter(learner.batches(groups, group_advantage(groups, ADVANTAGE)))):
        logp_N, _ = learner._logp(learner.model, batch, grad=True)
        policy_loss(batch, logp_N, batch.old_logp_N, learner.loss, batch.ref_logp_N).loss.backward()
    grads = {name: grad.clone() for name, grad in learner.optim.grads()}
    learner.optim.zero_grad()
    return grads


# --- trl's ------------------------------------------------------------------------------------------------------------


class TrlStep:
    """trl's GRPOTrainer on groups that stand ready: padding and passes are its own, sampling and rewards are left out."""

    def __init__(self, policy: Path, case: Case, rows: int):
        from datasets import Dataset
        from trl import GRPOConfig, GRPOTrainer

        total = case.groups * case.group_size
        self.rows, self.accumulation = rows, total // rows
        model = AutoModelForCausalLM.from_pretrained(
            policy, dtype=torch.float32, attn_implementation="sdpa", experts_implementation="grouped_mm", router_aux_loss_coef=0.0
        )
        arguments = GRPOConfig(
            output_dir=tempfile.mkdtemp(), per_device_train_batch_size=rows, gradient_accumulation_steps=self.accumulation,
            num_generations=case.group_size, max_completion_length=4096, temperature=1.0, use_cpu=True, bf16=False,
            gradient_checkpointing=False, report_to=[], router_aux_loss_coef=0.0, loss_type="dapo", learning_rate=RATE,
            epsilon=LOSS.clip_low, epsilon_high=LOSS.clip_high, beta=0.0,
        )  # fmt: skip
        self.trainer = GRPOTrainer(
            model=model, args=arguments, reward_funcs=lambda completions, **_: [0.0] * len(completions),
            processing_class=AutoTokenizer.from_pretrained(policy), train_dataset=Dataset.from_list([{"prompt": "0"}]),
        )  # fmt: skip
        self.trainer.create_optimizer()
        self.trainer.current_gradient_accumulation_steps = self.accumulation
        self.old = Clock()

    def passes(self, groups: Sequence[Group], *, old_logp: bool = True) -> None:
        """Old log-probs, then forward and backward of a step; gradients stay in the model."""
        trainer = self.trainer

        def scored(_: object) -> dict[str, torch.Tensor]:
            inputs = padded(groups)
            if old_logp:  # as in `GRPOTrainer._generate_and_score_completions`
                with self.old.running(), torch.no_grad():
                    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
                    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
                    kept = inputs["completion_ids"].size(1)
                    old, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, kept, batch_size=self.rows)
                inputs["old_per_token_logps"] = old
            return inputs

        trainer._generate_and_score_completions = scored
        trainer._step, trainer._buffered_inputs = 0, None
        for _ in range(self.accumulation):
            trainer.training_step(trainer.model, {}, None)

    def step(self, groups: Sequence[Group], *, old_logp: bool = True) -> None:
        self.passes(groups, old_logp=old_logp)
        trainer = self.trainer
        trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), 1.0)
        trainer.optimizer.step()
        trainer.model.zero_grad()

    def gradients(self, groups: Sequence[Group]) -> dict[str, torch.Tensor]:
        self.passes(groups, old_logp=False)
        model = self.trainer.model
        grads = {n: p.grad.clone() if p.grad is not None else torch.zeros_like(p) for n, p in model.named_parameters()}
        model.zero_grad()
        return grads


def padded(groups: Sequence[Group]) -> dict[str, torch.Tensor]:
    """The batch as trl's own collation makes it: prompts padded on the left, completions on the right, all to the longest."""
    rows = [(g.prompt.token_ids, c.token_ids) for g in groups for c in g.completions]
    wide_p, wide_c = max(len(p) for p, _ in rows), max(len(c) for _, c in rows)
    out = {
        name: torch.zeros(len(rows), wide, dtype=torch.int64)
        for part, wide in (("prompt", wide_p), ("completion", wide_c))
        for name in (f"{part}_ids", f"{part}_mask")
    }
    for i, (p, c) in enumerate(rows):
        out["prompt_ids"][i, wide_p - len(p) :] = torch.from_numpy(p.astype(np.int64))
        out["prompt_mask"][i, wide_p - len(p) :] = 1
        out["completion_ids"][i, : len(c)] = torch.from_numpy(c.astype(np.int64))
        out["completion_mask"][i, : len(c)] = 1
    out["advantages"] = group_advantage(groups, ADVANTAGE).flatten().float()
    out["num_items_in_batch"] = out["completion_mask"].sum()
    return out


@contextmanager
def compacted_head() -> Iterator[None]:
    """trl's output head on completion tokens alone, as on GPU; on CPU it scores every position. The tiles stay torch's."""
    from trl.trainer import utils

    stock = utils._use_triton
    utils._use_triton = lambda device: True  # read there for this choice alone; the kernels have a name of their own for it
    try:
        yield
    finally:
        utils._use_triton = stock


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Relative L2 distance of two sets of gradients."""
    assert a.keys() == b.keys()
    difference = sum(float((a[k].double() - b[k].double()).square().sum()) for k in a)
    return (difference / sum(float(b[k].double().square().sum()) for k in b)) ** 0.5


# --- output -----------------------------------------------------------------------------------------------------------


def line(row: dict[str, Any]) -> None:
    print(json.dumps(row), flush=True)


def table(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> None:
    """The columns that some row has."""
    columns = [c for c in columns if any(c in row for row in rows)]
    cells = [[str(row.get(c, "-")) for c in columns] for row in rows]
    widths = [max(len(c), *(len(r[i]) for r in cells)) for i, c in enumerate(columns)]
    print("\n" + "  ".join(c.rjust(w) for c, w in zip(columns, widths, strict=True)))
    for r in cells:
        print("  ".join(x.rjust(w) for x, w in zip(r, widths, strict=True)))
