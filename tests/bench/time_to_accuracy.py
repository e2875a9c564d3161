"""Time to 90 % on the quickstart task: ours and trl's GRPOTrainer with transformers' `generate`, from the same cold start.

    python tests/bench/time_to_accuracy.py POLICY [--case short] [--seed 1 --seed 2 --seed 3] [--steps 60]
    python tests/bench/time_to_accuracy.py POLICY --make-long LONG_POLICY      # once: POLICY learns to read the long prompt
    python tests/bench/time_to_accuracy.py LONG_POLICY --case long

Both take the same prompts, rewards, batch (32 prompts x 8, four optimizer steps), loss, rate and length limit from
`recipes/quickstart.yaml`. `short` is the task as it is, `long` puts about 250 tokens of instruction and worked examples before
each prompt. Seconds are those of training, as wall time and as CPU time of all processes of a side (`…_cpu_s`, which other work on
the machine disturbs less): start-up and evaluation are left out on both sides. Accuracy is pass@1 at temperature 1 on the same
held-out prompts, every `--every` steps; a side ends once it has reached the goal, and the time is interpolated between the two
evaluations around it. Both compute on one thread (this policy is too small to share between cores); ours has a process for the
engine and one for the learner, which take turns, so that pinned to one core (`taskset -c 0`) both sides have the same.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import yaml
from harness import CHECKOUT, line, table

from data.arithmetic import demonstrations, rows
from rewards.math_answer import math_answer
from rewards.think_format import think_format

RECIPE = CHECKOUT / "recipes" / "quickstart.yaml"
PREFIX = {
    "short": "",
    "long": (
        "Add the two numbers. Work column by column from the right and carry the one. "
        "Show the work inside think tags, then the sum inside answer tags. Examples: "
        "12+34=<think>2+4=6;1+3=4</think><answer>46</answer> "
        "47+85=<think>7+5=12;4+8+1=13</think><answer>132</answer> "
        "60+39=<think>0+9=9;6+3=9</think><answer>99</answer> "
        "58+27=<think>8+7=15;5+2+1=8</think><answer>85</answer> Now you: "
    ),
}
"""The policy's tokenizer has a token for each character and for each tag."""


def write_prompts(folder: Path, case: str, held_out: int) -> dict[str, Path]:
    files = {}
    for split, limit in (("train", None), ("test", held_out)):
        all_rows = rows({"digits": 2}, split)
        random.Random(0).shuffle(all_rows)
        files[split] = folder / f"{split}.jsonl"
        lines = [json.dumps(row | {"prompt": PREFIX[case] + row["prompt"]}) for row in all_rows[:limit]]
        files[split].write_text("\n".join(lines) + "\n")
    return files


@dataclass(frozen=True)
class Point:
    """An evaluation: seconds of training until then, and what it found."""

    wall_s: float
    cpu_s: float
    accuracy: float


class TreeCpu(threading.Thread):
    """CPU seconds of a process and all its descendants, read ten times a second."""

    def __init__(self, pid: int):
        super().__init__(daemon=True)
        self.process = psutil.Process(pid)
        self.samples: list[tuple[float, float]] = []
        self.start()

    def run(self) -> None:
        while True:
            try:
                tree = [self.process, *self.process.children(recursive=True)]
                used = sum(sum(process.cpu_times()[:4]) for process in tree)  # children that have ended count with their parents
            except psutil.NoSuchProcess:
                if not self.process.is_running():
                    return
                continue
            self.samples.append((time.time(), used))
            time.sleep(0.1)

    def between(self, begin: float, end: float) -> float:
        times, used = np.array(self.samples).T
        return float(np.interp(end, times, used) - np.interp(begin, times, used))


