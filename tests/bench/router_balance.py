"""From a collapsed router to balance: max violation step by step, with the correction bias and without it, in one picture.

    PYTHONPATH=tests python -m bench.router_balance [--steps 100] [--prompts 16] [--out docs/router_balance.png]

The policy is tests/policies.py's tiny DeepSeek-V3 (8 experts in 2 groups, 2 a token) whose gates were bent so that expert 0 has nearly
every token. The learner takes GRPO steps on random completions with random rewards; nothing in them asks for balance. Prints the
numbers as JSON. Needs matplotlib for the picture (in the extra `dev`).
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import policies
import torch
from made import make_groups, make_learner

from data.values import Group
from rl.advantage import group_advantage
from rl.config import AdvantageConfig, LossConfig, RouterConfig
from rl.learner import Learner
from rl.policy import checkpoint_views, load_model, load_tokenizer, save_policy
from rl.router import gates

LOGIT = 6.0
"""Of expert 0, for every token; its score is then 0.998."""


def groups_of(step: int, count: int) -> list[Group]:
    rewards = np.random.default_rng(1000 + step).integers(0, 2, (count, 4)).tolist()
    return make_groups(rewards, seed=step, prompt_tokens=8)


def collapsed_policy(folder: Path) -> Path:
    """Bends expert 0's row of each gate so that its logit is LOGIT whatever the token (least squares on many), and flattens the others."""
    model = load_model(policies.tiny_deepseek_v3(folder / "even", seed=0, layers=3), torch.float32, attention_name="sdpa")
    for gate in gates(model):
        hidden: list[torch.Tensor] = []
        handle = gate.register_forward_hook(lambda module, inputs, output, hidden=hidden: hidden.append(inputs[0].flatten(0, -2)))
        with torch.no_grad():
            model(torch.randint(2, 64, (64, 20), generator=torch.Generator().manual_seed(0)))
            handle.remove()
            x_TD = hidden[0].double()
            ridge_DD = torch.eye(x_TD.shape[1], dtype=torch.float64)
            gate.weight.mul_(0.3)
            gate.weight[0] = torch.linalg.solve(x_TD.T @ x_TD + ridge_DD, LOGIT * x_TD.sum(0)).float()
            gate.e_score_correction_bias.zero_()
    save_policy(folder / "collapsed", checkpoint_views(model), model, load_tokenizer(folder / "even"))
    return folder / "collapsed"


def step_of(learner: Learner, groups: list[Group]) -> dict[str, float]:
    for batches in learner.batches(groups, group_advantage(groups, AdvantageConfig())):
        learner.step(batches)
    return learner.router.numbers()


def curve(folder: Path, *, bias_step: float, steps: int, prompts: int = 4) -> list[float]:
    """Max violation of each step; the fewer prompts in one, the more of it is chance."""
    policy = collapsed_policy(folder)
    learner = make_learner(policy, LossConfig(), dtype=torch.float32, lr=1e-4, router=RouterConfig(bias_step=bias_step))
    return [step_of(learner, groups_of(step, prompts))["moe/max_violation"] for step in range(steps)]


def draw(curves: dict[str, list[float]], out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.4), dpi=90)
    for label, violations in curves.items():
        axes.plot(range(1, len(violations) + 1), violations, label=label)
    axes.axhline(1.0, color="grey", linewidth=0.8, linestyle=":")
    axes.set(xlabel="step", ylabel="max violation (max load / mean load - 1)", ylim=(0, 3.2))
    axes.set_title("From a collapsed router, tiny DeepSeek-V3, 8 experts, 2 a token", fontsize=9)
    axes.legend(fontsize=8)
    figure.tight_layout()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--prompts", type=int, default=16, help="a step, with 4 completions each")
    parser.add_argument("--bias-step", type=float, default=0.01)
    parser.add_argument("--out", type=Path, default=Path("docs/router_balance.png"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    curves = {}
    for label, step in (("without the bias", 0.0), (f"with the bias, {arguments.bias_step:g} a step", arguments.bias_step)):
        with tempfile.TemporaryDirectory() as folder:
            curves[label] = curve(Path(folder), bias_step=step, steps=arguments.steps, prompts=arguments.prompts)
    print(json.dumps({label: [round(v, 3) for v in violations] for label, violations in curves.items()}))
    for label, violations in curves.items():
        below = next((n + 1 for n, v in enumerate(violations) if v < 1.0), None)
        last = violations[-20:]
        print(
            f"{label}: {violations[0]:.2f} at step 1, first below 1.0: step {below}; in the last {len(last)} of {len(violations)} steps "
            f"{min(last):.2f} to {max(last):.2f}, mean {sum(last) / len(last):.2f}"
        )
    draw(curves, arguments.out)


if __name__ == "__main__":
    main()
