"""The one-pass kernel of the CPU, bit by bit: storage formats, random bits, hostile numbers."""

import itertools

import pytest
import torch
from one_pass_cpu import (
    BF16,
    F16,
    F32,
    INT8,
    bits_of,
    blocks_of,
    decoded,
    encoded,
    row_of,
    step,
    to_bf16,
)

from nomadam.numerics.rounding import Draw
from nomadam.optimizers.sgd_sai_cpu import cpu_kernel

pytestmark = pytest.mark.skipif(cpu_kernel(warn=False) is None, reason="needs a C++ compiler")

EXACT = {"lr": 1.0, "momentum": 0.0, "weight_decay": 0.0}


def stored(grad, param, draw=None):
    """What a parameter of 0 becomes by a step of minus these gradients: the gradients, rounded."""
    row = {"param": torch.zeros(len(grad), dtype=param), "grad": -grad, "gain": 1.0, "draw": draw}
    row |= dict.fromkeys(["momentum_buffer", "momentum_scale", "compensation"])
    return step(row | {"stochastic": True}, **EXACT)["param"]


def hostile_floats():
    """Float32 of every exponent, ties between stored values, subnormals, infinities and NaN."""
    words = torch.randint(-(2**31), 2**31, (200_000,)).to(torch.int32)
    ties = (words & -65536) | 0x8000
    half_ties = (words & -8192) | 0x1000
    words = torch.cat([words, ties, half_ties, words & -65536]).view(F32)
    in_reach_of_float16 = torch.randn(200_000) * 2.0 ** torch.randint(-27, 18, (200_000,))
    return torch.cat([words, in_reach_of_float16])


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_every_stored_value_is_read_exactly(dtype):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    torch.testing.assert_close(stored(every, F32), every.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_rounding_to_nearest_is_that_of_torch(dtype):
    values = hostile_floats()
    torch.testing.assert_close(
        stored(values, dtype), values.to(dtype), rtol=0, atol=0, equal_nan=True
    )


@pytest.mark.parametrize("first", [0, 1, 12345, 2**32 - 1000, 2**32 + 7, 2**45 + 3])
def test_random_bits_are_those_of_the_contract(first):
    values = hostile_floats()
    draw = Draw(2**63 + 12345, 2**32 - 2, 2**20 + 1, first)
    bits = bits_of(draw, len(values))
    torch.testing.assert_close(
        stored(values, BF16, draw), to_bf16(values, bits >> 16), rtol=0, atol=0, equal_nan=True
    )


def test_momentum_takes_the_other_half_of_the_bits():
    grad = torch.randn(5000)
    row = row_of(5000, F32, F32, BF16) | {"grad": grad}
    row["momentum_buffer"].zero_()
    got = step(row, momentum=0.5)
    half = bits_of(row["draw"], 5000) & 0xFFFF
    assert got["momentum_buffer"].equal(to_bf16(grad * 0.5, half))


def test_codes_are_those_of_the_square_law():
    grad = torch.randn(128 * 100 + 17) * torch.randn(128 * 100 + 17).exp()
    row = row_of(len(grad), momentum=INT8) | {"grad": grad}
    row["momentum_buffer"].zero_()
    got = step(row, momentum=0.5)
    codes, scales = encoded(grad.double() * 0.5, bits_of(row["draw"], len(grad)) & 0xFFFF)
    assert got["momentum_scale"].equal(scales)
    assert (got["momentum_buffer"] != codes).sum() <= 3  # of 12,817: where float32 rounds y
    peaks = [block.abs().max() for block in blocks_of(got["momentum_buffer"])]
    assert set(map(int, peaks)) == {127}


def test_draws_are_unbiased():
    row = row_of(128 * 1000, BF16, F32, INT8)
    row["param"].zero_()
    row["grad"].fill_(0.3)
    row["grad"][::128] = 1.0
    row["momentum_buffer"].zero_()
    got = step(row, lr=1.0, weight_decay=0.0, momentum=0.5)
    inside = torch.arange(128 * 1000) % 128 != 0
    mean = decoded(got["momentum_buffer"], got["momentum_scale"])[inside].mean()
    assert abs(mean - 0.15) < 5e-5
    assert abs(got["param"].double()[inside].mean() / -20 - 0.15) < 5e-5


def test_where_gradients_are_zero_the_codes_beside_others_go_to_zero():
    row = row_of(512, momentum=INT8)
    row["grad"].copy_(torch.arange(512) % 128 == 0)
    for i in range(400):
        row = step(row | {"draw": Draw(0, i, 0)})
    assert row["momentum_buffer"].equal(row["grad"].to(INT8) * 127)


# ----------------------------------------------------------------------------- hostile numbers


@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan")])
def test_a_block_with_a_bad_gradient_has_no_codes_and_harms_no_other(bad):
    row = row_of(512, BF16, F32, INT8)
    row["grad"][200] = bad
    good = step(row | {"grad": row["grad"].nan_to_num(0.0, 0.0, 0.0)})
    got = step(row)
    assert not got["momentum_scale"][1].isfinite() and not got["momentum_buffer"][128:256].any()
    assert not got["param"][200].isfinite()
    others = torch.arange(512) // 128 != 1
    assert got["momentum_buffer"][others].equal(good["momentum_buffer"][others])
    assert step(got)["param"][128:256].isnan().all()


def test_bad_numbers_stay_bad_in_every_format():
    for param, momentum in itertools.product([F32, BF16, F16], [F32, BF16, F16]):
        row = row_of(300, param, F32, momentum)
        row["grad"][:3] = torch.tensor([float("inf"), -float("inf"), float("nan")])
        got = step(row)
        assert got["param"][:3].isfinite().sum() == 0 and got["param"][3:].isfinite().all()
        assert got["momentum_buffer"][2].isnan() and got["momentum_buffer"][0].isinf()


def test_smallest_blocks_count_as_zero():
    row = row_of(256, momentum=INT8)
    row["grad"][:128] = 2.0**-102
    row["grad"][128:] = 2.0**-98
    row["momentum_buffer"].zero_()
    got = step(row, momentum=0.5)
    assert got["momentum_scale"].tolist() == [0.0, 2.0**-99]
    assert got["momentum_buffer"].tolist() == [0] * 128 + [127] * 128
