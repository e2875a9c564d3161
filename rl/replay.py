"""Routing replay: experts that were chosen once are chosen again, so that engine and learner, or two updates, run the same network.

A router's choice is discontinuous: a change in the last bits of a hidden state may flip an expert and move a token's log-prob by far
more than rounding does. `loss.replay` freezes the choice and nothing else:

    learner   the routes of the pass for old log-probs, in all updates of the step (R2)
    rollout   the engine's, in that pass and in all updates (R3, arXiv:2510.11370)

The hook of a gate keeps its logits, puts the recorded ids in the place of the chosen ones, and weighs them by the live scores, so
gates keep their gradient. DeepSeek-V3's bias has no part in that: it chooses, and here nothing is chosen. Tokens without a valid
route go where the live router sends them, and are counted. A prompt's routes are those that its first completion came with.

Every pass reads each layer's routes exactly once in its forward, which is asserted, and once more where a backward recomputes
activations. The pass of the reference reads none.

    T  tokens      K  experts a token      L  MoE layers      E  experts      G  rows of a group
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from data.values import Completion
from rl.batch import TrainBatch
from rl.ranks import Ranks
from rl.router import gates

Output = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""What a gate gives: logits [T, E], weights [T, K], chosen experts [T, K]."""


def gate_weights(gate: nn.Module, logits_TE: torch.Tensor, chosen_TK: torch.Tensor) -> torch.Tensor:
    """The weights that a gate gives to these experts, with their gradient: scores without bias, as the gate normalises them."""
    match gate:
        case DeepseekV3TopkRouter():
            weights_TK = logits_TE.sigmoid().gather(1, chosen_TK)
            if gate.norm_topk_prob:
                weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20)
            return weights_TK * gate.routed_scaling_factor
        case Qwen3MoeTopKRouter():
            weights_TK = logits_TE.softmax(-1, dtype=torch.float).gather(1, chosen_TK)
            if gate.norm_topk_prob:
                weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
            return weights_TK.to(logits_TE.dtype)
    raise ValueError(f"loss.replay: routes of {type(gate).__name__} cannot be replayed; DeepSeek-V3's and Qwen3-MoE's can, or take none")


@dataclass
class _Pass:
    """One pass of the policy: what it may read, and what was found on the way."""

    batch: TrainBatch
    frozen: bool
    first: bool
    reads: list[int]
    flipped: list[torch.Tensor] = field(default_factory=list)
    """bool [T] by layer, where the live choice is another set of experts than the recorded one."""
    forward_done: bool = False

    def at(self, layer: int, gate: nn.Module, output: Output) -> Output | None:
        """What goes in the place of the gate's output; None leaves it."""
        routes_TLK, valid_T = self.batch.routes_TLK, self.batch.routes_valid_T
        if routes_TLK is None or valid_T is None:
            return None
        logits_TE, _, live_TK = output
        if routes_TLK.shape[1:] != (len(self.reads), live_TK.shape[1]):
            raise ValueError(
                f"routes are of {routes_TLK.shape[1]} layers and {routes_TLK.shape[2]} experts a token, the policy has "
                f"{len(self.reads)} MoE layers and {live_TK.shape[1]}: they are another policy's"
            )
        routed_TK = routes_TLK[:, layer].long()
        if self.first and not self.forward_done:
            self.flipped.append(valid_T & (routed_TK.sort(-1).values != live_TK.sort(-1).values).any(-1))
        if not self.frozen:
            return None
        self.reads[layer] += not self.forward_done
        chosen_TK = torch.where(valid_T[:, None], routed_TK, live_TK)
        return logits_TE, gate_weights(gate, logits_TE, chosen_TK), chosen_TK


