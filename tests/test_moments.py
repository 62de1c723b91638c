"""Moments of many tensors: against float64, in slices, at every scale."""

import math

import pytest
import torch
from reference.sgd_sai import gain as reference_gain

from nomadam.numerics.moments import gsnr, moments, to_host
from nomadam.numerics.slices import batches, slices


@pytest.mark.parametrize("limit", [1, 7, 64, 10**6])
def test_slices_do_not_change_the_moments(limit):
    x = torch.randn(23, 5, 3, dtype=torch.float64) + 0.3
    whole, cut = moments([x, x])[0], moments([x, x.permute(2, 0, 1)], limit)[1]
    assert cut.count == whole.count == x.numel()
    assert cut.norm == pytest.approx(x.norm().item() / x.abs().max().item(), rel=1e-13)
    assert cut.std == pytest.approx(x.std().item() / x.abs().max().item(), rel=1e-13)


@pytest.mark.parametrize("mean", [0.0, 1.0, 1e3])
def test_float32_is_as_good_as_float64(mean):
    x = (torch.randn(300, 300) + mean).float()
    assert gsnr(moments([x], 1000)[0]) == pytest.approx(reference_gain(x), rel=2e-5)


@pytest.mark.parametrize("power", [-100, -30, 1, 64])
def test_a_power_of_two_changes_nothing(power):
    x = torch.randn(1000)
    assert gsnr(moments([x * 2.0**power])[0]) == gsnr(moments([x])[0])


@pytest.mark.parametrize("exponent", range(-20, 21, 4))
def test_any_scale_gives_the_same_gain(exponent):
    x = torch.randn(1000) * 0.1 + 0.01
    scaled = (x.double() * 10.0**exponent * 1.7).float()
    assert gsnr(moments([scaled])[0]) == pytest.approx(gsnr(moments([x])[0]), rel=1e-6)


def test_large_float16_does_not_overflow():
    x = torch.linspace(-60000, 60000, 4096).half()
    found = moments([x])[0]
    assert found.informative
    assert gsnr(found) == pytest.approx(math.sqrt(4095), rel=1e-3)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.0])
def test_what_is_not_informative(value):
    x = torch.zeros(5) if value == 0.0 else torch.tensor([1.0, value, 2.0])
    assert not moments([x])[0].informative


def test_the_gain_is_bounded():
    assert gsnr(moments([torch.tensor(4.0)])[0]) == 1.0
    assert gsnr(moments([torch.full((9,), 0.1)])[0]) == 9.0
    nearly = torch.full((9,), 1.0)
    nearly[0] += 1e-6
    assert gsnr(moments([nearly])[0]) == 9.0
    assert gsnr(moments([torch.tensor([1.0, -1.0])])[0]) == pytest.approx(1.0)
    tiny = torch.full((4,), 5e-324, dtype=torch.float64)
    assert gsnr(moments([tiny])[0], eps=1e-8) == pytest.approx(0.0, abs=1e-300)


def test_slices_cover_every_element_once():
    for shape in [(), (0,), (5,), (1, 100), (7, 11), (3, 1, 50), (2, 3, 4, 5)]:
        for limit in (1, 3, 10, 1000):
            x = torch.zeros(shape)
            for (view,) in slices([x], limit):
                assert view.numel() <= max(limit, 1)
                view += 1
            assert bool((x == 1).all())
    with pytest.raises(ValueError, match="at least 1.*got 0"):
        list(slices([torch.zeros(3)], 0))


def test_batches_keep_the_limit_and_the_numbers():
    rows = [([torch.zeros(n), torch.zeros(n)], float(n)) for n in (3, 10, 1, 1, 25)]
    for batch in batches(rows, 8):
        assert sum(views[0].numel() for views, _ in batch) <= 8
        for views, number in batch:
            for view in views:
                view += number
    assert all(bool((t == number).all()) for pair, number in rows for t in pair)


def test_to_host_keeps_the_order_and_float64():
    vectors = [torch.tensor([1 / 3], dtype=torch.float64), torch.tensor([2.0, 3.0]), torch.ones(0)]
    assert to_host(vectors) == [[1 / 3], [2.0, 3.0], []]
    assert to_host([]) == []
