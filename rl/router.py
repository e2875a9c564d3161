"""The routers of a mixture of experts: how evenly they spread the tokens, and what keeps them even.

Everything here reads transformers' gates through forward hooks; no model code is repeated. Load is what the live router chooses,
counted once a step, where a token first passes the policy: the pass for old log-probs if there is one, else the training pass. A
shared prompt's tokens count once for each completion that stands on them. Groups that are not forwarded do not count; their share
is `moe/skipped_groups`.

DeepSeek-V3's gate chooses by score + bias and weighs by score alone. The bias moves once a step of the run, after its last update,
by a fixed amount against each expert's load (arXiv:2408.15664, algorithm 1; arXiv:2412.19437, section 2.1.2):

    b_e += bias_step * sign(mean load - load_e)

The load is that of all ranks, so all move alike. The bias is a buffer that checkpoints hold and engines are sent, so the next step
is sampled under it. Group-limited routing is the gate's own and stays as it is. Losses that balance stand in `rl/router_loss.py`.

    T  tokens      K  experts a token      L  MoE layers      E  experts
"""

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from rl.batch import TrainBatch
from rl.config import RouterConfig
from rl.mtp import MtpLayer
from rl.ranks import Ranks
from rl.router_loss import aux_loss, load_of_logits, sequence_loss

TAKES_ALL = 0.9
"""Max violation, over the largest there can be, at which an expert has nearly every token: routing has collapsed."""
SAME_FEW = 1.5
"""Effective experts (the exponential of the load's entropy), over K, below which all tokens go to the same few of many."""


def gates(model: nn.Module) -> list[Any]:
    """The routers of a model, one a MoE layer, in order: the `gate` that stands beside `experts`. A dense model has none.

    That of a multi-token prediction module is not among them: no token of the policy passes it.
    """
    apart = {id(inner) for module in model.modules() if isinstance(module, MtpLayer) for inner in module.modules()}
    blocks = [dict(module.named_children()) for module in model.modules() if id(module) not in apart]
    found = [block["gate"] for block in blocks if "gate" in block and "experts" in block]
    return [_without_adapter(gate) for gate in found]


def _without_adapter(gate: nn.Module) -> nn.Module:
    """The gate itself, where peft has wrapped it; its output is that of the wrapper."""
    while (inner := dict(gate.named_children()).get("base_layer")) is not None:
        gate = inner
    return gate


