"""Holds the vectors against another implementation: `python tests/fp8/independent.py vllm | torchao`. Exits 1 where they differ.

Others multiply by a rounded reciprocal where we divide. So scales may differ by two units in the last place, and codes by one step
where x / scale lies within as much of the middle between two codes; both are counted and printed.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

VECTORS = Path(__file__).parent / "vectors"
BLOCKS = {"1x128": (1, 128), "128x1": (128, 1), "128x128": (128, 128)}
NEAR = 2.0**-21
Quantise = Callable[[torch.Tensor, str, bool], tuple[torch.Tensor, torch.Tensor] | None]


def by_vllm(x: torch.Tensor, form: str, power_of_two: bool) -> tuple[torch.Tensor, torch.Tensor]:
    from vllm.utils.deep_gemm import per_block_cast_to_fp8

    return per_block_cast_to_fp8(x, list(BLOCKS[form]), power_of_two)


def by_torchao(x: torch.Tensor, form: str, power_of_two: bool) -> tuple[torch.Tensor, torch.Tensor] | None:
    from torchao.prototype.blockwise_fp8_training import kernels

    rows, cols = BLOCKS[form]
    if power_of_two or x.shape[0] % rows or x.shape[1] % cols:
        return None  # it has neither
    quantisers = {
        "1x128": kernels.torch_blockwise_scale_act_quant_lhs,
        "128x1": kernels.torch_blockwise_scale_act_quant_rhs,
        "128x128": kernels.torch_blockwise_scale_weight_quant,
    }
    return quantisers[form](x)


def step_of(codes: torch.Tensor) -> torch.Tensor:
    """Codes as numbers in their order: neighbours differ by one."""
    bits = codes.view(torch.uint8).int()
    return torch.where(bits >= 128, -(bits & 127), bits)


def compare(theirs: Quantise) -> bool:
    agreed = True
    for path in sorted(VECTORS.glob("quantize_*.safetensors")):
        held = load_file(path)
        x = held["input"].float()
        for form, (rows, cols) in BLOCKS.items():
            for power_of_two in (False, True):
                kind = f"{form}{'_power_of_two' if power_of_two else ''}"
                found = theirs(x, form, power_of_two)
                if found is None:
                    continue
                codes, scales = held[f"{kind}/codes"], held[f"{kind}/scales"]
                wide = scales.repeat_interleave(rows, 0)[: x.shape[0]].repeat_interleave(cols, 1)[:, : x.shape[1]]
                # Blocks with NaN or infinity, and those under the smallest amax that the others know (1e-4), are our own affair.
                ours_alone = ~(wide * 448 >= 1.01e-4) | (wide * 448 > 1e37)
                blocks = ~(scales * 448 >= 1.01e-4) | (scales * 448 > 1e37)
                off = ((found[1] - scales).abs() > scales * 2**-22) & ~blocks
                apart = (step_of(found[0]) - step_of(codes)).abs()[~ours_alone]
                ratio = (x / wide).double()[~ours_alone]
                one_step = apart == 1
                middles = (found[0].double()[~ours_alone] + codes.double()[~ours_alone]) / 2
                far = one_step & ((ratio - middles).abs() > NEAR * ratio.abs())
                bad = int(off.sum() + (apart > 1).sum() + far.sum())
                agreed &= bad == 0
                print(
                    f"{path.stem} {kind}: {len(apart)} codes compared, {int(one_step.sum())} at a tie, "
                    f"{int((found[1] != scales)[~blocks].sum())} of {int((~blocks).sum())} scales off by a last bit, {bad} wrong"
                )
    return agreed


if __name__ == "__main__":
    sys.exit(0 if compare({"vllm": by_vllm, "torchao": by_torchao}[sys.argv[1]]) else 1)
