"""What gradient release is for: one gradient at a time, nothing kept, and a cost that is linear."""

import gc
import sys
import weakref

import pytest
import torch
from released_net import loss_of, pair
from torch import nn

from nomadam import SGDSaI
from nomadam.experiments.resources import optimizer_state_bytes
from nomadam.optimizers.gradient_release import release_gradients


def watch_gradients(model):
    """Bytes of the gradients alive each time that one is complete, wherever they are held."""
    seen, alive = [], []

    def note(param):
        alive.append((weakref.ref(param.grad.untyped_storage()), param.grad.nbytes))
        seen.append(sum(size for storage, size in alive if storage() is not None))

    for param in model.parameters():
        param.register_post_accumulate_grad_hook(note)
    return seen


def test_only_one_gradient_is_held_at_a_time():
    torch.manual_seed(0)
    models = [nn.Sequential(*(nn.Linear(n, n) for n in [40] * 6)) for _ in range(2)]
    peaks = []
    for model, is_released in zip(models, (False, True), strict=True):
        seen = watch_gradients(model)
        optimizer = SGDSaI(model.parameters())
        if is_released:
            release_gradients(model, optimizer)
        for _ in range(3):
            model(torch.randn(5, 40)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        peaks.append(max(seen))
    assert peaks[0] == sum(p.nbytes for p in models[0].parameters())
    assert peaks[1] == max(p.nbytes for p in models[1].parameters())


@pytest.mark.parametrize("removed", [False, True])
def test_nothing_keeps_the_model_alive(removed):
    model, optimizer = pair()[0]
    release = release_gradients(model, optimizer)
    loss_of(model, 1).backward()
    alive = [weakref.ref(each) for each in (model, optimizer, release, model.norm.weight)]
    if removed:
        release.remove()
    del model, optimizer, release
    gc.collect()
    assert [reference() for reference in alive] == [None] * 4


def test_three_bytes_a_parameter_and_the_largest_block():
    model = nn.Sequential(*(nn.Linear(128, 128) for _ in range(4))).to(torch.bfloat16)
    seen = watch_gradients(model)
    optimizer = SGDSaI(model.parameters(), momentum_dtype="int8")
    release_gradients(model, optimizer)
    for _ in range(2):
        model(torch.randn(5, 128, dtype=torch.bfloat16)).square().sum().backward()
    params = list(model.parameters())
    weights = sum(p.nbytes for p in params)
    bytes_held = weights + optimizer_state_bytes(optimizer) + max(seen)
    assert bytes_held <= 3.1 * sum(p.numel() for p in params) + max(p.nbytes for p in params)


def opcodes_of_a_backward(count):
    """Instructions of Python in the backward of a model of so many tensors."""
    params = nn.ParameterList(torch.ones(3) for _ in range(count))
    optimizer = SGDSaI(params.parameters())
    release = release_gradients(params, optimizer)
    counted = 0

    def trace(frame, event, _):
        nonlocal counted
        frame.f_trace_opcodes = True
        counted += event == "opcode"
        return trace

    for traced in (False, True):
        loss = sum(p.square().sum() for p in params)
        before = sys.gettrace()
        sys.settrace(trace if traced else before)
        try:
            loss.backward()
        finally:
            sys.settrace(before)
    release.remove()
    return counted


def test_the_cost_grows_with_the_number_of_tensors_and_not_faster():
    few, many = opcodes_of_a_backward(20), opcodes_of_a_backward(200)
    assert 0 < many < 10.5 * few