def curve_of_ours(policy: str, files: dict[str, Path], folder: Path, seed: int, steps: int, every: int, goal: float) -> list[Point]:
    """The evaluations of `rl.train`, which is ended once it has reached the goal."""
    recipe = yaml.safe_load(RECIPE.read_text())
    recipe["run"] |= {"seed": seed, "output_dir": str(folder), "name": "ours"}
    recipe["policy"]["path"] = policy
    recipe["prompts"] = {"path": str(files["train"])}
    recipe["learner"]["steps"] = steps
    recipe["eval"] = {"every": every, "samples": 1, "greedy": False, "prompts": {"path": str(files["test"])}}
    recipe["checkpoint"] = {"every": 0}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    command = [sys.executable, "-m", "rl.train", str(folder / "recipe.yaml")]
    training = subprocess.Popen(command, cwd=CHECKOUT, stdout=sys.stderr)
    tree = TreeCpu(training.pid)
    file = folder / "ours" / "metrics.jsonl"
    curve: list[Point] = []
    wall = cpu = last = 0.0
    read = 0
    while training.poll() is None or read < len(_lines(file)):
        for row in map(json.loads, _lines(file)[read:]):
            now = time.time()
            read += 1
            evaluating = row.get("time/eval_s", 0.0)
            if row["step"]:
                wall += row["time/step_s"] - evaluating
                time.sleep(0.2)  # until the tree has been read once more
                cpu += tree.between(last, now - evaluating)
            last = now
            if "eval/pass@1" in row:
                curve.append(Point(wall, cpu, row["eval/pass@1"]))
                print(f"ours: step {row['step']}, {curve[-1]}", file=sys.stderr, flush=True)
        if curve and curve[-1].accuracy >= goal and training.poll() is None:
            training.terminate()
            training.wait()
            break
        time.sleep(0.02)
    assert training.returncode in (0, 75), f"rl.train ended with {training.returncode}"
    return curve


def _lines(file: Path) -> list[str]:
    """Those that are whole."""
    text = file.read_text() if file.exists() else ""
    return text[: text.rfind("\n") + 1].splitlines()


def reward(prompts: list[str], completions: list[str], answer: list[str], **_: Any) -> list[float]:
    """`math_answer` that requires `think_format`, as the recipe has it."""
    right, formed = math_answer(prompts, completions, answer=answer), think_format(prompts, completions)
    return [float(r or 0.0) if f else 0.0 for r, f in zip(right, formed, strict=True)]


