"""Hostile gradients for every row of ``cases.py``, each with what has to come of it."""

from copy import deepcopy

import pytest
import torch
from cases import (
    CASES,
    SGD_SAI,
    after_first_step,
    blocks,
    both_ways,
    equal,
    expected_gains,
    gradients,
    rows,
    run,
    small_model,
    take,
    values,
)
from torch.testing import assert_close

EXACT = {"rtol": 0, "atol": 0}


@rows(CASES)
def test_missing_gradient_leaves_the_block_alone(case):
    model = small_model()
    optimizer = case.build(model)
    params = list(model.parameters())
    before = values(params)
    (grads,) = gradients(params, 1)
    take(optimizer, params, [None, *grads[1:-1], None])
    found = values(params)
    assert equal([found[0], found[-1]], [before[0], before[-1]])
    for old, new in zip(before[1:-1], found[1:-1], strict=True):
        assert not torch.equal(old, new) and new.isfinite().all()


@rows(CASES)
def test_all_zero_gradients_leave_everything_finite_and_able_to_learn(case):
    model = small_model()
    optimizer = case.build(model)
    params = list(model.parameters())
    for _ in range(2):
        take(optimizer, params, [torch.zeros_like(param) for param in params])
    before = values(params)
    for grads in gradients(params, 2):
        take(optimizer, params, grads)
    for old, new in zip(before, values(params), strict=True):
        assert new.isfinite().all() and not torch.equal(old, new)


@both_ways
@rows(SGD_SAI)
def test_zero_gradients_only_decay_and_the_block_starts_later(case, foreach):
    """Also what distributed checkpointing does to make the state: a step of zeros at lr 0."""
    named = blocks(torch.float64)
    params = [param for _, param in named]
    optimizer = case.make(named, foreach=foreach)
    start, (grads,) = values(params), gradients(params, 1)
    zeros = [torch.zeros_like(param) for param in params]
    optimizer.param_groups[0]["lr"] = 0.0
    take(optimizer, params, zeros)
    assert equal(values(params), start) and optimizer.gains() == {}
    for param in params:
        assert optimizer.state[param]["gsnr"] == 0.0
        momentum_buffer = optimizer.state[param].get("momentum_buffer", torch.zeros(()))
        assert not momentum_buffer.any()
    optimizer.param_groups[0]["lr"] = 1e-2
    take(optimizer, params, zeros)
    decayed = [param * (1 - 1e-2 * case.decay) for param in start]
    assert_close(values(params), decayed, rtol=1e-12, atol=1e-15)
    take(optimizer, params, grads)
    gains = expected_gains(case, dict(zip([n for n, _ in named], grads, strict=True)))
    assert optimizer.gains() == pytest.approx(gains, rel=1e-12)
    for (name, param), old, grad in zip(named, decayed, grads, strict=True):
        expected = after_first_step(case, old, grad, gains.get(name, 0.0))
        assert_close(param.detach(), expected, rtol=1e-12, atol=1e-12)


@both_ways
@rows(SGD_SAI)
def test_late_block_starts_as_a_new_one(case, foreach):
    """Late: without gradients at first. The others do not notice."""
    named = blocks()
    params = [param for _, param in named]
    late = 1
    steps = gradients(params, 4)
    optimizer = case.make(named, foreach=foreach)
    for grads in steps[:3]:
        take(optimizer, params, [None if i == late else grad for i, grad in enumerate(grads)])
    name, param = named[late]
    before = param.detach().clone()
    assert torch.equal(before, dict(blocks())[name].detach()) and name not in optimizer.gains()
    largest = max(case.gain(n, g) for (n, _), g in zip(named, steps[0], strict=True)
                  if g.numel() and n != name) if case.normalizes else 1.0  # fmt: skip
    take(optimizer, params, steps[3])
    gain = case.gain(name, steps[3][late]) / largest
    assert optimizer.gains()[name] == pytest.approx(gain, rel=1e-5)
    assert_close(param.detach(), after_first_step(case, before, steps[3][late], gain))


@both_ways
@rows([case for case in SGD_SAI if case.arguments.get("gain") != "mapping"])  # it has no more names
def test_group_that_is_added_later_starts_as_a_new_one(case, foreach):
    named = blocks()
    params = [param for _, param in named]
    optimizer = case.make(named[:2], foreach=foreach)
    steps = gradients(params, 2)
    take(optimizer, params[:2], steps[0][:2])
    optimizer.add_param_group({"params": named[2:]})
    take(optimizer, params, steps[1])
    for (name, param), (_, old), grad in zip(named[2:], blocks()[2:], steps[1][2:], strict=True):
        gain = optimizer.gains().get(name, 0.0)
        assert_close(param.detach(), after_first_step(case, old.detach(), grad, gain))
        assert (gain > 0) == bool(grad.numel())


@rows(SGD_SAI)
def test_gain_is_bounded(case):
    """1 for one element, at most the number of elements for a constant; never not finite."""
    shapes = [(), (1,), (1, 1), (6, 5), (1000,)]
    named = [(str(i), torch.zeros(shape, requires_grad=True)) for i, shape in enumerate(shapes)]
    params = [param for _, param in named]
    for constant in (1.0, -3e-20, 7e19):
        optimizer = case.make(named)
        grads = [torch.full_like(param, constant) for param in params]
        take(optimizer, params, grads)
        firsts = dict(zip([name for name, _ in named], grads, strict=True))
        gains = optimizer.gains()
        assert gains == pytest.approx(expected_gains(case, firsts), rel=1e-6)
        if case.measures and not case.normalizes:
            assert [gains[name] for name in "012"] == [1.0, 1.0, 1.0]
            assert gains["3"] <= 30 and gains["4"] <= 1000


