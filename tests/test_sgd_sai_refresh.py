"""A gain that is measured again, and steps along signs: SGDSaI against the slow reference."""

import math
from itertools import product

import pytest
import torch
from reference import sgd_sai as reference
from torch import nn

from nomadam import SGDSaI
from nomadam.optimizers import sgd_sai_start
from nomadam.optimizers.sgd_sai_cpu import cpu_kernel

PATHS = [{"foreach": False}, {"foreach": True}, {"fused": True}]
SHAPES = [(6, 4), (7,), (), (3, 2, 5)]


def skip_without_compiler(path):
    if path.get("fused") and cpu_kernel(warn=False) is None:
        pytest.skip("no C++ compiler")


def fresh(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in SHAPES]


def gradients(steps, dtype=torch.float32):
    """With means and spreads that change, so that the gains do."""
    generator = torch.Generator().manual_seed(1)
    return [
        [(torch.randn(s, generator=generator) + t % 4).to(dtype) for s in SHAPES]
        for t in range(steps)
    ]


def train(optimizer, params, steps):
    gains = []
    for grads in steps:
        for p, g in zip(params, grads, strict=True):
            p.grad = None if g is None else g.clone()
        optimizer.step()
        gains.append(optimizer.gains())
    return gains


@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize(
    "options",
    [{"refresh": 1}, {"refresh": 3}, {"refresh": 3, "nesterov": True, "maximize": True},
     {"refresh": 2, "momentum": 0.0}, {"refresh": 2, "eps": 0.5}],
    ids=str,
)  # fmt: skip
def test_it_is_the_reference_also_for_blocks_that_start_late(options, path):
    skip_without_compiler(path)
    params, steps = fresh(), gradients(8)
    steps[0][0] = steps[1][0] = None
    steps[0][1] = torch.zeros(7)
    steps[6][3] = torch.zeros(3, 2, 5)
    slow = [reference.SGDSaI(p, lr=0.1, weight_decay=0.1, **options) for p in params]
    optimizer = SGDSaI(params, lr=0.1, weight_decay=0.1, **options, **path)
    for grads in steps:
        train(optimizer, params, [grads])
        for p, each, g in zip(params, slow, grads, strict=True):
            each.step(g)
            torch.testing.assert_close(p.detach().double(), each.p, rtol=1e-4, atol=1e-5)
        found = optimizer.gains()
        assert found == pytest.approx(
            {i: each.gain for i, each in enumerate(slow) if each.gain}, rel=1e-5
        )


def test_gains_follow_every_kth_step_and_no_other():
    params, steps = fresh(), gradients(9)
    optimizer = SGDSaI(params, lr=0.0, refresh=3)
    first, *rest = train(optimizer, params, steps)
    changed = [now != before for before, now in zip([first, *rest], rest, strict=False)]
    assert changed == [False, False, True, False, False, True, False, False]
    assert rest[2][0] == pytest.approx(reference.gain(steps[3][0]), rel=1e-5)


def test_a_step_that_measures_looks_at_the_gradients_once_and_others_never(monkeypatch):
    calls, moments = [], sgd_sai_start.shares
    monkeypatch.setattr(sgd_sai_start, "shares", lambda *args: calls.append(step) or moments(*args))
    params, optimizer = (made := fresh()), SGDSaI(made, refresh=4)
    for step, grads in enumerate(gradients(10)):  # noqa: B007
        train(optimizer, params, [grads])
    assert calls == [0, 4, 8]


@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0])
@pytest.mark.parametrize("path", PATHS, ids=str)
def test_a_gradient_that_says_nothing_leaves_the_gain(bad, path):
    skip_without_compiler(path)
    params, steps = fresh(), gradients(3)
    steps[2][0] = torch.full((6, 4), bad)
    optimizer = SGDSaI(params, lr=1e-3, refresh=2, **path)
    first, _, last = train(optimizer, params, steps)
    assert last[0] == first[0] and last[1] != first[1]
    assert torch.isfinite(params[1]).all()
    assert torch.isfinite(params[0]).all() == (bad == 0.0)


