"""Who computes the products: named in the recipe (`policy.fp8.backend`), and never another than the one named."""

from typing import Protocol

import torch

from rl.fp8.quantize import QTensor
from rl.fp8.reference import Reference


class Backend(Protocol):
    """All products give what `rl.fp8.reference` gives, up to FP32 rounding."""

    name: str

    def quantize(self, x: torch.Tensor, block: tuple[int, int], *, power_of_two: bool = False) -> QTensor:
        """As `rl.fp8.quantize.quantize`, bit for bit."""

    def product(self, a_MK: QTensor, b_NK: QTensor, dtype: torch.dtype) -> torch.Tensor:
        """a b^T. `a` in 1x128 tiles; `b` in 128x128 blocks or 1x128 tiles."""

    def wgrad(self, dy_MN: torch.Tensor, x_MK: torch.Tensor) -> torch.Tensor:
        """dy^T x [N, K] in FP32, both quantised in 128x1 tiles, x with power-of-two scales."""

    def grouped(self, a_SK: QTensor, b_ENK: QTensor, ends_E: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """`product` of each expert's rows of `a` with its own matrix; `ends_E` is where its rows end."""

    def grouped_wgrad(self, dy_SN: torch.Tensor, x_SK: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
        """`wgrad` of each expert's rows [E, N, K]; zeros for an expert without rows."""


def backend_named(name: str, device: torch.device) -> Backend:
    """The backend for tensors on `device`. ValueError that names what is missing where it cannot run."""
    if name == "reference":
        return Reference()
    if device.type != "cuda":
        raise ValueError(f"policy.fp8.backend: '{name}' needs a CUDA GPU, and this machine computes on {device.type}; use 'reference'")
    if name == "torch":
        from rl.fp8.scaled_mm import ScaledMM, missing

        lack = missing(device)
        if lack is not None:
            raise ValueError(f"policy.fp8.backend: 'torch' needs {lack}; use 'reference' or 'triton'")
        return ScaledMM()
    assert name == "triton", name
    try:
        from rl.fp8.kernels import TritonKernels
    except ImportError as error:
        raise ValueError(f"policy.fp8.backend: 'triton' needs the package triton ({error}); install it, or use 'reference'") from None
    if torch.cuda.get_device_capability(device) < (8, 9):
        have = ".".join(map(str, torch.cuda.get_device_capability(device)))
        raise ValueError(f"policy.fp8.backend: 'triton' needs FP8 tensor cores (capability 8.9), this GPU has {have}; use 'reference'")
    return TritonKernels()
