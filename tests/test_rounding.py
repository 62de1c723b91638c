"""The random bits, and stochastic rounding: who draws is of no account, and nothing is biased."""

import numpy as np
import pytest
import torch

from nomadam.numerics.rounding import (
    Draw,
    high_half,
    key,
    low_half,
    random_bits,
    round_stochastically,
)


def mixed(h):
    h ^= h >> 16
    h = h * 0x85EBCA6B % 2**32
    h ^= h >> 13
    h = h * 0xC2B2AE35 % 2**32
    return h ^ h >> 16


def slow_bits(draw, index):
    """The definition, for one element, in Python's integers."""
    words = [draw.seed % 2**32, draw.seed >> 32, draw.block, draw.step]
    keys = []
    for h in (0, 1):
        for word in words:
            h = mixed(((h ^ word) + 0x9E3779B9) % 2**32)
        keys.append(h)
    index += draw.first
    x = (index + keys[0]) % 2**32
    x ^= x >> 16
    x = x * 0x85EBCA6B % 2**32
    x ^= (keys[1] + (index >> 32) * 0x9E3779B9) % 2**32
    x ^= x >> 13
    x = x * 0xC2B2AE35 % 2**32
    return x ^ x >> 16


DRAWS = [
    Draw(0, 0, 0),
    Draw(1, 2, 3),
    Draw(2**64 - 1, 10**6, 9999),
    Draw(7, 1, 0, first=2**31 - 3),
    Draw(7, 1, 0, first=2**32 - 3),
    Draw(7, 1, 0, first=3 * 2**32 + 5),
]


@pytest.mark.parametrize("draw", DRAWS, ids=str)
def test_bits_are_those_of_the_definition(draw):
    bits = random_bits(draw, (7,), "cpu")
    assert bits.dtype == torch.int32
    assert [b % 2**32 for b in bits.tolist()] == [slow_bits(draw, i) for i in range(7)]
    as_tensor = draw._replace(step=torch.tensor(draw.step))
    assert torch.equal(random_bits(as_tensor, (7,), "cpu"), bits)
    assert tuple(map(int, key(as_tensor))) == key(draw)


def test_the_halves_are_the_bits():
    bits = random_bits(Draw(3, 1, 4), (1000,), "cpu")
    whole = high_half(bits).long() * 65536 + low_half(bits).long()
    assert torch.equal(whole, bits.long() % 2**32)


def test_any_cut_draws_the_bits_of_the_whole():
    whole = random_bits(Draw(5, 9, 2), (40, 25), "cpu")
    for start, stop in ((0, 1), (3, 17), (39, 40)):
        piece = random_bits(Draw(5, 9, 2, first=25 * start), (stop - start, 25), "cpu")
        assert torch.equal(piece, whole[start:stop])


def correlation(a, b):
    return float(np.corrcoef(a.double().numpy(), b.double().numpy())[0, 1])


def test_bits_look_random_along_elements_steps_and_blocks():
    """All of these are standard normal but for a factor 1/sqrt(n): below 5 sigma."""
    n = 200_000
    base = Draw(0, 10, 5)
    for half in (high_half, low_half):
        values = half(random_bits(base, (n,), "cpu"))
        counts = torch.bincount((values // 256).long(), minlength=256).double()
        chi_square = ((counts - n / 256) ** 2 / (n / 256)).sum().item()
        assert abs(chi_square - 255) < 5 * (2 * 255) ** 0.5
        for lag in (1, 2, 64, 128, 768, 4096):
            assert abs(correlation(values[lag:], values[:-lag])) < 5 / n**0.5
        others = [Draw(0, 11, 5), Draw(0, 10, 6), Draw(1, 10, 5), Draw(2**32, 10, 5)]
        for other in others:
            again = half(random_bits(other, (n,), "cpu"))
            assert abs(correlation(values, again)) < 5 / n**0.5
    bits = random_bits(base, (n,), "cpu")
    assert abs(correlation(high_half(bits), low_half(bits))) < 5 / n**0.5


def test_one_element_draws_evenly_over_steps():
    steps = range(20_000)
    values = np.array([slow_bits(Draw(0, step, 1), 12) >> 16 for step in steps]) / 65536
    assert abs(values.mean() - 0.5) < 5 * (1 / 12 / len(steps)) ** 0.5
    assert abs(np.corrcoef(values[1:], values[:-1])[0, 1]) < 5 / len(steps) ** 0.5


VALUES = [1.0 + 2**-9, 1.0 + 2**-12, -3.3, 1e-20, -1e-39, 7.77e37, 0.1, 255.5 / 256]


@pytest.mark.parametrize("value", VALUES)
def test_rounding_is_unbiased_over_100_000_draws(value):
    n = 100_000
    half = high_half(random_bits(Draw(0, 3, 1), (n,), "cpu"))
    x = torch.full((n,), value)
    rounded = round_stochastically(x, half).double()
    exact = float(x[0])
    low, high = sorted({*rounded.tolist()}) if len(set(rounded.tolist())) == 2 else (exact, exact)
    assert low <= exact <= high and high - low <= 2**-7 * abs(exact) + 1e-40
    assert abs(rounded.mean().item() - exact) <= 5 * (high - low) / 2 / n**0.5


def test_every_fraction_has_its_probability():
    half = torch.arange(65536)
    for fraction in (0, 1, 2, 100, 32768, 65535):
        x = torch.tensor([0x3F800000 + fraction], dtype=torch.int32).view(torch.float32)
        up = round_stochastically(x.expand(65536), half) > 1.0
        assert up.sum() == fraction


def test_what_bfloat16_holds_stays_and_the_rest_of_the_specials():
    half = high_half(random_bits(Draw(0, 0, 0), (65536,), "cpu"))
    every = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    out = round_stochastically(every.float(), half)
    assert torch.equal(out.isnan(), every.isnan())
    assert torch.equal(out[~out.isnan()], every[~every.isnan()])
    assert torch.equal(out.signbit()[~out.isnan()], every.signbit()[~every.isnan()])
    payload = torch.tensor([0x7F800001], dtype=torch.int32).view(torch.float32)  # a NaN
    assert round_stochastically(payload, torch.tensor([0])).isnan().all()
