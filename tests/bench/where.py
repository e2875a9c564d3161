"""Where a step of ours spends its time, and how near it comes to what this machine's matrix product can do.

    python tests/bench/where.py [--case base --case prompt_2048 …] [--repeats 5]

Phases are clocked with the graph cut between the decoder and the output head. `gemm_share` is the rate of the step's products
(2 x multiply-adds of projections, experts, attention and head, backward included, recomputation too) over the best rate measured
here for a [1024, 1024] product, both in CPU seconds of one thread. The cases are those of `learner_vs_trl.py`.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from growth import sizes
from harness import ADVANTAGE, Case, Clock, line, make_groups, make_learner, make_policy, table
from learner_vs_trl import CASES

from rl.advantage import group_advantage
from rl.attention import layout_of
from rl.logp import logp_and_entropy
from rl.loss import policy_loss

PHASES = ("pack", "decoder_forward", "head_forward", "loss", "head_backward", "decoder_backward", "watch", "optimizer")


def gemm_rate(repeats: int = 9) -> float:
    """Best multiply-add rate of a square product, in flop a CPU second."""
    a = torch.randn(1024, 1024)
    best = float("inf")
    for _ in range(repeats):
        began = time.process_time()
        a @ a
        best = min(best, time.process_time() - began)
    return 2 * 1024**3 / best


def flops(case: Case, tokens: float, pairs: float, logits: float) -> float:
    """Of the products of one step: forward once, backward twice, attention's backward 5/2 and the head's once more."""
    hidden, width, heads, key_heads, head, chosen = 256, 256, 8, 2, 32, 4  # as `harness.make_policy` has them
    dense = hidden * head * (2 * heads + 2 * key_heads) + chosen * 3 * hidden * width
    attention = 2 * heads * head
    return 2 * (case.layers * (3 * dense * tokens + 3.5 * attention * pairs) + 4 * hidden * logits)


def measure(case: Case, repeats: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        learner = make_learner(make_policy(case, Path(folder)))
    groups = make_groups(case)
    clocks = {phase: Clock() for phase in PHASES}
    whole = Clock()
    for turn in range(repeats + 1):
        with whole.running():
            _step(learner, groups, clocks)
        if turn == 0:  # warms up
            for clock in (whole, *clocks.values()):
                clock.cpu.clear()
                clock.wall.clear()
    rate = gemm_rate()
    teaching = [group for group in groups if len({s.value for s in group.scores}) > 1]
    work = flops(case, *sizes(teaching, case.vocab))
    total = min(whole.cpu)
    return (
        {"gemm_share": round(work / total / rate, 3), "gemm_gflops": round(rate / 1e9, 1), "step_gflop": round(work / 1e9, 1)}
        | whole.numbers()
        | {phase: round(min(clock.cpu), 4) for phase, clock in clocks.items()}
        | {f"{phase}_share": round(min(clock.cpu) / total, 3) for phase, clock in clocks.items()}
    )


def _step(learner: Any, groups: Any, clocks: dict[str, Clock]) -> None:
    """`Learner.batches` and `Learner.step` for one pass, taken apart."""
    with clocks["pack"].running():
        (batch,) = next(iter(learner.batches(groups, group_advantage(groups, ADVANTAGE))))
    model = learner.model
    with clocks["decoder_forward"].running():
        hidden_TD = model.get_decoder()(
            input_ids=batch.tokens_T[None], position_ids=batch.position_T[None], use_cache=False, cohort=layout_of(batch)
        ).last_hidden_state[0]
    cut_TD = hidden_TD.detach().requires_grad_()
    with clocks["head_forward"].running():
        logp_N, entropy_N = logp_and_entropy(
            model.get_output_embeddings(), cut_TD[batch.source_N], batch.target_N, batch.temperature, model.config.vocab_size
        )
    with clocks["loss"].running():
        parts = policy_loss(batch, logp_N, batch.old_logp_N, learner.loss, batch.ref_logp_N)
    with clocks["head_backward"].running():
        parts.loss.backward()
    with clocks["decoder_backward"].running():
        hidden_TD.backward(cut_TD.grad)
    with clocks["watch"].running():
        learner.watch.batch(batch, parts, logp_N.detach(), entropy_N)
        learner.watch.collect(with_kl=False)
    with clocks["optimizer"].running():
        learner.optim.clip(learner.config.max_grad_norm)
        learner.optim.step(learner.learning_rate())


def main() -> None:
    parser = argparse.ArgumentParser(description="Where a step of ours spends its time.")
    parser.add_argument("--case", action="append", choices=CASES, help="may be given several times; base and prompt_2048 if left out")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    rows = []
    for name in arguments.case or ["base", "prompt_2048"]:
        rows.append({"case": name} | measure(CASES[name], arguments.repeats))
        line(rows[-1])
    table(rows, ("case", "cpu_min_s", "gemm_share", *(f"{phase}_share" for phase in PHASES)))


if __name__ == "__main__":
    main()