class Router:
    """Counts load, moves the bias, and gives the loss that balances; made on every rank, for the policy alone."""

    def __init__(self, model: nn.Module, config: RouterConfig, ranks: Ranks):
        self.gates = gates(model)
        self.config = config
        self.ranks = ranks
        self.load_LE: torch.Tensor | None = None
        """float64, tokens by expert of the last step, over all ranks; None before the first and for a dense policy."""
        self.loss_mean = 0.0
        """What `loss` added in the last step, mean over its updates."""
        self.has_loss = config.aux_loss > 0.0 or config.sequence_loss > 0.0
        self._loads: dict[int, torch.Tensor] = {}
        self._update_load: tuple[torch.Tensor, float] | None = None
        self._batch: TrainBatch | None = None
        self._counts = False
        self._logits: dict[int, torch.Tensor] = {}
        self._skipped = 0.0
        self._updates = 0
        self._loss = torch.zeros((), dtype=torch.float64)
        self._collapsed: set[int] = set()
        self._first_bias = [gate.e_score_correction_bias.clone() for gate in self.gates if isinstance(gate, DeepseekV3TopkRouter)]
        for layer, gate in enumerate(self.gates):
            gate.register_forward_hook(self._reader(layer))

    # --- what passes --------------------------------------------------------------------------------------------------

    @contextmanager
    def reading(self, batch: TrainBatch, count: bool) -> Iterator[None]:
        """The forward within is the policy's on this batch; with `count` its load is the step's. Recomputation is outside."""
        self._batch, self._counts = batch, count
        self._logits = {}
        try:
            yield
        finally:
            self._batch = None

    def _reader(self, layer: int) -> Callable[[nn.Module, Any, tuple[torch.Tensor, ...]], None]:
        def read(gate: nn.Module, inputs: Any, output: tuple[torch.Tensor, ...]) -> None:
            if self._batch is None:
                return
            logits_TE, _, chosen_TK = output  # as all of transformers' routers give them
            if self._counts:
                times_TK = self._batch.count_T.double().repeat_interleave(chosen_TK.shape[-1])
                load_E = torch.bincount(chosen_TK.flatten(), times_TK, minlength=logits_TE.shape[-1])
                self._loads[layer] = self._loads[layer] + load_E if layer in self._loads else load_E
            if self.has_loss:
                self._logits[layer] = logits_TE

        return read

    # --- losses -------------------------------------------------------------------------------------------------------

    def needs_tally(self, passes: int) -> bool:
        """Begins an optimizer step. Whether none of its passes sees the whole load, which the auxiliary loss weighs by."""
        self._update_load = None
        self._updates += 1
        return self.config.aux_loss > 0.0 and passes * self.ranks.count > 1

    @contextmanager
    def tallying(self) -> Iterator[Callable[[TrainBatch], None]]:
        """Sums the load of an optimizer step over its passes and ranks: call what it yields after the forward of each. Collective."""
        loads, total_rows = [], 0.0

        def tally(batch: TrainBatch) -> None:
            nonlocal total_rows
            load_E, rows = load_of_logits(self._all_logits(), batch.count_T, self.gates[0].top_k)
            loads.append(load_E)
            total_rows += rows

        yield tally
        load_E = torch.stack(loads).sum(0)
        packed = self.ranks.sum(torch.cat([load_E, load_E.new_tensor([total_rows])]))
        self._update_load = packed[:-1], float(packed[-1])

    def loss(self, batch: TrainBatch) -> torch.Tensor | float:
        """The balancing loss of the pass that has just been read: pieces of one sum over the passes of an optimizer step."""
        if not self.has_loss:
            return 0.0
        logits, loss = self._all_logits(), torch.zeros((), device=batch.tokens_T.device)
        if self.config.aux_loss > 0.0:
            top_k = self.gates[0].top_k
            load_E, rows = self._update_load or load_of_logits(logits, batch.count_T, top_k)
            loss = loss + self.config.aux_loss * aux_loss(logits, batch.count_T, load_E, rows)
        if self.config.sequence_loss > 0.0:
            loss = loss + self.config.sequence_loss * sum(
                sequence_loss(logits_TE, gate.top_k, batch) for logits_TE, gate in zip(logits, self.gates, strict=True)
            )
        self._logits = {}
        self._loss = self._loss.to(loss.device) + loss.detach()
        return loss

    def _all_logits(self) -> list[torch.Tensor]:
        return [self._logits[layer] for layer in range(len(self.gates))]

    # --- once a step --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def end_step(self, skipped_groups: float) -> None:
        """After the last update: the step's load over all ranks, and the bias moves against it. Collective.

        `skipped_groups` is the share of groups that were not forwarded.
        """
        self._skipped = skipped_groups
        if not self.gates:
            return
        # A rank whose passes were all of weight zero has counted zeros.
        self.load_LE = self.ranks.sum(torch.stack([self._loads[layer] for layer in range(len(self.gates))]))
        self._loads = {}
        if self.has_loss:
            self.loss_mean = float(self.ranks.sum(self._loss)) / self._updates
        self._loss, self._updates = torch.zeros_like(self._loss), 0
        if self.config.bias_step > 0.0:
            for gate, load_E in zip(self.gates, self.load_LE, strict=True):
                bias_E = gate.e_score_correction_bias
                bias_E += self.config.bias_step * (load_E.mean() - load_E).sign().to(bias_E.dtype)

    @contextmanager
    def first_bias(self) -> Iterator[None]:
        """Within, the biases are what they were when the policy was loaded: the reference's, where policy and reference are one."""
        biased = [gate for gate in self.gates if isinstance(gate, DeepseekV3TopkRouter)]
        now = [gate.e_score_correction_bias.clone() for gate in biased]
        for gate, first in zip(biased, self._first_bias, strict=True):
            gate.e_score_correction_bias.copy_(first)
        try:
            yield
        finally:
            for gate, bias in zip(biased, now, strict=True):
                gate.e_score_correction_bias.copy_(bias)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The biases as they stand, where they move: an adapter's checkpoint is read on top of the weights it began with."""
        if self.config.bias_step == 0.0:
            return {}
        return {f"router/{layer}/bias": gate.e_score_correction_bias for layer, gate in enumerate(self.gates)}

    # --- what is watched ----------------------------------------------------------------------------------------------

    def numbers(self) -> dict[str, float]:
        """The last step's numbers, equal on all ranks; none if no token passed a router."""
        if self.load_LE is None or not self.load_LE.any():
            return {}
        numbers = load_numbers(self.load_LE) | {"moe/skipped_groups": self._skipped}
        return numbers | {"moe/loss": self.loss_mean} if self.has_loss else numbers

    def alarms(self) -> list[str]:
        """One line for each layer whose routing collapsed in the last step; it is silent until the layer has recovered."""
        found = {} if self.load_LE is None else collapsed(self.load_LE, self.gates[0].top_k)
        new = [said for layer, said in found.items() if layer not in self._collapsed]
        self._collapsed = set(found)
        return new

    def write(self, folder: Path, step: int) -> None:
        """`step-<N>.npz`: `load` uint32 [L, E], and `bias` float32 [L, E] after the step where the gates have one."""
        if self.load_LE is None:
            return
        arrays: dict[str, Any] = {"load": self.load_LE.cpu().numpy().astype(np.uint32)}
        if self._first_bias:
            arrays["bias"] = torch.stack([gate.e_score_correction_bias for gate in self.gates]).float().cpu().numpy()
        folder.mkdir(exist_ok=True)
        with (aside := folder / f".step-{step}.partial").open("wb") as file:
            np.savez_compressed(file, **arrays)
        os.replace(aside, folder / f"step-{step}.npz")


