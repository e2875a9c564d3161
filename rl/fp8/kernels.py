"""Products and quantisation in Triton: one grouped kernel for Fprop and Dgrad, one for Wgrad, one that quantises.

Experts have any number of rows, known on the device alone. So the host lays out tiles of 128 rows for the worst case, and a table on the
device says which expert and which row each begins at; programs beyond the last tile return at once. A dense product is one expert.

Scales are applied to each 128-wide partial product, outside of the tensor cores, and partial products are added in FP32: Hopper's own
accumulation keeps about 14 bits, and promoting it every 128 elements is what arXiv:2412.19437 (section 3.3.2) does.

The products' logic is checked in Triton's interpreter on codes that torch made (the interpreter's own casts to FP8 are wrong). Nothing
here has run on a GPU yet.

    S  rows, sorted by expert      E  experts      [M | N, K]  as in `rl.fp8.backends`
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from rl.fp8.quantize import BLOCK, COLUMN, E4M3, E4M3_MAX, SMALLEST_SCALE, QTensor

ROWS = 128
"""Rows of a tile."""


@dataclass(frozen=True)
class Tiles:
    """Rows in tiles that never hold rows of two experts."""

    expert: torch.Tensor
    """Of each tile; E beyond the last."""
    row: torch.Tensor
    """First row of each tile."""
    begins: torch.Tensor
    """First tile of each expert, [E + 1]."""
    ends: torch.Tensor
    """Where each expert's rows end, [E]."""

    @classmethod
    def of(cls, ends_E: torch.Tensor, rows: int) -> "Tiles":
        zero = ends_E.new_zeros(1)
        starts = torch.cat([zero, ends_E])
        begins = torch.cat([zero, ((ends_E - starts[:-1] + ROWS - 1) // ROWS).cumsum(0)]).to(torch.int32)
        tiles = torch.arange(rows // ROWS + len(ends_E), device=ends_E.device, dtype=torch.int32)
        expert = torch.searchsorted(begins[1:].contiguous(), tiles, right=True).to(torch.int32)
        inside = expert.clamp(max=len(ends_E) - 1)
        row = starts[inside] + (tiles - begins[inside]) * ROWS
        return cls(expert, row.to(torch.int32), begins, ends_E.to(torch.int32))


class TritonKernels:
    """Implements `rl.fp8.backends.Backend`."""

    name = "triton"

    def quantize(self, x: torch.Tensor, block: tuple[int, int], *, power_of_two: bool = False) -> QTensor:
        if x.ndim == 3:
            parts = [self.quantize(one, block, power_of_two=power_of_two) for one in x]
            codes = torch.stack([part.codes.view(torch.uint8) for part in parts]).view(E4M3)
            return QTensor(codes, torch.stack([part.scales for part in parts]), block)
        height, width = x.shape
        rows, cols = block
        codes = torch.empty(height, width, dtype=E4M3, device=x.device)
        scales = torch.empty(-(-height // rows), -(-width // cols), device=x.device)
        tiles = Tiles.of(torch.tensor([height], device=x.device), height)
        _quantize_tiles(x, codes, scales, tiles, block, power_of_two, padded=False)
        return QTensor(codes, scales, block)

    def product(self, a_MK: QTensor, b_NK: QTensor, dtype: torch.dtype) -> torch.Tensor:
        b = QTensor(b_NK.codes[None], b_NK.scales[None], b_NK.block)
        return self.grouped(a_MK, b, torch.tensor([len(a_MK.codes)], device=a_MK.codes.device), dtype)

    def grouped(self, a_SK: QTensor, b_ENK: QTensor, ends_E: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        assert a_SK.block == (1, BLOCK) and b_ENK.block == (BLOCK, BLOCK), (a_SK.block, b_ENK.block)
        (size, width), columns = a_SK.codes.shape, b_ENK.codes.shape[1]
        out_SN = torch.zeros(size, columns, dtype=dtype, device=a_SK.codes.device)
        tiles = Tiles.of(ends_E, size)
        grid = (len(tiles.expert), -(-columns // BLOCK))
        _grouped_kernel[grid](
            a_SK.codes, a_SK.scales, b_ENK.codes, b_ENK.scales, out_SN, tiles.expert, tiles.row, tiles.ends,
            len(ends_E), columns, width, *a_SK.codes.stride(), *a_SK.scales.stride(), *b_ENK.codes.stride(), *b_ENK.scales.stride(),
            *out_SN.stride(), BM=ROWS, BN=BLOCK, BK=BLOCK, num_warps=8, num_stages=3,
        )  # fmt: skip
        return out_SN

    def wgrad(self, dy_MN: torch.Tensor, x_MK: torch.Tensor) -> torch.Tensor:
        return self.grouped_wgrad(dy_MN, x_MK, torch.tensor([len(dy_MN)], device=dy_MN.device))[0]

    def grouped_wgrad(self, dy_SN: torch.Tensor, x_SK: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
        tiles = Tiles.of(ends_E, len(dy_SN))
        return columns_product(_columns(dy_SN, tiles, False), _columns(x_SK, tiles, True), tiles)


def columns_product(dy: QTensor, x: QTensor, tiles: Tiles) -> torch.Tensor:
    """dW [E, N, K] of codes in 128x1 blocks, [tiles * 128, N] and [tiles * 128, K], each tile one block high."""
    experts, n, k = len(tiles.ends), dy.codes.shape[1], x.codes.shape[1]
    out_ENK = torch.empty(experts, n, k, device=dy.codes.device)
    grid = (experts, -(-n // BLOCK), -(-k // BLOCK))
    _wgrad_kernel[grid](
        dy.codes, dy.scales, x.codes, x.scales, out_ENK, tiles.begins,
        n, k, *dy.codes.stride(), *dy.scales.stride(), *x.codes.stride(), *x.scales.stride(), *out_ENK.stride(),
        BT=ROWS, BN=BLOCK, BK=BLOCK, num_warps=8, num_stages=3,
    )  # fmt: skip
    return out_ENK


def _columns(x_SC: torch.Tensor, tiles: Tiles, power_of_two: bool) -> QTensor:
    """Codes in 128x1 blocks, each expert's rows from a new tile on; rows that fill a tile up are zero."""
    count, width = len(tiles.expert), x_SC.shape[1]
    codes = torch.empty(count * ROWS, width, dtype=E4M3, device=x_SC.device)
    scales = torch.empty(count, width, device=x_SC.device)
    _quantize_tiles(x_SC, codes, scales, tiles, COLUMN, power_of_two, padded=True)
    return QTensor(codes, scales, COLUMN)


def _quantize_tiles(
    x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, tiles: Tiles, block: tuple[int, int], power_of_two: bool, padded: bool
) -> None:
    grid = (len(tiles.expert), -(-x.shape[1] // BLOCK))
    _quantize_kernel[grid](
        x, codes, scales, tiles.expert, tiles.row, tiles.ends, len(tiles.ends), x.shape[1],
        *x.stride(), *codes.stride(), *scales.stride(),
        ROW_BLOCK=block[0], COL_BLOCK=block[1], POWER_OF_TWO=power_of_two, PADDED=padded,
        LARGEST=E4M3_MAX, SMALLEST=SMALLEST_SCALE, BM=ROWS, BN=BLOCK, num_warps=8,
    )  # fmt: skip


@triton.jit
def _quantize_kernel(
    x, codes, scales, tile_expert, tile_row, ends, experts, width,
    x_r, x_c, q_r, q_c, s_r, s_c,
    ROW_BLOCK: tl.constexpr, COL_BLOCK: tl.constexpr, POWER_OF_TWO: tl.constexpr, PADDED: tl.constexpr,
    LARGEST: tl.constexpr, SMALLEST: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """One tile of 128x128 values, whatever the blocks are; blocks of a tile are its rows, its columns, or all of it."""
    tile = tl.program_id(0)
    expert = tl.load(tile_expert + tile)
    if expert >= experts:
        return
    first = tl.load(tile_row + tile)
    rows = first + tl.arange(0, BM)
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    inside = (rows < tl.load(ends + expert))[:, None] & (cols < width)[None, :]
    value = tl.load(x + rows.to(tl.int64)[:, None] * x_r + cols[None, :] * x_c, mask=inside, other=0.0).to(tl.float32)
    # A maximum passes over NaN, so it is looked for apart.
    size = tl.abs(value)
    nan = (value != value).to(tl.int32)
    if ROW_BLOCK == 1:
        amax, bad = tl.max(size, axis=1)[:, None], tl.max(nan, axis=1)[:, None]
    elif COL_BLOCK == 1:
        amax, bad = tl.max(size, axis=0)[None, :], tl.max(nan, axis=0)[None, :]
    else:
        amax = tl.max(tl.max(size, axis=1, keep_dims=True), axis=0, keep_dims=True)
        bad = tl.max(tl.max(nan, axis=1, keep_dims=True), axis=0, keep_dims=True)
    scale = tl.div_rn(tl.maximum(amax, LARGEST * SMALLEST), tl.full(amax.shape, LARGEST, tl.float32))
    if POWER_OF_TWO:
        bits = (scale.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000  # up to the next exponent, if any bit of the mantissa is set
        scale = bits.to(tl.float32, bitcast=True)
    scale = tl.where(bad > 0, float("nan"), scale)
    code = tl.div_rn(value, tl.broadcast_to(scale, value.shape))
    code = tl.where(code > LARGEST, LARGEST, tl.where(code < -LARGEST, -LARGEST, code))  # keeps NaN
    out = tl.arange(0, BM) + tile * BM if PADDED else rows
    there = (cols < width)[None, :] & (out >= 0)[:, None] if PADDED else inside
    tl.store(codes + out.to(tl.int64)[:, None] * q_r + cols[None, :] * q_c, code.to(tl.float8e4nv), mask=there)
    if ROW_BLOCK == 1:
        at = scales + rows[:, None] * s_r + tl.program_id(1) * s_c
        tl.store(at, scale, mask=(rows < tl.load(ends + expert))[:, None])
    elif COL_BLOCK == 1:
        tl.store(scales + tile * s_r + cols[None, :] * s_c, scale, mask=(cols < width)[None, :])
    else:
        zero = tl.zeros((1, 1), tl.int32)
        tl.store(scales + tile * s_r + tl.program_id(1) * s_c + zero, scale)


@triton.jit
def _grouped_kernel(
    a, sa, b, sb, out, tile_expert, tile_row, ends, experts, n, k,
    a_m, a_k, sa_m, sa_k, b_e, b_n, b_k, sb_e, sb_n, sb_k, o_m, o_n,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """A tile of 128 rows of one expert and 128 columns."""
    tile, column = tl.program_id(0), tl.program_id(1)
    expert = tl.load(tile_expert + tile)
    if expert >= experts:
        return
    rows = (tl.load(tile_row + tile) + tl.arange(0, BM)).to(tl.int64)
    row_in = rows < tl.load(ends + expert)
    cols = column * BN + tl.arange(0, BN)
    col_in = cols < n
    inner = tl.arange(0, BK)
    b_expert = b + expert.to(tl.int64) * b_e
    sb_expert = sb + expert.to(tl.int64) * sb_e + column * sb_n
    total = tl.zeros((BM, BN), tl.float32)
    for step in range(tl.cdiv(k, BK)):
        at = step * BK + inner
        k_in = at < k
        left = tl.load(a + rows[:, None] * a_m + at[None, :] * a_k, mask=row_in[:, None] & k_in[None, :], other=0.0)
        right = tl.load(b_expert + at[:, None] * b_k + cols[None, :] * b_n, mask=k_in[:, None] & col_in[None, :], other=0.0)
        left_scale = tl.load(sa + rows * sa_m + step * sa_k, mask=row_in, other=0.0)
        right_scale = tl.load(sb_expert + step * sb_k)
        total += tl.dot(left, right) * (left_scale * right_scale)[:, None]
    tl.store(out + rows[:, None] * o_m + cols[None, :] * o_n, total.to(out.dtype.element_ty), mask=row_in[:, None] & col_in[None, :])


@triton.jit
def _wgrad_kernel(
    dy, sdy, x, sx, out, begins, n, k,
    d_t, d_n, sd_t, sd_n, x_t, x_k, sx_t, sx_k, o_e, o_n, o_k,
    BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """128x128 of one expert's gradient, over its tiles of tokens."""
    expert = tl.program_id(0)
    rows, cols = tl.program_id(1) * BN + tl.arange(0, BN), tl.program_id(2) * BK + tl.arange(0, BK)
    row_in, col_in = rows < n, cols < k
    inner = tl.arange(0, BT)
    total = tl.zeros((BN, BK), tl.float32)
    for tile in range(tl.load(begins + expert), tl.load(begins + expert + 1)):
        at = (tile * BT + inner).to(tl.int64)
        left = tl.load(dy + at[None, :] * d_t + rows[:, None] * d_n, mask=row_in[:, None], other=0.0)
        right = tl.load(x + at[:, None] * x_t + cols[None, :] * x_k, mask=col_in[None, :], other=0.0)
        left_scale = tl.load(sdy + tile * sd_t + rows * sd_n, mask=row_in, other=0.0)
        right_scale = tl.load(sx + tile * sx_t + cols * sx_k, mask=col_in, other=0.0)
        total += tl.dot(left, right) * left_scale[:, None] * right_scale[None, :]
    at_out = out + expert.to(tl.int64) * o_e + rows[:, None] * o_n + cols[None, :] * o_k
    tl.store(at_out, total, mask=row_in[:, None] & col_in[None, :])
