"""AdamW with FP32 masters whatever the parameters are in, and moments in FP32 or BF16.

DeepSeek-V3 (arXiv:2412.19437, section 3.3.3) keeps masters and gradients in FP32 and both moments in BF16. A parameter that is FP32
already is its own master. Gradients of lower-precision parameters are added up in FP32 over the passes of a step, each as soon as
autograd has it, so a step of many small passes loses nothing.

With BF16 masters there is no second copy of a BF16 parameter. Rounded to nearest, an update of less than 2^-9 of a weight would be lost
every time; so it is rounded up or down at random, up with the probability that keeps the mean.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence

import torch
from torch.distributed.tensor import DTensor

from rl.config import OptimizerConfig


class AdamW:
    """Decoupled weight decay (arXiv:1711.05101) on tensors of two or more dimensions."""

    def __init__(self, parameters: Iterable[tuple[str, torch.nn.Parameter]], config: OptimizerConfig, apart: Collection[str] = ()):
        """apart: parameters, by name, whose gradients are clipped on their own and enter no one else's norm."""
        self.apart = frozenset(apart)
        self.parameters = [(name, p) for name, p in parameters if p.requires_grad]
        self.config = config
        self.steps = 0
        moments = torch.float32 if config.moments == "fp32" else torch.bfloat16
        self.state: dict[str, dict[str, torch.Tensor]] = {}
        self._grads: dict[str, torch.Tensor] = {}
        for name, p in self.parameters:
            kind = torch.promote_types(p.dtype, torch.float32)  # a float64 parameter (tests) keeps float64
            moment = moments if kind is torch.float32 else kind
            self.state[name] = {
                "exp_avg": torch.zeros_like(p, dtype=moment),
                "exp_avg_sq": torch.zeros_like(p, dtype=moment),
            }
            if p.dtype != kind:
                if config.masters == "fp32":
                    self.state[name]["master"] = p.detach().to(kind)
                p.register_post_accumulate_grad_hook(lambda q, name=name, kind=kind: self._collect(name, q, kind))

    def _collect(self, name: str, parameter: torch.nn.Parameter, kind: torch.dtype) -> None:
        assert parameter.grad is not None
        if name in self._grads:
            self._grads[name] += parameter.grad
        else:
            self._grads[name] = parameter.grad.to(kind)
        parameter.grad = None

    def grads(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every parameter's gradient of this step, FP32 or wider; zeros where nothing reached it."""
        for name, p in self.parameters:
            grad = self._grads.get(name, p.grad)
            if grad is None:
                kind = torch.promote_types(p.dtype, torch.float32)
                grad = self._grads[name] = torch.zeros_like(p, dtype=kind)
            yield name, grad

    @torch.no_grad()
    def clip(self, max_norm: float) -> float:
        """Scales all gradients to an L2 norm of at most `max_norm`; returns the norm before (sharded: of all shards).

        Those of `apart` are scaled by a norm of their own, which is not in what is returned.
        """
        if self.apart:
            _clip([grad for name, grad in self.grads() if name in self.apart], max_norm)
        return _clip([grad for name, grad in self.grads() if name not in self.apart], max_norm)

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One update, then the gradients are dropped."""
        self.steps += 1
        beta1, beta2 = self.config.betas
        correction1, correction2 = 1 - beta1**self.steps, 1 - beta2**self.steps
        for number, ((name, grad), (_, p)) in enumerate(zip(self.grads(), self.parameters, strict=True)):
            state = self.state[name]
            master = state.get("master", p if p.dtype == grad.dtype else p.to(grad.dtype))
            exp_avg = state["exp_avg"].to(grad.dtype).lerp_(grad, 1 - beta1)
            exp_avg_sq = state["exp_avg_sq"].to(grad.dtype).mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
            if p.ndim >= 2 and self.config.weight_decay:
                master.mul_(1 - lr * self.config.weight_decay)
            master.addcdiv_(exp_avg, (exp_avg_sq / correction2).sqrt_().add_(self.config.eps), value=-lr / correction1)
            state["exp_avg"].copy_(exp_avg)
            state["exp_avg_sq"].copy_(exp_avg_sq)
            if "master" in state:
                p.copy_(master)
            elif master is not p:
                # Steps and numbers of parameters are the same on every rank and after a resume, and so is the noise.
                noise = torch.Generator(p.device).manual_seed(self.steps << 24 | number)
                p.copy_(round_to_bf16(master, noise))
        self.zero_grad()

    def move_state(self, device: torch.device | str) -> None:
        """Copies moments and masters to a device, bit for bit, and lets go of them where they were; `step` wants them at the parameters."""
        for tensors in self.state.values():
            for what, tensor in tensors.items():
                tensors[what] = tensor.to(device, copy=True)

    def zero_grad(self) -> None:
        self._grads.clear()
        for _, p in self.parameters:
            p.grad = None

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Flat, by tensor: `<parameter>/<what>`; the tensors themselves, so that a checkpoint is read in place."""
        flat = {f"{name}/{what}": tensor for name, tensors in self.state.items() for what, tensor in tensors.items()}
        return flat


def round_to_bf16(x: torch.Tensor, noise: torch.Generator) -> torch.Tensor:
    """FP32 `x` rounded to one of its two BF16 neighbours, each with the probability that keeps the mean."""
    bits = x.view(torch.int32)
    noise_bits = torch.randint(0, 1 << 16, x.shape, generator=noise, device=x.device, dtype=torch.int32)
    rounded = ((bits + noise_bits) & -(1 << 16)).view(torch.float32)  # a carry goes into the next exponent, as it should
    return torch.where(x.isfinite(), rounded, x).to(torch.bfloat16)


def _clip(grads: Sequence[torch.Tensor], max_norm: float) -> float:
    norm = torch.stack([_whole(grad.square().sum()) for grad in grads]).sum().sqrt()
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for grad in grads:
        grad.mul_(scale.to(grad.dtype))
    return norm.item()


def _whole(x: torch.Tensor) -> torch.Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def learning_rate(step: int, lr: float, schedule: str, warmup_steps: int, schedule_steps: int) -> float:
    """Rate of a step (from 0): linear from lr/warmup to lr, then constant, or linear or cosine to 0 at `schedule_steps`."""
    warm = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
    if schedule == "constant":
        return lr * warm
    left = max(0.0, 1.0 - step / schedule_steps)
    if schedule == "linear":
        return lr * warm * left
    return lr * warm * 0.5 * (1.0 - torch.cos(torch.tensor(left * torch.pi, dtype=torch.float64)).item())
