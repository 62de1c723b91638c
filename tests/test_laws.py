"""The laws of the house: what every row of ``cases.py`` obeys, for ordinary gradients."""

import io
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


def assert_same_run(one, other, **tolerance):
    (optimizer, params), (other_optimizer, other_params) = one, other
    assert params.keys() == other_params.keys()
    for name, param in params.items():
        assert_close(other_params[name], param, **tolerance)
    gains, other_gains = optimizer.gains(), other_optimizer.gains()
    assert gains.keys() == other_gains.keys()
    for name, gain in gains.items():
        assert other_gains[name] == pytest.approx(gain, rel=tolerance.get("rtol", 1e-6))


@rows([case for case in CASES if case.keeps_gradients])
def test_step_keeps_the_gradient(case):
    model = small_model()
    optimizer = case.build(model)
    params = list(model.parameters())
    for grads in gradients(params, 3):
        take(optimizer, params, grads)
        assert equal([param.grad for param in params], grads)


@both_ways
@rows(SGD_SAI)
def test_first_step_is_the_formula(case, foreach):
    named = blocks(torch.float64)
    params = [param for _, param in named]
    before, (grads,) = values(params), gradients(params, 1)
    optimizer = case.make(named, foreach=foreach)
    take(optimizer, params, grads)
    firsts = dict(zip([name for name, _ in named], grads, strict=True))
    gains = expected_gains(case, firsts)
    assert optimizer.gains() == pytest.approx(gains, rel=1e-12)
    for (name, param), start, grad in zip(named, before, grads, strict=True):
        expected = after_first_step(case, start, grad, gains.get(name, 0.0))
        assert_close(param.detach(), expected, rtol=1e-12, atol=1e-12)


@rows(CASES)
def test_save_load_continue_is_bit_identical(case):
    model = small_model()
    params = list(model.parameters())
    optimizer = case.build(model)
    before, after = gradients(params, 3), gradients(params, 3, seed=2, scale=37.0)
    for grads in before:
        take(optimizer, params, grads)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    resumed_model = deepcopy(model)
    for grads in after:
        take(optimizer, params, grads)
    file.seek(0)
    resumed = case.build(resumed_model)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for grads in after:
        take(resumed, list(resumed_model.parameters()), grads)
    assert equal(values(resumed_model.parameters()), values(params))


@both_ways
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str
)
@rows(SGD_SAI)
def test_resume_is_bit_identical_for_blocks_of_every_kind(case, dtype, foreach):
    """One block is not measured yet when the state is saved."""
    named = blocks(dtype)
    params = [param for _, param in named]
    optimizer = case.make(named, lr=1e-3, foreach=foreach)
    for grads in gradients(params, 3):
        take(optimizer, params, [None, *grads[1:]])
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    resumed_named = [(name, param.detach().clone().requires_grad_()) for name, param in named]
    file.seek(0)
    resumed = case.make(resumed_named, lr=1.0, foreach=foreach)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for grads in gradients(params, 3, seed=2, scale=29.0):
        take(optimizer, params, grads)
        take(resumed, [param for _, param in resumed_named], grads)
    assert equal(values(param for _, param in resumed_named), values(params))
    assert resumed.gains() == optimizer.gains() and len(resumed.gains()) == len(params) - 1


@rows([case for case in SGD_SAI if "eps" not in case.arguments])
def test_gain_is_free_of_the_gradients_scale(case):
    named = blocks(torch.float64)
    (grads,) = gradients([param for _, param in named], 1)

    def gains(scale, dtype):
        fresh = blocks(dtype)
        scaled = [(grad.to(dtype) * scale).to(dtype) for grad in grads]
        return run(case, fresh, [scaled], lr=0.0)[0].gains()

    for dtype in (torch.float32, torch.float64):
        plain = gains(1.0, dtype)
        assert len(plain) == len(named) - 1
        for power in (-60, -24, -1, 1, 7, 60):
            assert gains(2.0**power, dtype) == plain
        for scale in (1e-20, 3e-9, 0.7, 1e3, 1e20):
            assert gains(scale, dtype) == pytest.approx(plain, rel=1e-6)


@rows(SGD_SAI)
def test_lr_of_0_measures_and_moves_nothing(case):
    named = blocks()
    params = [param for _, param in named]
    (grads,) = gradients(params, 1)
    optimizer, after = run(case, named, [grads], lr=0.0)
    assert equal(list(after.values()), values(param for _, param in blocks()))
    firsts = dict(zip(after, grads, strict=True))
    assert optimizer.gains() == pytest.approx(expected_gains(case, firsts), rel=1e-5)


