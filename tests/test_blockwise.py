"""8-bit storage against its definition, one element at a time, and its laws."""

import math

import pytest
import torch

from nomadam.numerics.blockwise import BLOCK, cut, dequantize, num_scales, quantize
from nomadam.numerics.rounding import Draw, low_half, random_bits


def halves(n, step=0):
    return low_half(random_bits(Draw(0, step, 0), (n,), "cpu"))


def slow_code(x, scale, half):
    if not 0 < scale < math.inf:
        return 0
    y = min(abs(x) * 127**2 / scale, 127.0**2)
    k = math.isqrt(int(y))
    up = y - k * k > (2 * k + 1) * (0.5 if half is None else (half + 0.5) / 65536)
    return int(math.copysign(min(k + up, 127), x))


@pytest.mark.parametrize("numel", [0, 1, 127, 128, 129, 1000])
@pytest.mark.parametrize("random", [False, True])
def test_codes_are_those_of_the_definition(numel, random):
    torch.manual_seed(numel)
    x = torch.randn(numel) ** 3
    half = halves(numel) if random else None
    codes, scales = quantize(x, half)
    assert codes.dtype == torch.int8 and scales.dtype == torch.float32
    assert len(scales) == num_scales(numel) == math.ceil(numel / 128)
    for i, value in enumerate(x.tolist()):
        scale = x[i // 128 * 128 : (i // 128 + 1) * 128].abs().max().item()
        assert scales[i // 128] == scale
        drawn = None if half is None else int(half[i])
        near = {slow_code(value * (1 + s * 2e-6), scale, drawn) for s in (-1, 0, 1)}
        assert codes[i].item() in near


def test_the_error_is_at_most_a_step_of_the_square_law():
    torch.manual_seed(0)
    x = torch.randn(64, BLOCK)
    for half, share in ((None, 0.5), (halves(x.numel()).view_as(x), 1.0)):
        back = dequantize(*quantize(x, half))
        scale = x.abs().amax(1, keepdim=True)
        gap = (2 * (x.abs() / scale).sqrt() * 127 + 2) / 127**2 * scale
        assert ((back - x).abs() <= share * gap).all()


def test_zero_and_the_largest_of_a_block_are_exact():
    x = torch.zeros(3, 128)
    x[1, 7], x[2, 3] = -2.5, 1e-35  # so small a block counts as zero
    back = dequantize(*quantize(x, halves(x.numel()).view_as(x)))
    assert back[1, 7] == -2.5 and (back[0] == 0).all() and (back[2] == 0).all()
    assert (back != 0).sum() == 1


def test_values_that_are_held_stay_whatever_is_drawn():
    codes = torch.arange(-127, 128, dtype=torch.int8).repeat(4)[: 7 * 128].clone()
    codes[::128] = 127
    scales = torch.rand(7) + 0.5
    x = dequantize(codes, scales)
    again, same = quantize(x, torch.full((len(x),), 32768))
    torch.testing.assert_close(same, scales)
    assert torch.equal(again, codes)


def test_choice_is_unbiased():
    torch.manual_seed(1)
    x = torch.randn(128)
    steps = 4000
    total = sum(dequantize(*quantize(x, halves(128, step))).double() for step in range(steps))
    scale = x.abs().max()
    gap = (2 * (x.abs() / scale).sqrt() * 127 + 1) / 127**2 * scale
    assert ((total / steps - x).abs() <= 5 * gap / 2 / steps**0.5).all()


def test_a_block_that_is_not_finite_decodes_to_nan_and_spares_the_others():
    x = torch.ones(3, 128)
    x[0, 5], x[1, 6] = math.inf, math.nan
    codes, scales = quantize(x)
    assert (codes[:2] == 0).all()
    back = dequantize(codes, scales)
    assert back[:2].isnan().all() and (back[2] == 1).all()


def test_any_strides_are_read_in_row_major_order():
    x = torch.randn(48, 40).t()
    codes, scales = quantize(x)
    expected = quantize(x.contiguous())
    assert torch.equal(codes, expected[0]) and torch.equal(scales, expected[1])
    assert codes.is_contiguous() and codes.shape == x.shape


def test_a_cut_is_a_view_and_equals_the_whole():
    x = torch.randn(1000)
    codes, scales = quantize(x)
    back = dequantize(codes, scales)
    for start, stop in ((0, 1000), (128, 512), (896, 1000), (256, 256)):
        part = cut(codes, scales, start, stop)
        assert torch.equal(dequantize(*part), back[start:stop])
    part[0].fill_(0)
    cut(codes, scales, 0, 128)[0].zero_()
    assert (codes[:128] == 0).all()


@pytest.mark.parametrize("bounds", [(0, 100), (1, 128), (0, 1001), (-128, 0), (256, 128)])
def test_a_cut_within_a_block_is_refused(bounds):
    codes, scales = quantize(torch.randn(1000))
    with pytest.raises(ValueError, match="multiples of 128 from 0 to 1000, got"):
        cut(codes, scales, *bounds)
