"""Masters that ranks share, and what crosses between ranks in their place: codes.

A master [N, K] is cut by rows and one of experts [E, N, K] by whole expert; each rank quantises its own part, once per change. Where the
cut goes through a row of blocks, two ranks hold a part of a block, and its scale is set by the larger of their values. So the ranks tell
each other the largest value of each block, 4 bytes for 16,384 weights, and each has all scales. Codes therefore do not depend on the
number of ranks, and what is gathered for a product, a weight update or a checkpoint is a byte a weight: no rank has a whole FP32
master. Gradients of masters are summed over ranks in FP32, and each rank keeps its part.
"""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor

from rl.fp8.quantize import BLOCK, E4M3, SQUARE, QTensor, blocks_of, encode, scale_of


def spread(master: torch.Tensor, mesh: DeviceMesh) -> torch.nn.Parameter:
    """This rank's part of a master that every rank has read."""
    return torch.nn.Parameter(distribute_tensor(master.detach(), mesh, [Shard(0)], src_data_rank=None))


def quantize_part(master: DTensor) -> QTensor:
    """Codes of this rank's part in 128x128 blocks of the whole, and the scales of the whole. Collective."""
    with torch.no_grad():
        local, mesh = master.to_local(), master.device_mesh
        begin = min(mesh.get_local_rank() * -(-master.shape[0] // mesh.size()), master.shape[0])  # as DTensor cuts
        above = 0
        if master.ndim == 2:
            begin, above = divmod(begin, BLOCK)  # rows that this rank's first block has on the rank before
        blocks = blocks_of(torch.nn.functional.pad(local, (0, 0, above, 0)), SQUARE)
        own = slice(begin, begin + len(blocks))
        largest = torch.zeros(scales_shape(master.shape), device=local.device)
        largest[own] = blocks.abs().amax((-3, -1))
        # As integers, which have the order of floats that are not negative, with NaN above infinity.
        dist.all_reduce(largest.view(torch.int32), dist.ReduceOp.MAX, group=mesh.get_group())
        scales = scale_of(largest, power_of_two=False)
        codes = encode(blocks, scales[own])[..., above : above + local.shape[-2], : local.shape[-1]]
        return QTensor(codes.contiguous().view(E4M3), scales, SQUARE)


def part_of(whole: QTensor, master: DTensor) -> QTensor:
    """This rank's part of codes that came with a checkpoint."""
    codes = distribute_tensor(whole.codes.view(torch.uint8), master.device_mesh, master.placements, src_data_rank=None).to_local()
    return QTensor(codes.view(E4M3), whole.scales.to(codes.device), SQUARE)


def gathered(part: QTensor, master: DTensor) -> QTensor:
    """The codes of all ranks. Collective."""
    codes = part.codes.view(torch.uint8)
    shared = DTensor.from_local(codes, master.device_mesh, master.placements, run_check=False, shape=master.shape, stride=master.stride())
    return QTensor(shared.full_tensor().view(E4M3), part.scales, SQUARE)


def gradient_of(master: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """What autograd is given for a master; of one that ranks share, this rank's part of the sum. Collective then."""
    grad = grad.to(master.dtype)
    if not isinstance(master, DTensor):
        return grad
    return DTensor.from_local(grad, master.device_mesh, [Partial()], run_check=False).redistribute(placements=master.placements)


def scales_shape(shape: torch.Size) -> tuple[int, ...]:
    return (*shape[:-2], -(-shape[-2] // BLOCK), -(-shape[-1] // BLOCK))