@rows(SGD_SAI)
def test_order_and_layout_of_entries_leave_the_gain(case):
    grad = torch.randn(48, 36) + 0.2
    shuffled = grad.flatten()[torch.randperm(grad.numel())]
    forms = [grad, grad.t(), grad.t().contiguous(), grad.flip(0), shuffled, grad.view(6, 8, 36)]
    forms.append(torch.stack([grad, grad], -1)[..., 0])
    found = []
    for form in forms:
        param = torch.zeros_like(form, requires_grad=True)
        optimizer = case.make([("block", param)])
        take(optimizer, [param], [form])
        found.append(optimizer.gains()["block"])
    assert found == pytest.approx([found[0]] * len(forms), rel=1e-6)


@both_ways
@rows(SGD_SAI)
def test_strides_change_nothing(case, foreach):
    named = blocks()
    steps = gradients([param for _, param in named], 4)
    tidy = [(n, p.detach().clone(memory_format=torch.contiguous_format)) for n, p in named]
    tidy_run = run(case, tidy, steps, foreach=foreach)
    assert_same_run(run(case, named, steps, foreach=foreach), tidy_run, rtol=2e-6, atol=1e-7)


@both_ways
@rows(SGD_SAI)
def test_groups_change_nothing(case, foreach):
    named = blocks()
    steps = gradients([param for _, param in named], 4)
    one = run(case, named, steps, foreach=foreach)
    fresh = blocks()
    groups = [{"params": fresh[:1]}, {"params": fresh[1:4]}, {"params": fresh[4:]}]
    optimizer = case.make(groups, foreach=foreach)
    for grads in steps:
        take(optimizer, [param for _, param in fresh], grads)
    split = optimizer, {name: param.detach() for name, param in fresh}
    assert_same_run(one, split, **EXACT)


@both_ways
@rows(SGD_SAI)
def test_order_of_parameters_changes_nothing(case, foreach):
    named, reverse = blocks(), blocks()[::-1]
    steps = gradients([param for _, param in named], 4)
    one = run(case, named, steps, foreach=foreach)
    other = run(case, reverse, [grads[::-1] for grads in steps], foreach=foreach)
    assert_same_run(one, (other[0], {name: other[1][name] for name in one[1]}), **EXACT)


@rows(SGD_SAI)
def test_foreach_equals_forloop_block_by_block(case):
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        named = blocks(dtype)
        steps = gradients([param for _, param in named], 5)
        loop = run(case, named, steps, foreach=False)
        assert_same_run(loop, run(case, blocks(dtype), steps, foreach=True))


@rows([case for case in CASES if case.has_foreach])
def test_foreach_equals_forloop(case):
    results = []
    for foreach in (False, True):
        model = small_model()
        params = list(model.parameters())
        optimizer = case.build(model, foreach=foreach)
        for grads in gradients(params, 4):
            take(optimizer, params, grads)
        results.append(values(params))
    assert_close(*results)


@rows(SGD_SAI)
def test_ascent_is_descent_along_the_opposite_gradient(case):
    named = blocks()
    steps = gradients([param for _, param in named], 4)
    opposite = [[-grad for grad in grads] for grads in steps]
    maximize = case.arguments.get("maximize", False)
    one = run(case, named, steps, maximize=maximize)
    assert_same_run(one, run(case, blocks(), opposite, maximize=not maximize), **EXACT)


@rows(CASES)
def test_misspelt_argument_is_a_type_error(case):
    with pytest.raises(TypeError, match="momentun"):
        case.build(small_model(), momentun=0.9)
    if case.blockwise:
        with pytest.raises(TypeError, match="momentun"):
            case.make(blocks(), momentun=0.9)


@rows([case for case in CASES if case.keeps_gradients])
def test_accumulated_gradients_are_one_gradient(case):
    tokens, results = torch.arange(8), []
    for num_parts in (1, 4):
        model = small_model()
        optimizer = case.build(model)
        for _ in range(2):
            optimizer.zero_grad()
            for part in tokens.chunk(num_parts):
                (1e-2 * model(part).square().sum()).backward()
            optimizer.step()
        results.append(values(model.parameters()))
    assert_close(*results, rtol=1e-4, atol=1e-5)
