"""The one-pass kernel of the CPU: its formulas, its sizes and threads, and how it is called."""

import itertools
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from one_pass_cpu import (
    BF16,
    F16,
    F32,
    INT8,
    OPTIONS,
    bits_of,
    encoded,
    expected,
    row_of,
    step,
    to_bf16,
    tolerance,
)

from nomadam import SGDSaI
from nomadam.optimizers import sgd_sai_cpu
from nomadam.optimizers.sgd_sai_cpu import cpu_fits, cpu_kernel, update_cpu
from nomadam.optimizers.sgd_sai_update import Options, Row

pytestmark = pytest.mark.skipif(cpu_kernel(warn=False) is None, reason="needs a C++ compiler")

CHUNK = 128 * 256  # elements that a thread claims at a time
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
        update_cpu([Row(**(row | inside))], Options(**OPTIONS))
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
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        update_cpu([Row(**(row | {"stochastic": True})) for row in rows], Options(**OPTIONS))
    assert calls == [len(rows)]
    assert not [event.name for event in profile.events() if event.name.startswith("aten")]


def test_autograd_sees_that_tensors_were_changed():
    weight = torch.nn.Parameter(torch.randn(10))
    loss = weight.square().sum()
    before = weight._version
    row = row_of(10) | {"param": weight}
    with torch.no_grad():
        update_cpu([Row(**row)], Options(**OPTIONS))
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
    large = torch.empty(10**7)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for options in ({"fused": False}, {"foreach": True}):
            SGDSaI([large], **options)._plan()
        SGDSaI([large[:100]])._plan()
    with pytest.warns(UserWarning, match="install g.. or clang.."):
        assert not SGDSaI([large])._plan()[1].one_pass
    sgd_sai_cpu._warn_once.cache_clear()
