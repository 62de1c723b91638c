"""torch.compile(optimizer.step): equal to eager, and how often it is compiled anew."""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from nomadam import SGDSaI


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def blocks():
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape)) for shape in [(4, 3), (5,), (), (2, 2)]]


def run(lr, rates, options, counter=None, late=None):
    params = blocks()
    optimizer = SGDSaI(params, lr=lr, **options)
    step = torch.compile(optimizer.step, backend=counter) if counter else optimizer.step
    counts = []
    for i, rate in enumerate(rates):
        for j, p in enumerate(params):
            zero = late is not None and j == 1 and i < late
            p.grad = torch.zeros_like(p) if zero else torch.randn_like(p)
        if isinstance(lr, torch.Tensor):
            optimizer.param_groups[0]["lr"].fill_(rate)
        else:
            optimizer.param_groups[0]["lr"] = rate
        step()
        counts.append(counter.frame_count if counter else 0)
    return params, counts


RATES = [0.1, 0.09, 0.08, 0.07, 0.06, 0.05]


OPTIONS = [{}, {"foreach": True}, {"skip_nonfinite": True}, {"refresh": 2}, {"direction": "sign"}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("tensor", [False, True])
def test_recompiles(tensor, options):
    counter = CompileCounter()
    lr = torch.tensor(0.1) if tensor else 0.1
    params, counts = run(lr, RATES, options, counter)
    eager, _ = run(lr.clone() if tensor else lr, RATES, options)
    for a, b in zip(params, eager, strict=True):
        torch.testing.assert_close(a, b)
    first = counts[0]
    assert first >= 1, "nothing was compiled"
    assert counts[-1] <= first if tensor else counts[-1] <= 2 * first
    assert counts[-1] == counts[2]


def test_a_step_that_measures_may_compile_once_more():
    counter = CompileCounter()
    params, counts = run(torch.tensor(0.1), RATES, {}, counter, late=3)
    eager, _ = run(torch.tensor(0.1), RATES, {}, late=3)
    for a, b in zip(params, eager, strict=True):
        torch.testing.assert_close(a, b)
    assert counts[2] == counts[0]
    assert counts[3] <= 2 * counts[0]
    assert counts[-1] == counts[3]


def test_blocks_that_start_one_by_one_do_not_use_up_the_compiler():
    """A run of unrouted experts: each measuring step may not compile anew."""
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(5, 3)) for _ in range(12)]
    optimizer, counter = SGDSaI(params, lr=torch.tensor(0.01)), CompileCounter()
    step = torch.compile(optimizer.step, backend=counter)
    for i in range(14):
        for j, p in enumerate(params):
            p.grad = torch.randn(5, 3) if j <= i else torch.zeros(5, 3)
        step()
    assert counter.frame_count <= 2 and len(optimizer.gains()) == 12