def curve_of_trl(policy: str, files: dict[str, Path], folder: Path, seed: int, steps: int, every: int, goal: float) -> list[Point]:
    """The same of trl's GRPOTrainer."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    recipe = yaml.safe_load(RECIPE.read_text())
    learner, rollout = recipe["learner"], recipe["rollout"]
    updates = learner["steps_per_batch"]
    train, test = (list(map(json.loads, files[split].read_text().splitlines())) for split in ("train", "test"))
    tokenizer = AutoTokenizer.from_pretrained(policy, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(
        policy, dtype=torch.float32, attn_implementation="sdpa", experts_implementation="grouped_mm", router_aux_loss_coef=0.0
    )
    rows_a_pass = learner["prompts_per_step"] * rollout["group_size"] // updates
    arguments = GRPOConfig(
        output_dir=str(folder / "trl"), per_device_train_batch_size=rows_a_pass, gradient_accumulation_steps=1,
        steps_per_generation=updates, num_generations=rollout["group_size"], max_completion_length=rollout["max_tokens"], temperature=1.0,
        use_cpu=True, bf16=False,
        gradient_checkpointing=False, report_to=[], router_aux_loss_coef=0.0, loss_type="dapo", beta=0.0, epsilon=0.2, epsilon_high=0.28,
        learning_rate=learner["lr"], lr_scheduler_type="linear", warmup_steps=0, max_steps=learner["schedule_steps"] * updates,
        adam_beta1=learner["optimizer"]["betas"][0], adam_beta2=learner["optimizer"]["betas"][1], max_grad_norm=1.0, weight_decay=0.0,
        save_strategy="no", logging_strategy="no", disable_tqdm=True, seed=seed,
    )  # fmt: skip
    curve: list[Point] = []

    @torch.no_grad()
    def accuracy() -> float:
        model.eval()
        got = 0.0
        for begin in range(0, len(test), 256):
            part = test[begin : begin + 256]
            inputs = tokenizer([row["prompt"] for row in part], return_tensors="pt", padding=True)
            ids = {k: inputs[k] for k in ("input_ids", "attention_mask")}
            out = model.generate(**ids, do_sample=True, temperature=1.0, top_k=0, max_new_tokens=rollout["max_tokens"])
            texts = tokenizer.batch_decode(out[:, ids["input_ids"].shape[1] :], skip_special_tokens=True)
            # As in `rl.evaluate`, the format is not asked for.
            got += sum(v or 0.0 for v in math_answer([row["prompt"] for row in part], texts, answer=[row["answer"] for row in part]))
        model.train()
        return got / len(test)

    class Curve(TrainerCallback):
        wall_s = cpu_s = 0.0

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            curve.append(Point(0.0, 0.0, accuracy()))
            self.began = time.perf_counter(), time.process_time()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step % (every * updates) == 0:
                self.wall_s += time.perf_counter() - self.began[0]
                self.cpu_s += time.process_time() - self.began[1]
                curve.append(Point(self.wall_s, self.cpu_s, accuracy()))
                print(f"trl: step {state.global_step // updates}, {curve[-1]}", file=sys.stderr, flush=True)
                self.began = time.perf_counter(), time.process_time()
            control.should_training_stop = state.global_step >= steps * updates or curve[-1].accuracy >= goal

    GRPOTrainer(
        model=model, args=arguments, reward_funcs=reward, processing_class=tokenizer, train_dataset=Dataset.from_list(train),
        callbacks=[Curve()],
    ).train()  # fmt: skip
    return curve


def reached(curve: Sequence[Point], goal: float) -> tuple[float, float] | None:
    """Wall and CPU seconds of training to the goal, interpolated between the evaluations around it."""
    for a, b in pairwise(curve):
        if a.accuracy < goal <= b.accuracy:
            share = (goal - a.accuracy) / (b.accuracy - a.accuracy)
            return a.wall_s + share * (b.wall_s - a.wall_s), a.cpu_s + share * (b.cpu_s - a.cpu_s)
    return None


def make_long(policy: str, target: str, steps: int) -> None:
    """The policy after supervised fine-tuning under the long prompt, on demonstrations with half the quickstart's errors.

    Twice the errors would need as many steps again on both sides, and trl's take 20 s of CPU time each.
    """
    options = yaml.safe_load((CHECKOUT / "recipes" / "quickstart_sft.yaml").read_text())["data"]["options"]
    options |= {error: options[error] / 2 for error in ("carry_error", "answer_error")}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shown = [row | {"prompt": PREFIX["long"] + row["prompt"]} for row in demonstrations(options, 32 * steps, seed=1)]
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in shown))
        recipe = {
            "run": {"name": Path(target).name, "seed": 1, "output_dir": str(Path(target).parent)},
            "policy": {"path": policy},
            "data": {"path": str(folder / "rows.jsonl")},
            "sft": {"steps": steps, "batch_size": 32, "lr": 1e-3, "schedule": "cosine", "warmup_steps": 10, "threads": 1},
        }
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        subprocess.run([sys.executable, "-m", "sft.train", str(folder / "recipe.yaml")], cwd=CHECKOUT, check=True)
    print(f"the cold start under the long prompt is {target}/final")


def main() -> None:
    parser = argparse.ArgumentParser(description="Time to 90 % on the quickstart task, ours and trl's.")
    parser.add_argument("policy", help="folder of the cold start")
    parser.add_argument("--case", choices=PREFIX, default="short")
    parser.add_argument("--seed", type=int, action="append")
    parser.add_argument("--steps", type=int, default=50, help="at most so many batches of 256 completions")
    parser.add_argument("--every", type=int, default=4, help="steps between evaluations")
    parser.add_argument("--held-out", type=int, default=987, help="evaluation prompts")
    parser.add_argument("--goal", type=float, default=0.9)
    parser.add_argument("--make-long", metavar="FOLDER", help="make the cold start of case `long` from the policy, nothing else")
    parser.add_argument("--make-long-steps", type=int, default=150)
    arguments = parser.parse_args()
    policy = str(Path(arguments.policy).resolve())
    if arguments.make_long:
        make_long(policy, str(Path(arguments.make_long).resolve()), arguments.make_long_steps)
        return
    found = []
    for seed in arguments.seed or [1]:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            files = write_prompts(folder, arguments.case, arguments.held_out)
            settings = (policy, files, folder, seed, arguments.steps, arguments.every, arguments.goal)
            curves = {"ours": curve_of_ours(*settings), "trl": curve_of_trl(*settings)}
        found.append(_row(arguments.case, seed, arguments.goal, curves))
        line(found[-1])
    table(found, ("case", "seed", "goal", "ours_cpu_s", "trl_cpu_s", "ratio_cpu", "ours_s", "trl_s", "ratio"))


def _row(case: str, seed: int, goal: float, curves: dict[str, list[Point]]) -> dict[str, Any]:
    row: dict[str, Any] = {"case": case, "seed": seed, "goal": goal}
    times = {side: reached(curve, goal) for side, curve in curves.items()}
    for side, found in times.items():
        if found is not None:
            row |= {f"{side}_s": round(found[0], 1), f"{side}_cpu_s": round(found[1], 1)}
    ours, trl = times["ours"], times["trl"]
    if ours is not None and trl is not None:
        row |= {"ratio": round(trl[0] / ours[0], 2), "ratio_cpu": round(trl[1] / ours[1], 2)}
    row |= {f"{side}_curve": [[round(x, 3) for x in astuple(point)] for point in curve] for side, curve in curves.items()}
    return row | {"cores": len(os.sched_getaffinity(0))}


if __name__ == "__main__":
    main()
