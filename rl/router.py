"""What the routers of a mixture of experts do: how many tokens each expert gets.

Load is counted once a step, where a token first passes the policy: the pass for old log-probs if there is one, else the training
pass. A shared prompt's tokens count once for each completion that stands on them. Groups that are not forwarded do not count.

    T  tokens      K  experts a token      L  MoE layers      E  experts
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from rl.ranks import Ranks


def gates(model: nn.Module) -> list[nn.Module]:
    """The routers of a model, one a MoE layer, in order: the `gate` that stands beside `experts`. A dense model has none."""
    blocks = [dict(module.named_children()) for module in model.modules()]
    return [block["gate"] for block in blocks if "gate" in block and "experts" in block]


class RouterLoad:
    """Counts the tokens that each expert gets; `collect` gives the step's numbers and starts anew."""

    def __init__(self, model: nn.Module, ranks: Ranks):
        self.ranks = ranks
        self.loads: dict[int, torch.Tensor] = {}
        """By layer: float64 [E], tokens by expert since the last `collect`, on this rank."""
        self._count_T: torch.Tensor | None = None
        for layer, gate in enumerate(gates(model)):
            gate.register_forward_hook(self._counter(layer))

    @contextmanager
    def counting(self, count_T: torch.Tensor) -> Iterator[None]:
        """Forwards within are counted, each of the T tokens as often as `count_T` says; recomputation in a backward is outside."""
        self._count_T = count_T.double()
        try:
            yield
        finally:
            self._count_T = None

    def _counter(self, layer: int) -> Callable[[nn.Module, Any, tuple[torch.Tensor, ...]], None]:
        def count(gate: nn.Module, inputs: Any, output: tuple[torch.Tensor, ...]) -> None:
            if self._count_T is not None:
                logits_TE, _, chosen_TK = output  # as all of transformers' routers give them
                times_TK = self._count_T.repeat_interleave(chosen_TK.shape[-1])
                load_E = torch.bincount(chosen_TK.flatten(), times_TK, minlength=logits_TE.shape[-1])
                self.loads[layer] = self.loads[layer] + load_E if layer in self.loads else load_E

        return count

    def collect(self) -> dict[str, float]:
        """Numbers of the step, equal on all ranks; collective. None if no token passed a router."""
        if not self.loads:  # on all ranks alike: they run the same passes
            return {}
        load_LE = self.ranks.sum(torch.stack([self.loads[layer] for layer in sorted(self.loads)]))
        self.loads = {}
        return load_numbers(load_LE) if load_LE.any() else {}


def load_numbers(load_LE: torch.Tensor) -> dict[str, float]:
    """How far from balance: float [L, E] tokens by expert.

    `moe/max_violation` is max load / mean load - 1 (arXiv:2408.15664, section 4.1) of the layer where it is largest: 0 to E/K - 1.
    `moe/load_entropy` is relative to that of an even load, mean over layers; `moe/dead_experts` is the share without a token.
    """
    experts = load_LE.shape[1]
    share_LE = load_LE / load_LE.sum(dim=1, keepdim=True)
    entropy_L = -torch.special.xlogy(share_LE, share_LE).sum(dim=1)
    return {
        "moe/max_violation": float(share_LE.max()) * experts - 1,
        "moe/load_entropy": float(entropy_L.mean()) / math.log(experts),
        "moe/dead_experts": float((load_LE == 0).double().mean()),
    }