def test_a_step_that_is_skipped_measures_nothing():
    params, steps = fresh(), gradients(3)
    steps[2][0] = torch.full((6, 4), math.nan)
    optimizer = SGDSaI(params, lr=1e-3, refresh=2, skip_nonfinite=True)
    train(optimizer, params, steps[:2])
    before = [p.detach().clone() for p in params]
    gains = optimizer.gains()
    train(optimizer, params, steps[2:])
    assert optimizer.gains() == gains and optimizer.skipped_steps == 1
    assert all(map(torch.equal, before, params))


@pytest.mark.parametrize(
    ("dtype", "path"), list(product([torch.float32, torch.bfloat16], PATHS)), ids=str
)
def test_a_resume_between_two_measurements_is_exact(dtype, path, tmp_path):
    skip_without_compiler(path)
    steps = gradients(9, dtype)
    for stop in (2, 3, 4):
        params = fresh(dtype)
        optimizer = SGDSaI(params, lr=1e-2, refresh=3, **path)
        train(optimizer, params, steps[:stop])
        torch.save(optimizer.state_dict(), tmp_path / "state")
        copies = [nn.Parameter(p.detach().clone()) for p in params]
        resumed = SGDSaI(copies, lr=1.0, refresh=None if path.get("foreach") else 3, **path)
        resumed.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
        assert train(optimizer, params, steps[stop:]) == train(resumed, copies, steps[stop:])
        assert all(map(torch.equal, params, copies))


def test_a_state_from_before_there_was_a_refresh_counts_from_its_loading():
    params, steps = fresh(), gradients(4)
    optimizer = SGDSaI(params, lr=0.0)
    (gains,) = train(optimizer, params, steps[:1])
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        del group["refresh"], group["refresh_step"], group["direction"]
    later = SGDSaI(params, lr=0.0, refresh=2)
    later.load_state_dict(state)
    assert [found == gains for found in train(later, params, steps[1:])] == [True, True, False]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"refresh": 0}, "refresh must be .* got 0"),
        ({"refresh": 2.5}, "got 2.5"),
        ({"refresh": True}, "got True"),
        ({"refresh": 2, "gain": "sqrt_numel"}, "gain='sqrt_numel'"),
        ({"refresh": 2, "gain": 3.0}, "3.0"),
        ({"refresh": 2, "normalize": True}, "normalize"),
        ({"direction": "orthogonal"}, "direction must be .*'orthogonal'"),
        ({"direction": "sign", "fused": True}, "direction='sign'"),
    ],
)
def test_options_that_make_no_sense_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        SGDSaI(fresh(), **options)


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("options", [{}, {"nesterov": True}, {"maximize": True}], ids=str)
def test_signs_are_the_reference(options, foreach):
    params, steps = fresh(), gradients(6)
    steps[0][0] = steps[4][1] = None
    options = {"lr": 0.01, "weight_decay": 0.1, **options}
    slow = [reference.SGDSaI(p, rule=2.0, sign=True, **options) for p in params]
    optimizer = SGDSaI(params, gain=2.0, direction="sign", foreach=foreach, **options)
    for grads in steps:
        train(optimizer, params, [grads])
        for p, each, g in zip(params, slow, grads, strict=True):
            each.step(g)
            torch.testing.assert_close(p.detach().double(), each.p, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stored", [{}, {"momentum_dtype": "int8"}, {"rounding": "kahan"}], ids=str)
def test_signs_in_low_precision_move_by_the_rate_wherever_the_momentum_is_not_zero(stored):
    param = nn.Parameter(torch.zeros(64, 128, dtype=torch.bfloat16))
    optimizer = SGDSaI([param], lr=0.5, weight_decay=0.0, gain=1.0, direction="sign", **stored)
    param.grad = torch.randn(64, 128).bfloat16()
    param.grad[0] = 0.0
    optimizer.step()
    assert torch.equal(param[0], torch.zeros(128, dtype=torch.bfloat16))
    assert (param[1:] == -0.5 * param.grad[1:].sign()).float().mean() > 0.99


def test_large_models_take_the_path_that_has_signs(monkeypatch):
    if cpu_kernel(warn=False) is None:
        pytest.skip("no C++ compiler")
    monkeypatch.setattr("nomadam.optimizers.sgd_sai_fused.SMALLEST_ON_CPU", 1)
    ends = []
    for foreach in (None, True):
        params = fresh()
        optimizer = SGDSaI(params, lr=0.01, gain=1.0, direction="sign", foreach=foreach)
        train(optimizer, params, gradients(3))
        ends.append(params)
    assert all(map(torch.equal, *ends))