@both_ways
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")], ids=str)
@rows(SGD_SAI)
def test_first_gradient_that_is_not_finite_starts_nothing(case, bad, foreach):
    named = blocks(torch.float64)
    params = [param for _, param in named]
    start, (first, second) = values(params), gradients(params, 2)
    first[0][0, 0] = bad
    optimizer = case.make(named, foreach=foreach)
    take(optimizer, params, first)
    assert torch.equal(params[0].detach(), start[0]) and "matrix" not in optimizer.gains()
    if case.skips:  # nothing at all has happened, but that it is counted
        assert equal(values(params), start) and optimizer.gains() == {}
        assert optimizer.skipped_steps == 1
        momenta = [s["momentum_buffer"] for s in optimizer.state.values()]
        assert not any(momentum_buffer.any() for momentum_buffer in momenta)
        firsts = dict(zip([name for name, _ in named], second, strict=True))
        gain = expected_gains(case, firsts)["matrix"]
    else:
        assert set(optimizer.gains()) == {n for n, p in named if p.numel() and n != "matrix"}
        assert all(new.isfinite().all() for new in values(params))
        others = {n: g for (n, _), g in zip(named, first, strict=True) if n != "matrix"}
        raw = [case.gain(n, g) for n, g in others.items() if g.numel()]
        gain = case.gain("matrix", second[0]) / (max(raw) if case.normalizes else 1.0)
    take(optimizer, params, second)
    assert optimizer.gains()["matrix"] == pytest.approx(gain, rel=1e-12)
    expected = after_first_step(case, start[0], second[0], gain)
    assert_close(params[0].detach(), expected, rtol=1e-12, atol=1e-12)


@both_ways
@rows([case for case in SGD_SAI if case.skips])
def test_skipped_step_in_mid_course_changes_nothing(case, foreach):
    named = blocks()
    params = [param for _, param in named]
    steps = gradients(params, 4)
    optimizer = case.make(named, foreach=foreach)
    for grads in steps[:2]:
        take(optimizer, params, grads)
    before, state = values(params), deepcopy(optimizer.state_dict()["state"])
    spoilt = [grad.clone() for grad in steps[2]]
    spoilt[-1][0, 0] = float("nan")
    take(optimizer, params, spoilt)
    assert equal(values(params), before) and optimizer.skipped_steps == 1
    for index, entries in optimizer.state_dict()["state"].items():
        assert equal(list(entries.values()), list(state[index].values()))
    take(optimizer, params, steps[3])
    plain, expected = run(case, blocks(), [*steps[:2], steps[3]], foreach=foreach)
    assert equal(values(params), list(expected.values())) and optimizer.gains() == plain.gains()


@both_ways
@rows(SGD_SAI)
def test_sparse_gradient_is_refused_before_anything_changes(case, foreach):
    named = [("table", torch.randn(4, 3)), ("matrix", torch.randn(2, 3))]
    params = [param for _, param in named]
    before = values(params)
    optimizer = case.make(named, foreach=foreach)
    params[0].grad, params[1].grad = torch.eye(4, 3).to_sparse(), torch.ones(2, 3)
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    assert equal(values(params), before) and not optimizer.state


@both_ways
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@rows(SGD_SAI)
def test_half_precision_measures_wide_and_does_not_overflow(case, dtype, foreach):
    named = blocks(dtype)
    params = [param for _, param in named]
    optimizer = case.make(named, lr=1e-8, foreach=foreach)
    steps = gradients(params, 3, scale=1e4)  # whose squares are far above what fp16 holds
    for grads in steps:
        take(optimizer, params, grads)
    firsts = dict(zip([name for name, _ in named], steps[0], strict=True))
    assert optimizer.gains() == pytest.approx(expected_gains(case, firsts), rel=1e-5)
    for param in params:
        state = optimizer.state[param]
        assert state["gsnr"].dtype == torch.float32 and param.isfinite().all()
        if "momentum_buffer" in state:
            kept = torch.float32 if dtype == torch.float16 else dtype
            assert state["momentum_buffer"].dtype == kept
            assert state["momentum_buffer"].isfinite().all()


@both_ways
@rows(SGD_SAI)
def test_gradient_that_is_a_lazy_conjugate_is_as_good_as_any(case, foreach):
    """Autograd leaves such gradients behind ``z.conj()``."""
    results = []
    for lazy in (True, False):
        torch.manual_seed(1)
        param = torch.randn(3, dtype=torch.complex64, requires_grad=True)
        optimizer = case.make([("z", param)], foreach=foreach)
        for factor in torch.randn(3, 3, dtype=torch.complex64):
            param.grad = None
            (param.conj() * factor.conj()).sum().abs().backward()
            assert param.grad.is_conj()
            if not lazy:
                param.grad = param.grad.resolve_conj()
            optimizer.step()
        results.append(param.detach())
    assert torch.equal(*results)
