"""The learner: raises what was better than its cohort, inside the clip.

`batches` turns the groups of a step into the batches of each optimizer step, `step` takes one. Between the two lies everything that
makes it cheap and none of what makes it correct: prompts are forwarded once a group, groups that teach nothing are not forwarded,
the output head runs where a token is predicted, and old log-probs are the training pass's own where that is exact.

All ranks hold all groups of a step, so each counts normalisers for itself; gradients and the numbers that are watched are summed over
ranks. Every rank runs the same number of passes.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace

import torch
from transformers import PreTrainedModel

from data.values import Group
from rl.attention import layout_of
from rl.batch import Item, Normaliser, TrainBatch, items_of, pack, split
from rl.config import LearnerConfig, LossConfig
from rl.logp import logp_and_entropy
from rl.lora import adapter_off, has_adapter
from rl.loss import policy_loss
from rl.mtp import MtpLoss
from rl.optim import AdamW, learning_rate
from rl.policy import checkpoint_specs, checkpoint_views, exported_codes
from rl.ranks import Ranks
from rl.replay import Replay
from rl.router import Router
from rl.shard import output_head
from rl.stream import RunStopped
from rl.watch import Watch


class Learner:
    """Policy, optimizer and, where the loss has a KL term, the reference; an adapter's is the policy with the adapter off."""

    def __init__(
        self,
        model: PreTrainedModel,
        loss: LossConfig,
        config: LearnerConfig,
        ranks: Ranks,
        *,
        temperature: float,
        max_tokens: int,
        reference: PreTrainedModel | None = None,
        sharded: torch.dtype | None = None,
    ):
        """`sharded`: the model's parameters are FP32 masters spread by FSDP2, and its layers run in this type."""
        self.model = model
        self.adapter = has_adapter(model)
        assert loss.kl_coef == 0.0 or self.adapter or reference is not None, "a KL term needs a reference, or an adapter to turn off"
        self.reference = reference
        self.loss = loss
        self.config = config
        self.ranks = ranks
        self.temperature = temperature
        self.max_tokens = max_tokens
        self.sharded = sharded
        self.mtp_loss = MtpLoss(model, config.mtp, ranks)
        self.optim = AdamW(model.named_parameters(), config.optimizer, apart=self.mtp_loss.parameters())
        self.updates = 0
        self.watch = Watch(ranks)
        self.router = Router(model, config.router, ranks)
        self.replay = Replay(model, loss.replay, ranks)
        self.first_pass = True
        """Whether the next training passes are the first that their tokens make through the policy in this step."""

    # --- what a step trains on ----------------------------------------------------------------------------------------

    def batches(self, groups: Sequence[Group], advantages_PG: torch.Tensor) -> Iterator[list[TrainBatch]]:
        """The passes of each optimizer step on this rank; reads the weights before the first update.

        `advantages_PG` are those of all groups. A step is divided by the counts of the whole batch over its optimizer steps, so
        that every token of a batch weighs the same.
        """
        # Exact where the loss is the policy's alone: a token of advantage 0 has gradient 0. A KL term or a router's loss needs them all.
        skip_zero = self.loss.kl_coef == 0.0 and not self.router.has_loss
        work, whole = items_of(groups, advantages_PG, self.loss.mask_truncated, skip_zero)
        steps = self.config.steps_per_batch
        share = Normaliser(whole.completions / steps, whole.tokens / steps)
        slices = [[items for items in work if items[0].group * steps // len(groups) == n] for n in range(steps)]
        batched = [[self._finish(batch) for batch in self._pack(part, share)] for part in slices]
        self.watch.begin(groups, work, self.loss.mask_truncated, version=self.updates // self._updates_per_step)
        for epoch in range(self.config.epochs_per_batch):
            self.first_pass = epoch == 0 and not self._old_pass
            yield from batched
        self.router.end_step(skipped_groups=(len(groups) - len(work)) / len(groups))

    def _pack(self, work: Sequence[list[Item]], share: Normaliser) -> Iterator[TrainBatch]:
        for part in split(work, self.config.micro_tokens, self.ranks.count)[self.ranks.rank]:
            yield pack(part, share, temperature=self.temperature, max_tokens=self.max_tokens, device=self.ranks.device)

    @property
    def _updates_per_step(self) -> int:
        return self.config.steps_per_batch * self.config.epochs_per_batch

    @property
    def _old_pass(self) -> bool:
        """Whether what the weights say before the first update needs a pass of its own: old log-probs, or routes."""
        return self._updates_per_step > 1 and (self.loss.ratio_base == "learner" or self.loss.replay == "learner")

    def _finish(self, batch: TrainBatch) -> TrainBatch:
        """Adds the log-probs that the loss needs and the training pass does not have."""
        if self._old_pass:
            # The weights move between the updates of this batch: old_logp is what they were before the first.
            with self.replay.recorder.recording() as notes, self.replay.reading(batch, first=True, before_updates=True) as forward_done:
                with self.router.reading(batch, count=True):
                    batch = replace(batch, old_logp_N=self._logp(self.model, batch, grad=False)[0])
                forward_done()
            batch = self.replay.keep(batch, notes)
        if self.loss.kl_coef > 0.0:
            with ExitStack() as before:
                if self.reference is None:  # the policy as it was when the run began
                    before.enter_context(adapter_off(self.model))
                    before.enter_context(self.router.first_bias())
                batch = replace(batch, ref_logp_N=self._logp(self.reference or self.model, batch, grad=False)[0])
        return batch

    # --- one optimizer step -------------------------------------------------------------------------------------------

    def step(self, batches: Sequence[TrainBatch]) -> None:
        """Forward and backward over the passes of one optimizer step, then the update.

        Raises RunStopped, on all ranks, if the gradient is not finite: the weights stay what they were.
        """
        self._backward(batches)
        norm = self.optim.clip(self.config.max_grad_norm)
        if not math.isfinite(norm):
            raise RunStopped(
                f"step {self.updates // self._updates_per_step}: the gradient's norm is {norm}, so the policy was not updated, "
                "and no checkpoint holds it; look at the last rows of metrics.jsonl: a lower learner.lr may help, or, where mismatch grew, "
                "loss.correction"
            )
        rate = self.learning_rate()
        self.optim.step(rate)
        self.updates += 1
        self.watch.update(norm, rate)

    def _backward(self, batches: Sequence[TrainBatch]) -> None:
        """Gradients of an optimizer step, summed over passes and ranks."""
        if self.router.needs_tally(len(batches)):
            self._tally(batches)
        for batch in batches:
            # A backward that recomputes activations reads the routes again, so it stands within.
            with self.replay.reading(batch, first=self.first_pass) as forward_done:
                with self.router.reading(batch, count=self.first_pass):
                    hidden_TD = self._hidden(self.model, batch)
                forward_done()
                head = output_head(self.model, self.sharded)
                logp_N, entropy_N = self._predict(head, hidden_TD, batch)
                parts = policy_loss(batch, logp_N, batch.old_logp_N, self.loss, batch.ref_logp_N)
                # Pieces of one sum: dividing by counts of the whole step has been done, so passes and ranks add up.
                (parts.loss + self.router.loss(batch) + self.mtp_loss(batch, hidden_TD, head)).backward()
            self.watch.batch(batch, parts, logp_N.detach(), entropy_N)
        self._reduce_gradients()

    @torch.no_grad()
    def _tally(self, batches: Sequence[TrainBatch]) -> None:
        """The load of the whole optimizer step, for an auxiliary loss."""
        with self.router.tallying() as tally:
            for batch in batches:
                with self.replay.reading(batch) as forward_done, self.router.reading(batch, count=False):
                    self._hidden(self.model, batch)
                    forward_done()
                tally(batch)

    def learning_rate(self) -> float:
        """Rate of the next update; schedules count steps of the run, so fractions of one between its updates do not matter."""
        config = self.config
        step = self.updates // self._updates_per_step
        return learning_rate(step, config.lr, config.schedule, config.warmup_steps, config.schedule_steps or config.steps)

    def _logp(self, model: PreTrainedModel, batch: TrainBatch, grad: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """logp_N and entropy_N of a batch under a model."""
        with torch.set_grad_enabled(grad):
            hidden_TD = self._hidden(model, batch)
            return self._predict(output_head(model, self.sharded), hidden_TD, batch)

    def _predict(
        self, head: Callable[[torch.Tensor], torch.Tensor], hidden_TD: torch.Tensor, batch: TrainBatch
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return logp_and_entropy(head, hidden_TD[batch.source_N], batch.target_N, batch.temperature, self.model.config.vocab_size)

    def _hidden(self, model: PreTrainedModel, batch: TrainBatch) -> torch.Tensor:
        """[T, D], what the output head reads."""
        return model.get_decoder()(
            input_ids=batch.tokens_T[None], position_ids=batch.position_T[None], use_cache=False, cohort=layout_of(batch)
        ).last_hidden_state[0]

    def _reduce_gradients(self) -> None:
        """Sums gradients over ranks; sharded parameters have theirs summed by FSDP in the backward."""
        if self.ranks.count > 1 and self.sharded is None:
            for _, grad in self.optim.grads():
                self.ranks.sum(grad)

    # --- what leaves it -----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What a checkpoint needs beside the policy's files: the optimizer's tensors, and weights that the files do not have as they are.

        Those are an adapter's, which the files have merged, sharded masters, which the files have in the type of the layers, and the
        masters of codes.
        """
        apart = self.adapter or self.sharded is not None
        codes = exported_codes(self.model)
        weights = {f"{name}/weight": p.detach() for name, p in self.optim.parameters if apart or name in codes}
        return self.optim.state_dict() | weights | self.router.state_dict()

    def export(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The policy's tensors under their checkpoint names; collective where parameters are sharded."""
        return checkpoint_views(self.model, self.sharded)

    def specs(self) -> Iterator[tuple[str, str, tuple[int, ...]]]:
        """Name, dtype and shape of what `export` gives; not collective."""
        return checkpoint_specs(self.model, self.sharded)
