"""The one-pass kernel of the CPU against the formulas in float64, and its random bits, exactly."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from nomadam.numerics.rounding import Draw
from nomadam.optimizers import sgd_sai_cpu
from nomadam.optimizers.sgd_sai_cpu import cpu_fits, cpu_kernel, update_cpu

pytestmark = pytest.mark.skipif(cpu_kernel(warn=False) is None, reason="needs a C++ compiler")

F32, BF16, F16, INT8 = torch.float32, torch.bfloat16, torch.float16, torch.int8
ROUNDING = {F32: 0.0, BF16: 2.0**-7, F16: 2.0**-11}  # relative, random for bfloat16
ARITHMETIC = 3 * 2.0**-23  # of a sum of two products in float32
CHUNK = 32 * 1024  # elements that a thread claims at a time
TOP = 127.0**2


# ------------------------------------------------------------------------------- the reference


def bits_of(draw, numel):
    """The contract in numpy: two key words from four, then a hash of the index in the block."""
    with np.errstate(over="ignore"):

        def mixed(h):
            h = (h ^ (h >> 16)) * 0x85EBCA6B & 0xFFFFFFFF
            h = (h ^ (h >> 13)) * 0xC2B2AE35 & 0xFFFFFFFF
            return h ^ (h >> 16)

        keys = []
        for h in (0, 1):
            for word in (draw.seed & 0xFFFFFFFF, draw.seed >> 32, draw.block, draw.step):
                h = mixed(((h ^ word) + 0x9E3779B9) & 0xFFFFFFFF)
            keys.append(h)
        index = np.arange(draw.first, draw.first + numel, dtype=np.uint64)
        low, high = index.astype(np.uint32), (index >> np.uint64(32)).astype(np.uint32)
        x = low + np.uint32(keys[0])
        x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
        x ^= np.uint32(keys[1]) + high * np.uint32(0x9E3779B9)
        x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
        return x ^ (x >> np.uint32(16))


def to_bf16(values, half):
    """Float32 values to bfloat16, with a random half or to nearest."""
    if half is None:
        return values.to(BF16)
    words = values.numpy().view(np.uint32)
    cut = ((words + half.astype(np.uint32)) & np.uint32(0xFFFF0000)).view(np.float32)
    return torch.from_numpy(np.where(np.isfinite(values.numpy()), cut, values.numpy())).to(BF16)


def blocks_of(values):
    return [values[start : start + 128] for start in range(0, len(values), 128)]


def decoded(codes, scales):
    values = [c.double() * c.double().abs() for c in blocks_of(codes)]
    return torch.cat([v * float(s) / TOP for v, s in zip(values, scales, strict=True)])


def encoded(values, half):
    """Codes and scales of float64 values by the square law, in blocks of 128."""
    codes, scales = [], []
    for block, share in zip(blocks_of(values), blocks_of((half + 0.5) / 65536), strict=True):
        scale = float(block.abs().max().float())
        scale = 0.0 if scale < 2.0**-100 else scale
        scales.append(scale)
        if scale == 0.0 or not np.isfinite(scale):
            codes.append(np.zeros(len(block)))
            continue
        y = np.minimum(block.abs().numpy() * (TOP / scale), TOP)
        k = np.floor(np.sqrt(y))
        k = np.minimum(k + (y - k * k > share * (2 * k + 1)), 127)
        codes.append(np.sign(block.numpy()) * k)
    return torch.from_numpy(np.concatenate(codes)).to(INT8), torch.tensor(scales)


def row_of(numel, param=F32, grad=F32, momentum=F32, kahan=False, seed=0, first=0):
    """A block with everything that its update needs."""
    make = torch.Generator().manual_seed(seed)
    spread = torch.randn(numel, generator=make).exp()  # of magnitudes, in every block of 128

    def values():
        return torch.randn(numel, generator=make) * spread

    row = {"param": values().to(param), "grad": values().to(grad), "gain": 20.0}
    row |= {"momentum_buffer": None, "momentum_scale": None, "compensation": None}
    if momentum is INT8:
        row["momentum_buffer"] = torch.randint(-127, 128, (numel,), generator=make).to(INT8)
        row["momentum_scale"] = torch.rand(-(-numel // 128), generator=make) + 0.5
    elif momentum is not None:
        row["momentum_buffer"] = values().to(momentum)
    if kahan:
        row["compensation"] = (values() * 2.0**-9).to(BF16)
    row |= {"draw": Draw(seed + 5, 7, 3, first), "stochastic": not kahan}
    return row


def tolerance(dtype):
    return ROUNDING[dtype] + ARITHMETIC


def copy_of(row):
    return {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in row.items()}


OPTIONS = {"lr": 1e-2, "momentum": 0.9, "weight_decay": 0.1}


def step(*rows, **options):
    """The kernel, on copies."""
    rows = [copy_of(row) for row in rows]
    column = {name: [row[name] for row in rows] for name in rows[0]}
    update_cpu(
        column["param"],
        column["grad"],
        column["momentum_buffer"],
        column["gain"],
        momentum_scales=column["momentum_scale"],
        compensations=column["compensation"],
        draws=column["draw"],
        stochastic=column["stochastic"],
        **(OPTIONS | options),
    )
    return rows if len(rows) > 1 else rows[0]


def expected(row, *, lr, momentum, weight_decay, nesterov=False, maximize=False, grad_scale=1.0):
    """New parameter and momentum in float64, and the size of the terms of both."""
    p = row["param"].double()
    if row["compensation"] is not None:
        p = p + row["compensation"].double()
    g = row["grad"].double() / float(grad_scale) * (-1 if maximize else 1)
    m, direction, largest = None, g, g.abs()
    if row["momentum_buffer"] is not None:
        codes = row["momentum_scale"] is not None
        old = row["momentum_buffer"]
        old = decoded(old, row["momentum_scale"]) if codes else old.double()
        m = momentum * old + (1 - momentum) * g
        direction = momentum * m + (1 - momentum) * g if nesterov else m
        largest = torch.maximum(old.abs(), g.abs())
    new = p * (1 - lr * weight_decay) - lr * row["gain"] * direction
    return new, m, p.abs() + lr * row["gain"] * largest, largest


# ---------------------------------------------------------------------------------- agreement


SETTINGS = [
    {},
    {"nesterov": True},
    {"maximize": True, "weight_decay": 0.0},
    {"momentum": 0.3, "nesterov": True, "maximize": True},
    {"grad_scale": torch.tensor(1024.0), "lr": torch.tensor(0.02)},
]


@pytest.mark.parametrize("momentum", [None, F32, BF16, F16, INT8], ids=str)
@pytest.mark.parametrize("grad", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("param", [F32, BF16, F16], ids=str)
def test_every_mix_of_dtypes_follows_the_formulas(param, grad, momentum):
    for seed, settings in enumerate(SETTINGS):
        row = row_of(2500, param, grad, momentum, seed=seed)
        options = OPTIONS | settings | ({"momentum": 0.0} if momentum is None else {})
        got = step(row, **options)
        new, m, p_size, m_size = expected(row, **(options | {"lr": float(options["lr"])}))
        assert got["grad"].equal(row["grad"])
        assert ((got["param"] - new).abs() <= tolerance(param) * p_size + 2.0**-24).all()
        bits = bits_of(row["draw"], 2500)
        if param is BF16:
            assert (got["param"] == to_bf16(new.float(), bits >> 16)).float().mean() > 0.98
        if momentum is INT8:
            codes, scales = encoded(m, bits & 0xFFFF)
            torch.testing.assert_close(got["momentum_scale"], scales, rtol=1e-6, atol=0)
            assert (got["momentum_buffer"] == codes).float().mean() > 0.99
            assert ((got["momentum_buffer"] - codes).abs() <= 1).all()
        elif momentum is not None:
            assert (
                (got["momentum_buffer"] - m).abs() <= tolerance(momentum) * m_size + 2.0**-24
            ).all()
        if momentum is BF16:
            rounded = to_bf16(m.float(), bits & 0xFFFF)
            assert (got["momentum_buffer"] == rounded).float().mean() > 0.98


@pytest.mark.parametrize("momentum", [None, F32, BF16, INT8], ids=str)
def test_compensation_keeps_what_the_parameter_loses(momentum):
    row = row_of(1000, BF16, BF16, momentum, kahan=True)
    options = OPTIONS | ({"momentum": 0.0} if momentum is None else {})
    got = step(row, **options)
    new, m, size, _ = expected(row, **options)
    total = got["param"].double() + got["compensation"].double()
    assert ((total - new).abs() <= 2.0**-15 * size).all()
    assert (got["param"] == new.to(BF16)).float().mean() > 0.98
    if momentum is BF16:
        assert (got["momentum_buffer"] == m.to(BF16)).float().mean() > 0.98


def test_small_updates_are_not_lost_with_compensation():
    row = row_of(256, BF16, BF16, None, kahan=True)
    row["param"].fill_(1.0)
    row["grad"].fill_(2.0**-12)
    row["compensation"].zero_()
    for _ in range(64):
        row = step(row, lr=1.0, momentum=0.0, weight_decay=0.0, grad_scale=20.0)
    torch.testing.assert_close(row["param"].float(), torch.full((256,), 1 - 2.0**-6))


def test_without_a_draw_bfloat16_is_rounded_to_nearest():
    drawn = row_of(1000, BF16, BF16, BF16)
    for row in (drawn | {"draw": None}, drawn | {"stochastic": False}):
        got = step(row)
        new, m, *_ = expected(row, **OPTIONS)
        assert (got["param"] == new.to(BF16)).float().mean() > 0.99
        assert (got["momentum_buffer"] == m.to(BF16)).float().mean() > 0.99


def test_gains_and_learning_rate_may_be_tensors():
    row = row_of(300)
    other = row | {"gain": torch.tensor(20.0, dtype=torch.float64)}
    a, b = step(row), step(other, lr=torch.tensor(1e-2, dtype=torch.float64))
    assert a["param"].equal(b["param"])


def test_maximize_is_the_negative_gradient():
    row = row_of(1000, BF16, F16, INT8)
    other = row | {"grad": -row["grad"]}
    a, b = step(row, maximize=True), step(other)
    assert a["param"].equal(b["param"])
    assert a["momentum_buffer"].equal(b["momentum_buffer"])


# ------------------------------------------------------------------- storage formats, bit by bit

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


# --------------------------------------------------------------------------- sizes and threads

SIZES = [0, 1, 127, 128, 129, 1023, 1025, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 200, 0, 5]
MIXES = [(F32, F32, F32), (BF16, BF16, INT8), (F16, F32, F32), (BF16, F32, BF16), (F32, F16, None)]


def rows_of_all_sizes():
    mixes = itertools.cycle(MIXES)
    return [row_of(n, *next(mixes), seed=i) for i, n in enumerate(SIZES * 2)]


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_many_tensors_at_once_are_each_alone(threads):
    rows = rows_of_all_sizes()
    alone = [step(row) for row in rows]
    torch.set_num_threads(threads)
    together = step(*rows)
    for one, other in zip(alone, together, strict=True):
        for name in ("param", "momentum_buffer", "momentum_scale"):
            a, b = one[name], other[name]
            assert a is b is None or a.equal(b), (name, len(one["param"]))


def test_nothing_outside_the_tensors_is_written():
    for n in SIZES[1:]:
        row = row_of(n, BF16, BF16, INT8, kahan=True)
        whole = {k: v for k, v in row.items() if isinstance(v, torch.Tensor)}
        fenced = {k: torch.full((v.numel() + 256,), 77, dtype=v.dtype) for k, v in whole.items()}
        for name, tensor in whole.items():
            fenced[name][128 : 128 + tensor.numel()] = tensor
        inside = {k: fenced[k][128 : 128 + v.numel()] for k, v in whole.items()}
        update_cpu(
            *([inside["param"]], [inside["grad"]], [inside["momentum_buffer"]], [1.0]),
            momentum_scales=[inside["momentum_scale"]],
            compensations=[inside["compensation"]],
            draws=[row["draw"]],
            stochastic=[False],
            **OPTIONS,
        )
        for fence in fenced.values():
            assert (fence[:128] == 77).all() and (fence[-128:] == 77).all()


def test_pieces_draw_what_the_whole_draws():
    whole = row_of(5 * 128 + 60, BF16, BF16, INT8, first=9)
    got = step(whole)
    for start, stop in [(0, 128), (128, 512), (512, 700)]:
        piece = {k: v[start:stop] if isinstance(v, torch.Tensor) else v for k, v in whole.items()}
        piece["momentum_scale"] = whole["momentum_scale"][start // 128 : -(-stop // 128)]
        piece["draw"] = whole["draw"]._replace(first=9 + start)
        part = step(piece)
        assert part["param"].equal(got["param"][start:stop])
        assert part["momentum_buffer"].equal(got["momentum_buffer"][start:stop])


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


# ----------------------------------------------------------------------------- how it is called


def test_a_step_that_is_not_kept_changes_nothing():
    row = row_of(500, BF16, BF16, INT8)
    got = step(row, keep=torch.tensor(False))
    assert all(got[k].equal(v) for k, v in row.items() if isinstance(v, torch.Tensor))
    kept, plain = step(row, keep=torch.tensor(True)), step(row)
    assert kept["param"].equal(plain["param"]) and not kept["param"].equal(row["param"])


def test_one_call_and_no_operator_of_torch(monkeypatch):
    kernel = cpu_kernel()
    calls = []
    counted = kernel._replace(step=lambda *args: (calls.append(args[1]), kernel.step(*args)))
    monkeypatch.setattr(sgd_sai_cpu, "cpu_kernel", lambda: counted)
    rows = [row_of(100, *mix) for mix in MIXES * 4]
    columns = [[row[k] for row in rows] for k in ("param", "grad", "momentum_buffer", "gain")]
    names = {"momentum_scales": "momentum_scale", "compensations": "compensation", "draws": "draw"}
    more = {k: [row[name] for row in rows] for k, name in names.items()}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        update_cpu(*columns, **more, stochastic=[True] * len(rows), **OPTIONS)
    assert calls == [len(rows)]
    assert not [event.name for event in profile.events() if event.name.startswith("aten")]


def test_autograd_sees_that_tensors_were_changed():
    weight = torch.nn.Parameter(torch.randn(10))
    loss = weight.square().sum()
    before = weight._version
    row = row_of(10) | {"param": weight}
    columns = [[row[k]] for k in ("param", "grad", "momentum_buffer", "gain")]
    nothing = dict.fromkeys(["momentum_scales", "compensations", "draws"], [None])
    with torch.no_grad():
        update_cpu(*columns, **nothing, stochastic=[False], **OPTIONS)
    assert weight._version > before
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_fits():
    def fits(**changed):
        row = row_of(600, BF16, BF16, INT8, kahan=True) | changed
        names = ("param", "grad", "momentum_buffer", "momentum_scale", "compensation")
        return cpu_fits([row[name] for name in names])

    a = torch.randn(30, 20)
    assert fits()
    assert fits(compensation=None)
    assert fits(momentum_buffer=None, momentum_scale=None)
    assert fits(param=torch.nn.Parameter(torch.zeros(600)), compensation=None)
    assert not fits(param=torch.zeros(600))  # whose compensation is of another dtype
    assert not fits(param=torch.zeros(600, dtype=torch.float64), compensation=None)
    assert not fits(grad=torch.zeros(600, device="meta"))
    assert not fits(grad=torch.zeros(1200)[::2])
    assert not fits(grad=torch.zeros(601))
    assert not fits(grad=torch._neg_view(torch.zeros(600)))
    assert not fits(momentum_scale=torch.ones(4))
    assert not fits(momentum_scale=None)
    assert not fits(momentum_buffer=torch.zeros(599, dtype=INT8))
    assert not cpu_fits([a.t(), a.t(), None, None, None])
    assert not cpu_fits([torch.zeros(2, dtype=torch.complex64)] * 2 + [None] * 3)


def test_threads_are_those_of_torch_and_the_import_compiles_nothing(tmp_path):
    script = """
import torch
torch.ones(10**6).add_(1)
def pools(): return {line.split()[-1] for line in open("/proc/self/maps") if "omp." in line}
before = pools()
from nomadam.optimizers.sgd_sai_cpu import cpu_kernel
from pathlib import Path
assert not Path.home().joinpath(".cache", "nomadam").exists()
kernel = cpu_kernel()
assert pools() == before, pools() - before
assert (kernel.fork is None) != torch.backends.openmp.is_available()
"""
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc")
    where = os.environ | {"HOME": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[1])}
    subprocess.run([sys.executable, "-c", script], env=where, check=True, timeout=120)
    assert len(list(tmp_path.glob(".cache/nomadam/compiled/sgd_sai_cpu-*.so"))) == 1


def test_without_a_compiler_there_is_one_warning(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sgd_sai_cpu, "_kernel_or_reason", sgd_sai_cpu._kernel_or_reason.__wrapped__)
    sgd_sai_cpu._warn_once.cache_clear()
    assert cpu_kernel(warn=False) is None
    with pytest.warns(UserWarning, match="install g.. or clang..") as caught:
        assert cpu_kernel() is None
        assert cpu_kernel() is None
    assert len(caught) == 1
    sgd_sai_cpu._warn_once.cache_clear()
