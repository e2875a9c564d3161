"""Codes and scales against values computed by hand, against every code there is, and at the edges."""

import numpy as np
import pytest
import torch

from rl.fp8.quantize import COLUMN, E4M3, SMALLEST_SCALE, SQUARE, TILE, QTensor, quantize


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.uint8)


def test_the_largest_value_of_a_tile_becomes_the_largest_code() -> None:
    q = quantize(torch.tensor([[1.0, -7.0, 3.5, 0.0]]), TILE)
    assert q.scales.tolist() == [[7 / 448]]  # 1/64: exact
    assert q.codes.float().tolist() == [[64.0, -448.0, 224.0, 0.0]]
    assert q.dequantize().tolist() == [[1.0, -7.0, 3.5, 0.0]]


def test_power_of_two_scales_are_rounded_up_and_exact_powers_stay() -> None:
    q = quantize(torch.tensor([[7.0], [7.0001], [13.9], [14.0], [448.0 * 2**-20]]), TILE, power_of_two=True)
    assert q.scales.flatten().tolist() == [2**-6, 2**-5, 2**-5, 2**-5, 2**-20]


def test_every_code_is_reached_and_values_between_go_to_the_nearer_and_ties_to_the_even() -> None:
    """Against a search among all 254 finite codes in float64."""
    codes = np.array([code for code in range(256) if code & 0x7F != 0x7F], dtype=np.uint8)
    values = torch.from_numpy(codes).view(E4M3).double().numpy()
    order = np.argsort(values, kind="stable")
    finite = np.unique(values[order])
    middles = (finite[1:] + finite[:-1]) / 2
    x = np.concatenate([finite, middles, np.nextafter(middles, 1e9), np.nextafter(middles, -1e9)])
    x = torch.from_numpy(x).float()
    got = quantize(torch.cat([x, torch.tensor([448.0])])[None], (1, 4096)).codes.double()[0, :-1].numpy()
    for value, found in zip(x.double().numpy(), got, strict=True):
        distance = np.abs(finite - value)
        nearest = finite[distance == distance.min()]
        if len(nearest) == 2:  # a tie: the even mantissa
            code = torch.from_numpy(nearest).float().to(E4M3).view(torch.uint8) & 1
            nearest = nearest[code.numpy() == 0]
        assert found == nearest[0], value


@pytest.mark.parametrize("block", [TILE, COLUMN, SQUARE])
def test_blocks_at_the_edges_are_those_of_the_padded_tensor(block: tuple[int, int]) -> None:
    x = torch.randn(3, 300, 576)
    padded = torch.zeros(3, 384, 640)
    padded[:, :300, :576] = x
    cut, whole = quantize(x, block), quantize(padded, block)
    assert torch.equal(bits(cut.codes), bits(whole.codes[:, :300, :576]))
    rows, cols = block
    assert torch.equal(cut.scales, whole.scales[:, : -(-300 // rows), : -(-576 // cols)])
    assert cut.scales.shape == (3, -(-300 // rows), -(-576 // cols))


def test_a_block_of_zeros_is_zero_and_its_scale_is_the_smallest() -> None:
    for power_of_two in (False, True):
        q = quantize(torch.zeros(2, 128), TILE, power_of_two=power_of_two)
        assert q.scales.unique().tolist() == [SMALLEST_SCALE] and q.dequantize().abs().max() == 0


def test_a_nan_or_an_infinity_spoils_its_block_and_no_other() -> None:
    for wrong in (float("nan"), float("inf"), float("-inf")):
        x = torch.ones(2, 256)
        x[0, 5] = wrong
        for power_of_two in (False, True):
            back = quantize(x, TILE, power_of_two=power_of_two).dequantize()
            assert back[0, :128].isnan().any() and back[0, :128].isfinite().sum() == 0
            assert torch.equal(back[0, 128:], x[0, 128:]) and torch.equal(back[1], x[1])


def test_codes_of_values_that_come_from_codes_are_the_same_codes() -> None:
    """So a policy that is loaded from codes and saved untouched keeps its codes; scales may move by their last bit."""
    q = quantize(torch.randn(256, 384) * 0.02, SQUARE)
    again = quantize(q.dequantize(), SQUARE)
    assert torch.equal(bits(again.codes), bits(q.codes))
    assert ((again.scales - q.scales).abs() <= q.scales * 2**-23).all()


def test_a_transposed_qtensor_is_the_quantised_transpose() -> None:
    x = torch.randn(2, 200, 300)
    turned, wanted = quantize(x, SQUARE).T, quantize(x.transpose(-1, -2).contiguous(), SQUARE)
    assert torch.equal(bits(turned.codes), bits(wanted.codes)) and torch.equal(turned.scales, wanted.scales)


def test_rows_of_codes_are_codes_of_rows() -> None:
    x, chosen = torch.randn(10, 256), torch.tensor([3, 3, 0, 9])
    got: QTensor = quantize(x, TILE).rows(chosen)
    wanted = quantize(x[chosen], TILE)
    assert torch.equal(bits(got.codes), bits(wanted.codes)) and torch.equal(got.scales, wanted.scales)


def test_cached_activations_can_be_cut_into_columns_only_with_power_of_two_scales() -> None:
    """Otherwise most values change."""
    x = torch.randn(512, 512)
    changed = {}
    for power_of_two in (False, True):
        cached = quantize(x, TILE, power_of_two=power_of_two).dequantize()
        again = quantize(cached, COLUMN, power_of_two=power_of_two).dequantize()
        changed[power_of_two] = (again != cached).float().mean().item()
    assert changed[False] > 0.5 and changed[True] < 1e-4
