"""A run: everything that outlives a step, and what happens at a step's end.

`rl/open_run.py` puts one together; `Run.end_step` writes what a step found and, where it is due, evaluates and saves. Rank 0 has all
of it; the others have the learner alone.
"""

import os
import shutil
import time
from typing import Any

from transformers import PreTrainedTokenizerBase

from data.completions import write_completions
from data.journal import Journal
from data.values import Group, Prompt
from rewards.alarms import Alarms
from rewards.scorer import Scorer
from rl.advantage import group_advantage
from rl.checkpoint import Checkpoints, make_durable
from rl.config import TrainRecipe
from rl.engines.base import Sampling
from rl.engines.nccl import NcclSync
from rl.evaluation import Evaluation, evaluate
from rl.inputs import judge_of
from rl.learner import Learner
from rl.metrics_file import MetricsFile
from rl.policy import save_policy
from rl.pool import RolloutPool
from rl.progress import Display
from rl.ranks import Ranks
from rl.run_folder import RunFolder
from rl.stream import Ended, SharedStream
from rl.sync import WeightSync


class Interrupted(RuntimeError):
    """The run was asked to end (SIGTERM or Ctrl-C) and has left a checkpoint."""


class Run:
    """The parts of a run; made by `open_run`."""

    def __init__(self, recipe: TrainRecipe, folder: RunFolder, ranks: Ranks, tokenizer: PreTrainedTokenizerBase):
        self.recipe = recipe
        self.folder = folder
        self.ranks = ranks
        self.tokenizer = tokenizer
        self.start = 0
        """Steps that a checkpoint contains; the first step to do."""
        self.learner: Learner
        self.stream: SharedStream
        self.sync: WeightSync | NcclSync
        self.display: Display
        self.checkpoints = Checkpoints(folder.path / "checkpoints", recipe.checkpoint.keep, ranks)
        self.began = self.step_began = time.perf_counter()
        self.asked_to_end = False
        self.seconds_before = 0.0
        """Of the processes before this one, up to the checkpoint."""
        # Rank 0 alone:
        self.pool: RolloutPool
        self.scorer: Scorer
        self.journal: Journal
        self.metrics: MetricsFile
        self.alarms: Alarms
        self.held_out: tuple[Prompt, ...] = ()

    # --- the end of a step --------------------------------------------------------------------------------------------

    def end_step(self, step: int) -> None:
        """Metrics, evaluation and checkpoint after step `step` (from 0); collective."""
        done = step + 1
        learner = self.learner
        row = learner.watch.collect(with_kl=self.recipe.loss.kl_coef > 0.0)
        row |= learner.replay.collect() | learner.router.numbers() | learner.mtp_loss.collect()
        if self.ranks.main:
            self._write_step(done, row, time.perf_counter() - self.step_began)
        ending = self.ranks.agree(self.asked_to_end)
        if done == self.recipe.learner.steps or ending or _due(done, self.recipe.checkpoint.every):
            self.save(done)
        if ending and done < self.recipe.learner.steps:
            raise Interrupted(f"asked to end after step {done}; start again with the same command to go on")
        self.step_began = time.perf_counter()

    def _write_step(self, done: int, row: dict[str, float], taken_s: float) -> None:
        stream = self.stream.stream
        with stream.lock:
            groups = stream.handed
            ended = stream.end_step(self.learner.watch.taught)
            if self.recipe.log.completions:
                self._write_completions(done, groups, ended)
        row = {"step": done} | stream.numbers | row | self.sync.metrics()
        row["time/learn_s"] = taken_s - sum(row[f"time/{phase}_s"] for phase in ("rollout", "reward", "sync"))
        row["tokens/wasted"] = row["tokens/sampled"] - row["tokens/trained"]
        alarms = self.alarms.step(groups, stream.text)
        row |= alarms.metrics
        for message in [*alarms.messages, *self.learner.router.alarms()]:
            self.display.say(message)
        self.learner.router.write(self.folder.path / "router", done)
        if self.held_out and (done == self.recipe.learner.steps or _due(done, self.recipe.eval.every)):
            row |= self.evaluate(done, greedy=done == self.recipe.learner.steps)
        row["time/step_s"] = time.perf_counter() - self.step_began
        self.metrics.write(row)
        self.display.step(done, row)

    def _write_completions(self, done: int, groups: list[Group], ended: list[Ended]) -> None:
        advantages: list[list[float | None]] = group_advantage(groups, self.recipe.advantage).tolist()
        advantages += [[None] * len(end.group.completions) for end in ended[len(groups) :]]  # those that were not handed over
        texts = [[self.stream.stream.text(c) for c in end.group.completions] for end in ended]
        outcomes = [end.outcomes() for end in ended]
        extras = [self.stream.stream.extras(end.group) for end in ended]
        write_completions(self.folder.path / "completions", done, [end.group for end in ended], texts, advantages, outcomes, extras)

    def save(self, done: int) -> None:
        """The checkpoint after `done` steps; a use of a group is final once it is there."""
        self.display.phase("saving")
        state: dict[str, Any] = {"step": done, "updates": self.learner.updates, "optimizer_steps": self.learner.optim.steps}
        if self.ranks.main:
            state["seconds"] = self.seconds_before + time.perf_counter() - self.began
            with self.stream.stream.lock:
                state |= self.stream.stream.state() | {"alarms": self.alarms.state()}
                self.journal.flush()
        self.checkpoints.save(done, self.learner, self.tokenizer, state)
        if self.ranks.main:
            with self.stream.stream.lock:
                self.journal.contain(done, oldest=self.checkpoints.steps()[0])

    # --- evaluation ---------------------------------------------------------------------------------------------------

    def evaluate(self, done: int, greedy: bool) -> dict[str, float]:
        """Numbers of an evaluation after `done` steps; with `greedy` also of one greedy completion a prompt."""
        config = self.recipe.eval
        self.display.phase("evaluating")
        numbers = self._evaluate(config.samples, config.temperature, f"eval-{done}").metrics()
        if greedy and config.greedy:
            numbers |= self._evaluate(1, 0.0, f"greedy-{done}").metrics("eval/greedy")
        self.display.phase("sampling and learning")
        return numbers

    def _evaluate(self, samples: int, temperature: float, label: str) -> Evaluation:
        max_tokens = self.recipe.eval.max_tokens or self.recipe.rollout.max_tokens
        sampling = Sampling(max_tokens, temperature, tuple(self.recipe.rollout.stop))
        with self.stream.stream.quiet():
            return evaluate(
                self.pool, self.scorer, self.held_out, self.tokenizer, sampling,
                samples=samples, part=judge_of(self.recipe), label=f"{self.recipe.run.name}/{label}", seed=self.recipe.run.seed,
            )  # fmt: skip

    # --- beginning and end --------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Brings the engines to the learner's weights and evaluates before the first step."""
        if self.start:
            self.sync.push(self.learner, version=self.start)
        elif self.ranks.main:
            row: dict[str, float] = {"step": 0}
            if self.held_out:
                row |= self.evaluate(0, greedy=True)
                pass_1 = 100 * row["eval/pass@1"]
                self.display.say(
                    f"before: held-out pass@1 {pass_1:.1f} % ± {100 * row['eval/pass@1_ci95']:.1f} ({len(self.held_out)} prompts)"
                )
            self.metrics.write(row)
        self.step_began = time.perf_counter()

    def finish(self) -> dict[str, Any]:
        """Writes `final/` and returns the result; collective."""
        final, aside, before = (self.folder.path / name for name in ("final", ".final.partial", ".final.before"))
        if self.ranks.main:
            shutil.rmtree(aside, ignore_errors=True)
            save_policy(aside, self.learner.export(), self.learner.model, self.tokenizer)
            make_durable(aside)
            shutil.rmtree(before, ignore_errors=True)
            if final.exists():  # of a run that was to be shorter; a folder named `final` is whole at any moment
                os.rename(final, before)
            os.rename(aside, final)
            shutil.rmtree(before, ignore_errors=True)
        else:
            for _ in self.learner.export():
                pass
        rows = self.metrics.rows() if self.ranks.main else []
        return result_of(rows, self.seconds_before + time.perf_counter() - self.began)


def result_of(rows: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
    """What a finished run reports: evaluation before and after, and how much of what was sampled taught anything."""
    steps = [row for row in rows if row["step"] > 0]
    return {
        "before": {k: v for k, v in rows[0].items() if k.startswith("eval/")} if rows else {},
        "after": {k: v for k, v in rows[-1].items() if k.startswith("eval/")} if rows else {},
        "groups": sum(row["groups/sampled"] for row in steps),
        "groups_trained": sum(row["groups/trained"] for row in steps),
        "steps": len(steps),
        "seconds": seconds,
    }


def _due(done: int, every: int) -> bool:
    return every > 0 and done % every == 0