def load_numbers(load_LE: torch.Tensor) -> dict[str, float]:
    """How far from balance: float [L, E] tokens by expert.

    `moe/max_violation` is max load / mean load - 1 (arXiv:2408.15664, section 4.1) of the layer where it is largest: 0 to E/K - 1.
    `moe/load_entropy` is relative to that of an even load, mean over layers; `moe/dead_experts` is the share without a token.
    """
    experts = load_LE.shape[1]
    return {
        "moe/max_violation": float(_share(load_LE).max()) * experts - 1,
        "moe/load_entropy": float(_entropy(load_LE).mean()) / math.log(experts),
        "moe/dead_experts": float((load_LE == 0).double().mean()),
    }


def collapsed(load_LE: torch.Tensor, top_k: int) -> dict[int, str]:
    """By MoE layer (from 0), what is wrong with it: an expert that nearly every token goes to, or the same few experts for all."""
    experts = load_LE.shape[1]
    if not load_LE.any() or experts <= top_k:
        return {}
    found = {}
    effective_L = _entropy(load_LE).exp()
    for layer, share_E in enumerate(_share(load_LE)):
        if float(share_E.max()) * experts - 1 >= TAKES_ALL * (experts / top_k - 1):
            what = f"expert {int(share_E.argmax())} has {100 * top_k * float(share_E.max()):.0f} % of its tokens"
        elif float(effective_L[layer]) < SAME_FEW * top_k < experts / 2:
            what = f"its tokens go to {float(effective_L[layer]):.1f} of {experts} experts, {top_k} a token"
        else:
            continue
        found[layer] = f"alarm: routing has collapsed in MoE layer {layer}: {what}; see router/step-*.npz and learner.router"
    return found


def _share(load_LE: torch.Tensor) -> torch.Tensor:
    return load_LE / load_LE.sum(dim=1, keepdim=True)


def _entropy(load_LE: torch.Tensor) -> torch.Tensor:
    share_LE = _share(load_LE)
    return -torch.special.xlogy(share_LE, share_LE).sum(dim=1)


def cut_router(folder: Path, first: int) -> None:
    """Removes the files of step `first` and later, which a run that goes on writes again."""
    for path in folder.glob("step-*.npz"):
        if int(path.stem.removeprefix("step-")) >= first:
            path.unlink()
