"""Our learner against trl 1.16's GRPOTrainer: CPU seconds and memory of a training step on the same completions.

    python tests/bench/learner_vs_trl.py [--case base --case short …] [--repeats 7]

trl runs in its best stock configuration (fp32, `grouped_mm`, auxiliary loss 0, no checkpointing, 1 thread), and again with its
output head compacted as on GPU. A step has one update and fresh completions (`num_iterations` 1, `gradient_accumulation_steps` equal
to `steps_per_generation`). What trl does then depends on who samples, and both are printed:

    ratio_stock, ratio_compact               transformers' `generate`: one forward and backward pass, the least that trl ever does
    ratio_stock_vllm, ratio_compact_vllm     vLLM: a forward pass more, for log-probs to compare with the engine's (trl's default)

Ours makes one pass in either case, with that comparison. All take turns in one process; ratios are of the minima of process CPU
seconds, trl's over ours. `mem_ratio` compares how far the peak of resident memory rises during a step, each side in a process of its
own, after a first step that allocated the optimizer's moments. A pass holds the same eight completions on both sides, a group.
`zero_gain` is what ours gains from groups that teach nothing: all groups teaching, over the case as it is.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from harness import (
    Case,
    Clock,
    TrlStep,
    compacted_head,
    distance,
    learner_gradients,
    learner_step,
    line,
    make_groups,
    make_learner,
    make_policy,
    memory_rise,
    table,
)

CASES = {
    "base": Case(),
    "prompt_2048": Case(prompt=2048, groups=2),
    "vocab_152k": Case(vocab=151_936, layers=4, groups=2),
    "mem_2layers_v4096_p512": Case(layers=2, prompt=512),
    "mem_2layers_v32k_p192": Case(layers=2, vocab=32_768),
    "half_zero": Case(zero=0.5, groups=8),
    "short": Case(prompt=16, median=16),
}
ROWS = 8
"""Rows of a pass of trl's: the fastest of 8, 16 and 32 in case `base`."""
COLUMNS = (
    "case", "ratio_stock", "ratio_compact", "ratio_stock_vllm", "ratio_compact_vllm", "mem_ratio", "mem_ratio_compact",
    "grad_rel", "zero_gain",
)  # fmt: skip


def measure(name: str, case: Case, repeats: int, rows: int, micro_tokens: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        policy = make_policy(case, Path(folder))
        groups = make_groups(case)
        ours, theirs = make_learner(policy, micro_tokens=micro_tokens), TrlStep(policy, case, rows)
        grad_rel = distance(learner_gradients(ours, groups), theirs.gradients(groups))
        full = make_groups(case, all_teach=True)
        clocks = {key: Clock() for key in ("ours", "ours_full", "stock", "compact")}
        old: dict[str, Clock] = {"stock": Clock(), "compact": Clock()}
        for turn in range(repeats + 1):  # the first turn warms up
            for key, clock in clocks.items():
                if key == "ours_full" and not case.zero:
                    continue
                theirs.old = old.get(key, theirs.old)
                with clock.running():
                    if key == "stock":
                        theirs.step(groups)
                    elif key == "compact":
                        with compacted_head():
                            theirs.step(groups)
                    else:
                        learner_step(ours, groups if key == "ours" else full)
            if turn == 0:
                for clock in (*clocks.values(), *old.values()):
                    clock.cpu.clear()
                    clock.wall.clear()
    row: dict[str, Any] = {"case": name}
    best = min(clocks["ours"].cpu)
    for key in ("stock", "compact"):
        one_pass = [step - extra for step, extra in zip(clocks[key].cpu, old[key].cpu, strict=True)]
        row[f"ratio_{key}"] = round(min(one_pass) / best, 2)
        row[f"ratio_{key}_vllm"] = round(min(clocks[key].cpu) / best, 2)
    row["grad_rel"] = float(f"{grad_rel:.2g}")
    if case.zero:
        row["zero_gain"] = round(min(clocks["ours_full"].cpu) / best, 2)
    row |= {f"{key}_{k}": v for key, clock in clocks.items() if clock.cpu for k, v in clock.numbers().items()}
    row |= {f"{key}_old_logp_cpu_min_s": round(min(clock.cpu), 4) for key, clock in old.items()}
    tokens = [len(c.token_ids) for g in groups for c in g.completions]
    row |= {"completion_tokens": sum(tokens), "longest": max(tokens), "rows": rows, "repeats": repeats}
    return row


def memory(name: str, side: str, rows: int, micro_tokens: int) -> int:
    """Rise of the peak in a step, in bytes, in a fresh process."""
    options = {"--case": name, "--memory-of": side, "--rows": str(rows), "--micro-tokens": str(micro_tokens)}
    command = [sys.executable, __file__, *(word for pair in options.items() for word in pair)]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()[-1])


def print_memory(case: Case, side: str, rows: int, micro_tokens: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        policy = make_policy(case, Path(folder))
        groups = make_groups(case)
        if side == "ours":
            learner = make_learner(policy, micro_tokens=micro_tokens)
            learner_step(learner, groups)
            print(memory_rise(lambda: learner_step(learner, groups)))
            return
        trl = TrlStep(policy, case, rows)
        if side == "compact":
            compacted_head().__enter__()
        trl.step(groups)
        print(memory_rise(lambda: trl.step(groups)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--case", action="append", choices=CASES, help="may be given several times; all if left out")
    parser.add_argument("--repeats", type=int, default=7, help="turns that count, at least five")
    parser.add_argument("--rows", type=int, default=ROWS, help="rows of a pass of trl's")
    parser.add_argument("--micro-tokens", type=int, default=1, help="learner.micro_tokens of ours; 1: a group a pass")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--memory-of", choices=["ours", "stock", "compact"], help="print one side's rise in bytes, nothing else")
    arguments = parser.parse_args()
    names = arguments.case or list(CASES)
    if arguments.memory_of:
        print_memory(CASES[names[0]], arguments.memory_of, arguments.rows, arguments.micro_tokens)
        return
    found = []
    for name in names:
        row = measure(name, CASES[name], arguments.repeats, arguments.rows, arguments.micro_tokens)
        if not arguments.no_memory:
            rise = {side: memory(name, side, arguments.rows, arguments.micro_tokens) for side in ("ours", "stock", "compact")}
            row["mem_ratio"] = round(rise["stock"] / rise["ours"], 2)
            row["mem_ratio_compact"] = round(rise["compact"] / rise["ours"], 2)
            row |= {f"{side}_rise_mib": round(size / 2**20, 1) for side, size in rise.items()}
        line(row)
        found.append(row)
    table(found, COLUMNS)


if __name__ == "__main__":
    main()
