"""States of torch's SGD taken over, and SGDSaI's read by it: the same steps afterwards."""

import logging

import pytest
import torch
from torch import nn

import nomadam
import nomadam.numerics.blockwise
from nomadam import SGDSaI

STEPS = 6


def params(dtype=torch.float64):
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in ((8, 16), (16,), (4, 4, 4))]


def step(optimizer, own, number):
    torch.manual_seed(100 + number)
    for param in own:
        param.grad = torch.randn(param.shape, dtype=param.dtype) + 0.1
    optimizer.step()


def copied(own):
    return [nn.Parameter(param.detach().clone()) for param in own]


def close(one, other):
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dampening", [0.0, 0.5, 0.9])
def test_sgd_is_continued(dampening):
    own = params()
    sgd = torch.optim.SGD(own, lr=0.1, momentum=0.9, dampening=dampening)
    for number in range(STEPS):
        step(sgd, own, number)
    ours = copied(own)
    # Steps of an average are shorter by (1 - momentum) / (1 - dampening).
    lr = 0.1 * (1 - dampening) / 0.1
    optimizer = SGDSaI(ours, lr=lr, gain=1.0, weight_decay=0.0)
    optimizer.load_state_dict(sgd.state_dict())
    assert optimizer.param_groups[0]["lr"] == lr
    assert "dampening" not in optimizer.param_groups[0]
    for number in range(STEPS, 2 * STEPS):
        step(sgd, own, number)
        step(optimizer, ours, number)
    close(ours, own)


def test_gains_are_measured_while_the_momentum_goes_on():
    own = params()
    sgd = torch.optim.SGD(own, lr=0.1, momentum=0.9, dampening=0.9)
    for number in range(STEPS):
        step(sgd, own, number)
    ours, fresh = copied(own), copied(own)
    optimizer = SGDSaI(ours, lr=1e-3, weight_decay=0.0)
    optimizer.load_state_dict(sgd.state_dict())
    measured = SGDSaI(fresh, lr=0.0)
    step(measured, fresh, STEPS)
    before = [sgd.state[param]["momentum_buffer"].clone() for param in own]
    step(optimizer, ours, STEPS)
    assert optimizer.gains() == measured.gains()
    for param, start, buffer, gain in zip(
        ours, own, before, optimizer.gains().values(), strict=True
    ):
        expected = buffer.lerp(param.grad, 0.1)
        torch.testing.assert_close(optimizer.state[param]["momentum_buffer"], expected)
        torch.testing.assert_close(param.detach(), start.detach() - 1e-3 * gain * expected)


def test_it_says_what_stays(caplog):
    own = params()
    sgd = torch.optim.SGD(own, lr=0.3, momentum=0.9, weight_decay=5e-4)
    step(sgd, own, 0)
    optimizer = SGDSaI(copied(own), lr=2e-2, weight_decay=0.01)
    with caplog.at_level(logging.WARNING, logger="nomadam"):
        optimizer.load_state_dict(sgd.state_dict())
    assert "lr 0.02 and weight_decay 0.01 stay ours" in caplog.text
    group = optimizer.param_groups[0]
    assert (group["lr"], group["weight_decay"]) == (0.02, 0.01)


def test_sgd_without_momentum_leaves_nothing_to_take():
    own = params()
    sgd = torch.optim.SGD(own, lr=0.3)
    step(sgd, own, 0)
    ours, fresh = copied(own), copied(own)
    optimizer, other = SGDSaI(ours, momentum=0.0), SGDSaI(fresh, momentum=0.0)
    optimizer.load_state_dict(sgd.state_dict())
    for number in range(3):
        step(optimizer, ours, number)
        step(other, fresh, number)
    close(ours, fresh)


def test_eight_bits_take_it_over():
    own = [nn.Parameter(torch.randn(64, 128))]
    sgd = torch.optim.SGD(own, lr=0.1, momentum=0.9)
    for number in range(3):
        step(sgd, own, number)
    ours = copied(own)
    optimizer = SGDSaI(ours, momentum_dtype="int8")
    optimizer.load_state_dict(sgd.state_dict())
    state = optimizer.state[ours[0]]
    found = nomadam.numerics.blockwise.dequantize(
        state["momentum_buffer"], state["momentum_scale"].view(-1)
    )
    expected = 0.1 * sgd.state[own[0]]["momentum_buffer"]
    assert (found - expected).abs().max() < 0.02 * expected.abs().max()


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("named", [False, True])
def test_sgd_reads_ours_and_goes_on(nesterov, named):
    own = params()
    split = [own[:1], own[1:]]
    groups = [
        {"params": [(f"{i}.{j}", p) for j, p in enumerate(part)] if named else part, "lr": lr}
        for i, (part, lr) in enumerate(zip(split, (1e-3, 2e-3), strict=True))
    ]
    optimizer = SGDSaI(groups, weight_decay=0.0, nesterov=nesterov)
    for number in range(STEPS):
        step(optimizer, own, number)
    theirs = copied(own)
    sgd = torch.optim.SGD([{"params": [param]} for param in theirs], lr=1.0)
    sgd.load_state_dict(nomadam.sgd_state_dict(optimizer))
    for number in range(STEPS, 2 * STEPS):
        step(optimizer, own, number)
        step(sgd, theirs, number)
    close(own, theirs)


def test_sgd_can_not_step_along_signs():
    with pytest.raises(ValueError, match="direction='sign'"):
        nomadam.sgd_state_dict(SGDSaI(params(), gain=1.0, direction="sign"))


def test_sgd_can_not_read_eight_bits():
    own = [nn.Parameter(torch.randn(64, 128))]
    optimizer = SGDSaI(own, momentum_dtype="int8")
    step(optimizer, own, 0)
    with pytest.raises(ValueError, match="8 bits"):
        nomadam.sgd_state_dict(optimizer)
