"""The loss gap of FP8 against FP32 on a smooth task: SFT on the built-in task, the same start, rows and order for each arm.

    python tests/bench/fp8_loss_gap.py [--policy POLICY --lr 2e-4] [--steps 300] [--rows 256] [--minutes 30] [--out gap.jsonl]

From a random policy the loss falls so fast that the paths of two arms part by percents, up or down, while digits are learnt; from
`--policy`, such as the quickstart's cold start, it is smooth. Arms take turns step by step, so that whenever it is stopped all of them
stand at the same step. `fp8` is `policy.precision: fp8` with `fp8.rest: fp32`, so that FP8 alone differs; `bf16` is `precision: bf16`, for
scale; `fp8_bf16` is fp8 as a recipe has it. The gap of a step is (loss - loss of fp32) / loss of fp32 on that step's rows, before its
update. What is printed is its mean over the steps after `--skip`, with a 95 % interval from the means of ten blocks of steps (Student's
t: steps that follow each other are not independent). Aim: under 0.25 % (DeepSeek-V3's own figure, arXiv:2412.19437, section 3.3).
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import yaml

CHECKOUT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(CHECKOUT))

from data.arithmetic import demonstrations  # noqa: E402
from rl.config import Fp8Config, OptimizerConfig  # noqa: E402
from rl.fp8.convert import fp8_model  # noqa: E402
from rl.optim import AdamW, learning_rate  # noqa: E402
from rl.policy import load_model, load_tokenizer  # noqa: E402
from sft.init import init_policy  # noqa: E402

RECIPE = CHECKOUT / "recipes" / "quickstart_sft.yaml"
CPU = torch.device("cpu")
T_975 = {5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
"""97.5 % quantile of Student's t by degrees of freedom."""
ARMS: dict[str, Callable[[Path], torch.nn.Module]] = {
    "fp32": lambda folder: load_model(folder, torch.float32, attention_name="sdpa"),
    "fp8": lambda folder: fp8_model(folder, Fp8Config(rest="fp32"), CPU, attention_name="sdpa"),
    "fp8_weights": lambda folder: fp8_model(folder, Fp8Config(rest="fp32", quantize_activations=False), CPU, attention_name="sdpa"),
    "fp8_bf16": lambda folder: fp8_model(folder, Fp8Config(), CPU, attention_name="sdpa"),
    "bf16": lambda folder: load_model(folder, torch.bfloat16, attention_name="sdpa"),
}


class Arm:
    """A model and its optimizer."""

    def __init__(self, folder: Path, name: str, steps: int, lr: float):
        self.model = ARMS[name](folder)
        self.optim = AdamW(self.model.named_parameters(), OptimizerConfig(betas=(0.9, 0.95)))
        self.steps, self.lr = steps, lr

    def step(self, step: int, ids: torch.Tensor, attention: torch.Tensor, taught: torch.Tensor) -> float:
        """Mean loss of the taught tokens before the update."""
        logits = self.model(input_ids=ids, attention_mask=attention).logits[:, :-1].float()
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        loss = (losses * taught[:, 1:].flatten()).sum() / taught[:, 1:].sum()
        loss.backward()
        self.optim.clip(1.0)
        self.optim.step(learning_rate(step, self.lr, "cosine", 20, self.steps))
        return loss.item()


def batches(folder: Path, options: dict, count: int, rows: int, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Token ids, attention mask and which tokens are taught, [rows, longest]."""
    tokenizer = load_tokenizer(folder)
    texts = demonstrations(options, count * rows, seed)
    for begin in range(0, len(texts), rows):
        prompts = [tokenizer(row["prompt"])["input_ids"] for row in texts[begin : begin + rows]]
        answers = [tokenizer(row["completion"])["input_ids"] + [tokenizer.eos_token_id] for row in texts[begin : begin + rows]]
        width = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
        ids = torch.full((rows, width), tokenizer.pad_token_id)
        taught, attention = torch.zeros(rows, width), torch.zeros(rows, width, dtype=torch.int64)
        for i, (p, a) in enumerate(zip(prompts, answers, strict=True)):
            ids[i, : len(p) + len(a)] = torch.tensor(p + a)
            attention[i, : len(p) + len(a)] = 1
            taught[i, len(p) : len(p) + len(a)] = 1.0
        yield ids, attention, taught


def summary(losses: list[dict[str, float]], skip: int, blocks: int = 10) -> str:
    """One line an arm; `losses` by step."""
    lines = []
    kept = losses[skip:]
    size = len(kept) // blocks
    if size == 0:
        return f"{len(losses)} steps are too few for {blocks} blocks after {skip}"
    for arm in [name for name in kept[0] if name != "fp32"]:
        gaps = [100 * (row[arm] - row["fp32"]) / row["fp32"] for row in kept[len(kept) - size * blocks :]]
        means = [sum(gaps[b * size : (b + 1) * size]) / size for b in range(blocks)]
        mean = sum(means) / blocks
        spread = math.sqrt(sum((m - mean) ** 2 for m in means) / (blocks - 1) / blocks) * T_975[blocks - 1]
        lines.append(
            f"{arm}: loss gap to fp32 {mean:+.3f} % ± {spread:.3f} (95 %, {size * blocks} steps after {len(kept) - size * blocks + skip})"
        )
    last = ", ".join(f"{arm} {sum(row[arm] for row in kept[-size:]) / size:.5f}" for arm in kept[0])
    return "\n".join([*lines, f"mean loss of the last {size} steps: {last}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--skip", type=int, default=60, help="steps at the start that are not counted")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--policy", type=Path, help="starts from it; default: a random one of quickstart_sft.yaml")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--arms", default="fp32,fp8,bf16", help=f"of {', '.join(ARMS)}; fp32 is always there")
    parser.add_argument("--out", type=Path, help="writes the losses of each step, a JSON object a line")
    given = parser.parse_args()
    torch.set_num_threads(1)
    recipe = yaml.safe_load(RECIPE.read_text())
    ends = time.monotonic() + 60 * given.minutes
    losses: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.policy or Path(temporary)
        if given.policy is None:
            model, tokenizer = init_policy(recipe["policy"]["init"], "characters", given.seed)
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        arms = {name: Arm(folder, name, given.steps, given.lr) for name in dict.fromkeys(["fp32", *given.arms.split(",")])}
        for step, batch in enumerate(batches(folder, recipe["data"]["options"], given.steps, given.rows, given.seed)):
            losses.append({name: arm.step(step, *batch) for name, arm in arms.items()})
            if given.out is not None:
                with given.out.open("a") as file:
                    file.write(json.dumps(losses[-1]) + "\n")
            if time.monotonic() > ends:
                break
    print(f"{len(losses)} steps of {given.rows} rows, seed {given.seed}")
    print(summary(losses, given.skip))


if __name__ == "__main__":
    main()
