"""Moments of many tensors: against float64, in slices, in one read, by norms, at every scale."""

import math

import pytest
import torch
from reference.sgd_sai import gain as reference_gain

from nomadam.numerics import moments as module
from nomadam.numerics import moments_cpu
from nomadam.numerics.moments import (
    Share,
    gsnr,
    merged,
    moments,
    moments_of,
    shares,
    shares_by_norms,
    shares_in_one_read,
    shares_in_slices,
    to_host,
)
from nomadam.numerics.moments_cpu import cpu_measures
from nomadam.numerics.slices import packed, slices

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
needs_compiler = pytest.mark.skipif(
    not shares_in_one_read([torch.ones(1)]), reason="needs a C++ compiler"
)


def moments_in_one_read(tensors):
    return [moments_of(share) for share in shares_in_one_read(tensors)]


def moments_in_slices(tensors, limit):
    return [moments_of(share) for share in shares_in_slices(tensors, limit)]


def moments_by_norms(tensors):
    return [share and moments_of(share) for share in shares_by_norms(tensors)]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def reference(x):
    """Norm and standard deviation in units of the largest, exact but for a rounding in float64."""
    values = x.double().flatten().tolist()
    largest = max(map(abs, values))
    mean = math.fsum(values) / len(values)
    deviations = math.fsum((value - mean) ** 2 for value in values)
    std = math.sqrt(deviations / (len(values) - 1)) if len(values) > 1 else 0.0
    return largest, math.sqrt(math.fsum(v * v for v in values)) / largest, std / largest


def check(found, x, rel):
    largest, norm, std = reference(x)
    assert found.count == x.numel() and found.largest == largest
    assert found.norm == pytest.approx(norm, rel=rel)
    assert found.std == pytest.approx(std, rel=rel, abs=1e-14)


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


def test_packed_keeps_the_limit_and_the_order():
    sizes = [3, 10, 1, 1, 25, 8]
    lists = list(packed(sizes, int, 8))
    assert lists == [[3], [10], [1, 1], [25], [8]]
    assert list(packed([], int, 8)) == []


def test_to_host_keeps_the_order_and_float64():
    vectors = [torch.tensor([1 / 3], dtype=torch.float64), torch.tensor([2.0, 3.0]), torch.ones(0)]
    assert to_host(vectors) == [[1 / 3], [2.0, 3.0], []]
    assert to_host([]) == []


# ------------------------------------------------------------------- one read by the compiled loop

HARD = {
    "normal": normal(5000),
    "constant": torch.full((3000,), 0.1),
    "mean a million deviations": 1e6 + normal(70000),
    "an outlier first": torch.cat([torch.tensor([3e38]), normal(1000)]),
    "an outlier last": torch.cat([normal(1000), torch.tensor([-3e38])]),
    "a step between chunks": torch.cat([torch.full((32768,), 1.0), torch.full((32768,), -7.0)]),
    "tiny": normal(1000) * 1e-38,
    "smallest of all": torch.randint(-3, 4, (1000,)) * 2.0**-149,
    "huge": torch.rand(1000) * 3e38,
    "mixed scales": normal(4000) * 10.0 ** torch.linspace(-40, 38, 4000),
    "transposed": normal(33, 65).t(),
    "channels last": normal(2, 5, 7, 3).contiguous(memory_format=torch.channels_last),
    "no dimension": torch.tensor(-2.5),
    "of size one": normal(1, 40, 1),
}


@needs_compiler
@pytest.mark.parametrize("name", HARD)
def test_one_read_of_hard_tensors(name):
    x = HARD[name]
    assert cpu_measures(x)
    check(moments_in_one_read([x])[0], x, 1e-9 if "million" in name else 1e-12)


