"""GRPO in FP8 against FP32 on the quickstart: paired seeds, the same steps, engines of vLLM that sample from block-FP8 weights.

    python tests/bench/fp8_accuracy.py outputs/quickstart_sft/final [--seeds 1,2,3] [--arms fp32,fp8] [--steps 50] [--out OUT]

Each run is `python -m rl.train recipes/quickstart.yaml` with seed and precision set. What is printed: accuracy before and after, and the
difference of each arm to fp32, paired by seed, with a 95 % interval over seeds (Student's t), in points. A second interval counts the
held-out prompts alone. `mismatch`: the mean |log-prob of the engine - log-prob of the learner| over the run, from metrics.jsonl;
`fp8_weights` is FP8 without quantised activations in the learner, as vLLM on a CPU computes. Runs that are finished are not run again.
Five seeds and BF16: `--seeds 1,2,3,4,5 --arms fp32,bf16,fp8`.
"""

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parents[2]
RECIPE = CHECKOUT / "recipes" / "quickstart.yaml"
ARMS = {
    "fp32": ["policy.precision=fp32"],
    "bf16": ["policy.precision=bf16"],
    "fp8": ["policy.precision=fp8"],
    "fp8_weights": ["policy.precision=fp8", "policy.fp8.quantize_activations=false"],
    "fp8_hf": ["policy.precision=fp8", "rollout.engine=hf"],
    "bf16_hf": ["policy.precision=bf16", "rollout.engine=hf"],
}
T_975 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}
"""97.5 % quantile of Student's t by degrees of freedom."""
MISMATCH = "sampling/sampling_logp_difference/mean"


def run(policy: Path, out: Path, arm: str, seed: int, overrides: list[str]) -> dict[str, Any]:
    """The numbers of one run; an unfinished one is gone on with."""
    name = f"{arm}-{seed}"
    settings = [f"run.name={name}", f"run.output_dir={out}", f"run.seed={seed}", f"policy.path={policy}", *ARMS[arm], *overrides]
    done = subprocess.run([sys.executable, "-m", "rl.train", str(RECIPE), *settings], cwd=CHECKOUT, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{name} ended with {done.returncode}; start again to go on")
    result = json.loads((out / name / "exit.json").read_text())["result"]
    rows = [json.loads(line) for line in (out / name / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if row["step"] > 0]
    found = {when: 100 * result[when]["eval/pass@1"] for when in ("before", "after")}
    mismatch = sum(row[MISMATCH] for row in steps) / len(steps)
    return found | {"half": 100 * result["after"]["eval/pass@1_ci95"], "mismatch": mismatch, "bytes": steps[-1]["sync/bytes"]}


def paired(differences: list[float]) -> str:
    mean = sum(differences) / len(differences)
    if len(differences) == 1:
        return f"{mean:+.2f} points (one seed has no interval)"
    deviation = math.sqrt(sum((d - mean) ** 2 for d in differences) / (len(differences) - 1))
    half = T_975[len(differences) - 1] * deviation / math.sqrt(len(differences))
    return f"{mean:+.2f} points ± {half:.2f} (95 %, {len(differences)} paired seeds: {', '.join(f'{d:+.2f}' for d in differences)})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("policy", type=Path)
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--arms", default="fp32,fp8", help=f"of {', '.join(ARMS)}")
    parser.add_argument("--out", type=Path, default=Path("outputs/fp8_accuracy"))
    parser.add_argument("overrides", nargs="*", help="further overrides of every run, such as learner.steps=20")
    given = parser.parse_intermixed_args()
    seeds, arms = [int(seed) for seed in given.seeds.split(",")], given.arms.split(",")
    unknown = [arm for arm in arms if arm not in ARMS]
    if unknown:
        raise SystemExit(f"--arms: no arm '{unknown[0]}'; there are {', '.join(ARMS)}")
    policy, out = given.policy.resolve(), given.out.resolve()
    found = {(arm, seed): run(policy, out, arm, seed, given.overrides) for seed in seeds for arm in arms}
    for (arm, seed), row in found.items():
        print(
            f"{arm} seed {seed}: pass@1 {row['before']:.1f} % -> {row['after']:.1f} % ± {row['half']:.1f}, "
            f"mean |d log-prob| {row['mismatch']:.5f}, {row['bytes']:,} bytes a sync"
        )
    for arm in arms[1:]:
        print(f"{arm} - {arms[0]}: {paired([found[arm, seed]['after'] - found[arms[0], seed]['after'] for seed in seeds])}")


if __name__ == "__main__":
    main()