class Replay:
    """Hooks on the gates of a policy; made after its Router, whose hooks see the live choice."""

    def __init__(self, model: nn.Module, kind: Literal["none", "learner", "rollout"], ranks: Ranks):
        self.kind = kind
        self.ranks = ranks
        self.gates = gates(model)
        self.recorder = RouteRecorder(model, on=kind == "learner")
        self._pass: _Pass | None = None
        self._sums = torch.zeros(4, dtype=torch.float64)
        """Of the step so far, on this rank: tokens, those with valid routes, those with a flip, flips over all layers."""
        for layer, gate in enumerate(self.gates):
            gate.register_forward_hook(self._hook(layer))

    def _hook(self, layer: int) -> Callable[[nn.Module, Any, Output], Output | None]:
        return lambda gate, inputs, output: self._pass.at(layer, gate, output) if self._pass is not None else None

    @contextmanager
    def reading(self, batch: TrainBatch, *, first: bool = False, before_updates: bool = False) -> Iterator[Callable[[], None]]:
        """The pass within, forward and backward, is the policy's on this batch; call what it yields when the forward is done.

        first: the tokens' first pass in this step, whose flips count. before_updates: the learner's own routes are not there yet.
        """
        frozen = self.kind == "rollout" or (self.kind == "learner" and not before_updates)
        now = self._pass = _Pass(batch, frozen, first, [0] * len(self.gates))

        def forward_done() -> None:
            now.forward_done = True
            if frozen and batch.routes_TLK is not None:
                assert all(reads == 1 for reads in now.reads), f"routes were read {now.reads} times by layer, not once"
            if first:
                self._count(now)

        try:
            yield forward_done
        finally:
            self._pass = None

    def keep(self, batch: TrainBatch, notes: list[list[torch.Tensor]]) -> TrainBatch:
        """The batch with the routes that `recorder` noted of its pass, which the updates are to repeat."""
        if not notes:
            return batch
        return replace(batch, routes_TLK=routes_of_pass(notes), routes_valid_T=torch.ones_like(batch.tokens_T, dtype=torch.bool))

    def _count(self, now: _Pass) -> None:
        some_T = now.batch.count_T > 0
        known_T = torch.zeros_like(some_T) if now.batch.routes_valid_T is None else now.batch.routes_valid_T
        flipped_LT = torch.stack(now.flipped) if now.flipped else torch.zeros_like(some_T)[None]
        counts = (some_T.sum(), (some_T & known_T).sum(), flipped_LT.any(0).sum(), flipped_LT.sum())
        self._sums += torch.stack(counts).cpu().double()

    def collect(self) -> dict[str, float]:
        """The step's numbers, equal on all ranks; collective. None where no routes are known and none are wanted."""
        tokens, known, tokens_flipped, flips = self.ranks.sum(self._sums.to(self.ranks.device)).tolist()
        self._sums = torch.zeros(4, dtype=torch.float64)
        numbers = {}
        if known:
            numbers["mismatch/flipped_tokens"] = tokens_flipped / known
            numbers["mismatch/flipped_routes"] = flips / (known * len(self.gates))
        if self.kind == "rollout" and tokens:
            numbers["replay/live_tokens"] = 1.0 - known / tokens
        return numbers


class RouteRecorder:
    """Notes what the gates of a model choose, forward by forward; one that is not `on` notes nothing."""

    def __init__(self, model: nn.Module, on: bool = True):
        self._notes: list[list[torch.Tensor]] | None = None
        found = gates(model) if on else []
        self.layers = len(found)
        for layer, gate in enumerate(found):
            gate.register_forward_hook(self._hook(layer))

    def _hook(self, layer: int) -> Callable[[nn.Module, Any, Output], None]:
        def note(gate: nn.Module, inputs: Any, output: Output) -> None:
            if self._notes is not None:
                logits_TE, _, chosen_TK = output
                self._notes[layer].append(chosen_TK.to(torch.uint8 if logits_TE.shape[1] <= 256 else torch.int16))

        return note

    @contextmanager
    def recording(self) -> Iterator[list[list[torch.Tensor]]]:
        """Yields the notes: by layer, the choices [tokens of the forward, K] of each forward within, as compact integers."""
        notes: list[list[torch.Tensor]] = [[] for _ in range(self.layers)]
        self._notes = notes
        try:
            yield notes
        finally:
            self._notes = None


def routes_of_pass(notes: list[list[torch.Tensor]]) -> torch.Tensor:
    """[T, L, K] of one forward."""
    assert all(len(layer) == 1 for layer in notes), "one forward was meant"
    return torch.stack([layer[0] for layer in notes], dim=1)


def give_routes(completions: Sequence[Completion], notes: list[list[torch.Tensor]]) -> list[Completion]:
    """Completions of one group with the routes that an engine noted: the prompt of all rows, then a token of each row at a time."""
    if not notes:
        return list(completions)
    layers = [torch.cat([chosen.unflatten(0, (len(completions), -1)) for chosen in layer], dim=1) for layer in notes]
    routes_GTLK = torch.stack(layers, dim=2).cpu().numpy()
    longest = max(len(c.token_ids) for c in completions)
    prompt_tokens = routes_GTLK.shape[1] + 1 - longest  # nobody's last token is forwarded
    return [
        with_routes(c, routes_TLK[: prompt_tokens + len(c.token_ids) - 1]) for c, routes_TLK in zip(completions, routes_GTLK, strict=True)
    ]


def with_routes(completion: Completion, routes_TLK: np.ndarray) -> Completion:
    """The completion with routes of all its positions but the last, which was sampled and not forwarded."""
    valid_T = np.append(np.ones(len(routes_TLK), bool), False)
    padded_TLK = np.concatenate([routes_TLK, np.zeros_like(routes_TLK[:1])])
    return replace(completion, routes=padded_TLK, routes_valid=valid_T)


def moe_layers(config: Mapping[str, Any]) -> list[int]:
    """Which layers of a policy have experts, by its config.json: vLLM's routes are those of all layers, dense ones too."""
    layers = range(config["num_hidden_layers"])
    if config["model_type"] == "deepseek_v3":
        return list(layers[config["first_k_dense_replace"] :])
    dense, every = config.get("mlp_only_layers") or [], config.get("decoder_sparse_step", 1)
    return [layer for layer in layers if layer not in dense and (layer + 1) % every == 0]