@needs_compiler
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_one_read_of_any_size_in_one_call(dtype):
    sizes = [*range(1, 40), 255, 256, 257, 511, 513, 32767, 32768, 32769, 70001]
    tensors = [(normal(n, seed=n) * 3 + 1).to(dtype) for n in sizes]
    for found, x in zip(moments_in_one_read(tensors), tensors, strict=True):
        check(found, x, 1e-12)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_number_of_16_bits_is_read_as_it_is(dtype):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    of_one_sign = every[: 2**15]
    found_of_each = moments_in_one_read(of_one_sign.split(1))
    for found, x in zip(found_of_each, of_one_sign.float().abs().tolist(), strict=True):
        assert found.largest == x or (math.isnan(found.largest) and math.isnan(x))
    finite = every[every.isfinite()]
    check(moments_in_one_read([finite])[0], finite, 1e-12)


@needs_compiler
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 1, 255, 256, 300, 32768, 40000])
def test_one_read_sees_what_is_not_finite_anywhere(dtype, value, place):
    x = torch.ones(40001, dtype=dtype)
    x[place] = value
    before, found, after = moments_in_one_read([torch.ones(3), x, torch.zeros(3)])
    assert not found.informative and math.isnan(found.largest) == math.isnan(value)
    assert before.largest == 1.0 and after.largest == 0.0 and not after.informative


@needs_compiler
def test_nan_is_not_hidden_by_inf():
    for values in ([math.nan, math.inf], [math.inf, math.nan]):
        x = torch.ones(70000)
        x[0], x[-1] = values
        assert math.isnan(moments_in_one_read([x])[0].largest)


@needs_compiler
def test_the_number_of_threads_does_not_change_a_bit():
    tensors = [normal(n, seed=n) for n in (300_001, 1, 5, 40_000)]
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(moments_in_one_read(tensors))
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1] == found[2]


@needs_compiler
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_one_read_agrees_with_slices(dtype):
    tensors = [(normal(n, 7, seed=n) + 0.2).to(dtype) for n in (1, 30, 20_000)]
    one = moments_in_one_read(tensors)
    for a, b in zip(one, moments_in_slices(tensors, 2**14), strict=True):
        assert a.largest == b.largest
        assert (a.norm, a.std) == pytest.approx((b.norm, b.std), rel=1e-6)


def test_what_the_loop_cannot_take():
    x = torch.zeros(4, 6)
    for odd in (x[:, ::2], x[:, :3], x[:1].expand(4, 6), x.double(), x.int(), x.to("meta")):
        assert not cpu_measures(odd)
    for dense in (x, x[1:3], x.t(), torch.nn.Parameter(x), x[:, 2:3][:1]):
        assert cpu_measures(dense)


def test_small_tensors_compile_nothing(monkeypatch):
    def refuse(*_):
        raise AssertionError("compiled")

    monkeypatch.setattr(moments_cpu, "_kernel", refuse)
    moments([torch.ones(1000)] * 9)
    monkeypatch.setattr(module, "SMALLEST_COMPILED", 9000)
    with pytest.raises(AssertionError, match="compiled"):
        moments([torch.ones(1000)] * 9)


@pytest.mark.parametrize("compiler", [True, False])
def test_large_tensors_of_every_kind_keep_their_order(monkeypatch, compiler):
    monkeypatch.setattr(module, "SMALLEST_COMPILED", 1)
    if not compiler:
        monkeypatch.setattr(moments_cpu, "_kernel", lambda: None)
    x = normal(40, 50)
    mixed = [x.half(), x.double() * 2, x[:, ::2], torch.ones(()), x.t().bfloat16(), x * 3]
    for found, tensor in zip(moments(mixed, 100), mixed, strict=True):
        check(found, tensor, 1e-6)


# ------------------------------------------------------------------------------------- by norms


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("mean", [0.0, 0.5, -0.9])
def test_norms_are_as_good_as_slices(dtype, mean):
    tensors = [(normal(n, seed=n) + mean).to(dtype) for n in (2, 64, 300, 1000)]
    for found, x in zip(moments_by_norms(tensors), tensors, strict=True):
        if found is not None:
            check(found, x, 1e-6)
    assert found is not None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("mean", [0.0, 0.5, -0.9])
def test_norms_of_large_tensors_on_cuda(dtype, mean):
    tensors = [(normal(n, 3, seed=n) + mean).to("cuda", dtype) for n in (1000, 2**16, 2**23 + 1)]
    exact = moments_in_slices([tensor.double() for tensor in tensors], 2**20)
    for a, b in zip(moments_by_norms(tensors), exact, strict=True):
        assert a is not None and a.largest == b.largest
        assert (a.norm, a.std) == pytest.approx((b.norm, b.std), rel=1e-6)


def test_norms_refuse_what_they_would_lose():
    x = normal(1000)
    fit = [x, x.half(), x * 1e-12, x * 1e12]
    lost = [x + 2, torch.ones(9), x * 1e-18, x * 1e18, x * 1e37, x.double(), torch.full((2,), 3e38)]
    found = moments_by_norms([*fit, *lost])
    assert None not in found[:4] and found[4:] == [None] * 7
    for measured, tensor in zip(found[:4], fit, strict=True):
        check(measured, tensor, 1e-6)


def test_norms_know_what_needs_no_more():
    single, zero, inf, nan = moments_by_norms(
        [torch.tensor(-3e38), torch.zeros(5), torch.tensor([1.0, math.inf]), torch.tensor(math.nan)]
    )
    assert tuple(single) == (1, pytest.approx(3e38), 1.0, 0.0)
    assert zero.largest == 0.0 and inf.largest == math.inf and math.isnan(nan.largest)


def test_cuda_is_measured_by_norms_where_they_do(monkeypatch):
    by_slices = []
    exact = module.shares_in_slices
    monkeypatch.setattr(
        module, "shares_in_slices", lambda x, limit: by_slices.extend(x) or exact(x, limit)
    )
    monkeypatch.setattr(module, "_is_cuda", lambda tensor: True)
    tensors = [normal(500), torch.ones(6), normal(700)]
    for found, x in zip(moments(tensors), tensors, strict=True):
        check(found, x, 1e-6)
    assert len(by_slices) == 1 and by_slices[0] is tensors[1]


def parts_of(x, sizes):
    return shares(list(x.split(sizes)), 2**20)


@pytest.mark.parametrize("sizes", [[23], [1, 22], [10, 0, 13], [1] * 23])
@pytest.mark.parametrize("mean", [0.0, 1e3])
def test_parts_merge_to_the_whole(sizes, mean):
    x = normal(23).double() + mean
    filled = [part for part in x.split(sizes) if part.numel()]
    parts = shares(filled) + [Share(0, 0.0, math.nan, math.nan)] * (len(sizes) - len(filled))
    check(moments_of(merged(parts)), x, 1e-13)


def test_parts_of_very_different_scales_merge():
    x = torch.cat([normal(5).double() * 1e150, normal(7).double() * 1e-150, torch.zeros(3)])
    check(moments_of(merged(parts_of(x, [5, 7, 3]))), x, 1e-13)


def test_one_element_keeps_its_sign_when_merged():
    x = torch.tensor([-3.0, 1.0, -2.0])
    check(moments_of(merged(parts_of(x, [1, 1, 1]))), x, 1e-13)
    by_norms = shares_by_norms(list(x.split([1, 2])))
    if None not in by_norms:
        check(moments_of(merged(by_norms)), x, 1e-6)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_part_that_is_not_finite_makes_the_whole_so(bad):
    for x in ([bad, 1.0], [1.0, bad], [0.0, bad]):
        found = merged(parts_of(torch.tensor(x), [1, 1]))
        assert not moments_of(found).informative and found.largest != 0.0


def test_zeros_merge_to_zeros():
    found = merged([*parts_of(torch.zeros(4), [2, 2]), Share(0, 0.0, math.nan, math.nan)])
    assert (found.count, found.largest) == (4, 0.0) and not moments_of(found).informative
