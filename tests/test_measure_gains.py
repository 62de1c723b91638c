"""The gain is what SGDSaI measures at a first step, and measuring it changes nothing."""

import math
import random

import numpy as np
import pytest
import torch
from torch import nn

import nomadam
from nomadam import SGDSaI, measure_gains
from nomadam.diagnostics.gsnr import gains_of


def squares(model, batch):
    return model(batch).square().mean()


def net(*, dropout=0.0):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Dropout(dropout), nn.Linear(5, 1), nn.Linear(1, 1)
    )


def batches_of(count=1, rows=8):
    draw = torch.Generator().manual_seed(1)
    return [torch.randn(rows, 6, generator=draw) for _ in range(count)]


def gains_of_a_step(model, loss_fn, batches, **options):
    """By the optimizer itself, on the mean of the batches' gradients."""
    optimizer = SGDSaI(model.named_parameters(), lr=0.0, **options)
    for batch in batches:
        (loss_fn(model, batch) / len(batches)).backward()
    optimizer.step()
    return optimizer.gains()


def everything(model):
    """All that must be as it was: weights, buffers by value and identity, gradients, modes."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    values = {name: (id(tensor), tensor.detach().clone()) for name, tensor in tensors}
    grads = {name: (p.grad, None if p.grad is None else p.grad.clone()) for name, p in
             model.named_parameters()}  # fmt: skip
    return values, grads, [module.training for module in model.modules()]


def assert_unchanged(model, before):
    values, grads, modes = everything(model)
    for name, (identity, value) in before[0].items():
        assert values[name][0] == identity and torch.equal(values[name][1], value), name
    for name, (held, copy) in before[1].items():
        assert grads[name][0] is held, name
        assert held is None or torch.equal(held, copy), name
    assert modes == before[2]


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("eps", [0.0, 1e-3])
def test_it_is_what_the_optimizer_measures(count, eps):
    batches = batches_of(count)
    # Evaluated: the bias before a batch norm in training has a gradient of rounding errors alone.
    found = measure_gains(net().eval(), squares, batches, eps=eps)
    expected = gains_of_a_step(net().eval(), squares, batches, eps=eps)
    assert found == pytest.approx(expected, rel=1e-5 if count > 1 else 2e-7)
    assert list(found) == list(expected) and len(found) > 4


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_what_the_optimizer_measures(dtype):
    model, batches = net().to(dtype), [batch.to(dtype) for batch in batches_of()]
    found = measure_gains(model, squares, batches)
    assert found == pytest.approx(gains_of_a_step(model, squares, batches), rel=2e-7)


def test_many_batches_in_16_bits_keep_the_later_ones():
    """Added up in bfloat16, all after the first few hundred would be lost."""
    weight = nn.Module()
    weight.w = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    # 600 times (1, 0), then 600 times (0, 1): the mean is (1/2, 1/2), a constant gradient.
    batches = [torch.eye(2, dtype=torch.bfloat16)[i // 600] for i in range(1200)]
    found = measure_gains(weight, lambda model, batch: (model.w * batch).sum(), batches)
    assert found["w"] == 2.0  # the number of elements, for want of any spread


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(training):
    model = net(dropout=0.5).train(training)
    model[3].weight.grad = torch.full_like(model[3].weight, 7.0)
    before, states = everything(model), (random.getstate(), np.random.get_state()[1].copy())
    state = torch.get_rng_state()

    def restless(model, batch):
        random.random(), np.random.rand()
        return squares(model, batch)

    found = measure_gains(model, restless, (batch for batch in batches_of(2)))
    assert "1.weight" in found
    assert_unchanged(model, before)
    assert torch.equal(torch.get_rng_state(), state) and random.getstate() == states[0]
    assert np.array_equal(np.random.get_state()[1], states[1])


def test_it_is_measured_in_the_mode_that_the_model_is_in():
    model = net(dropout=0.5)
    model(batches_of()[0])  # the running statistics are no longer the batch's own
    trained, evaluated = (
        measure_gains(model.train(on), squares, batches_of()) for on in (True, False)
    )
    assert max(abs(trained[name] / evaluated[name] - 1) for name in trained) > 0.05
    assert trained == measure_gains(model.train(), squares, batches_of())  # the same draws again


def test_the_model_is_left_as_it_was_when_the_loss_fails():
    model = net(dropout=0.5)
    before, state = everything(model), torch.get_rng_state()

    def fails(model, batch):
        model(batch)
        raise RuntimeError("out of something")

    with pytest.raises(RuntimeError, match="out of something"):
        measure_gains(model, fails, batches_of())
    assert_unchanged(model, before)
    assert torch.equal(torch.get_rng_state(), state)


def test_shared_buffers_stay_shared_while_it_is_measured():
    model = net()
    model[3].register_buffer("seen", model[1].num_batches_tracked)
    seen = []

    def counts(model, batch):
        loss = squares(model, batch)
        seen.append((model[3].seen.item(), model[1].num_batches_tracked.item()))
        return loss

    measure_gains(model, counts, batches_of(2))
    assert seen == [(1, 1), (2, 2)] and model[3].seen is model[1].num_batches_tracked
    assert model[3].seen.item() == 0


def test_hooks_that_step_do_not_run():
    model = net()
    optimizer = SGDSaI(model.named_parameters())
    nomadam.release_gradients(model, optimizer)
    before = everything(model)
    assert measure_gains(model, squares, batches_of())
    assert_unchanged(model, before)
    assert not optimizer.gains()


def test_it_works_where_gradients_are_off():
    with torch.no_grad():
        off = measure_gains(net(), squares, batches_of())
        assert not torch.is_grad_enabled()
    assert off == measure_gains(net(), squares, batches_of())


def test_frozen_unused_and_silent_blocks_are_left_out():
    model = net()
    model[0].weight.requires_grad_(False)
    model.add_module("unused", nn.Linear(2, 2))  # a Sequential calls it: it is not in the loss
    model.register_parameter("gate", nn.Parameter(torch.zeros(3)))
    model.register_parameter("zero", nn.Parameter(torch.ones(3)))
    model.register_parameter("wild", nn.Parameter(torch.zeros(3)))
    model.register_parameter("empty", nn.Parameter(torch.zeros(0)))

    def loss(model, batch):
        found = squares(model[:5], batch) + (model.zero * 0).sum()
        return found + torch.sqrt(model.wild).sum() + model.empty.sum()

    found = measure_gains(model, loss, batches_of())
    assert {"0.weight", "unused.weight", "gate", "zero", "wild", "empty"}.isdisjoint(found)
    assert {"3.weight", "1.weight", "4.bias"} <= set(found)
    assert not model[0].weight.requires_grad


def test_tied_weights_are_one_block():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(7, 4)
            self.head = nn.Linear(4, 7, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, tokens):
            return self.head(self.embed(tokens))

    torch.manual_seed(0)
    model, batches = Tied(), [torch.tensor([1, 3, 3])]
    found = measure_gains(model, squares, batches)
    assert found == pytest.approx(gains_of_a_step(model, squares, batches), rel=2e-7)
    assert list(found) == ["embed.weight"]


def test_a_block_of_one_element_and_a_constant_gradient():
    model = nn.Linear(3, 1)
    found = measure_gains(model, lambda model, _: model.weight.sum() + model.bias.sum(), [None])
    assert found == {"weight": 3.0, "bias": 1.0}


def test_sparse_and_complex_gradients():
    torch.manual_seed(0)
    sparse = nn.Embedding(9, 4, sparse=True)
    dense = nn.Embedding(9, 4, _weight=sparse.weight.detach().clone())
    tokens = [torch.tensor([1, 1, 5]), torch.tensor([2])]
    assert measure_gains(sparse, squares, tokens) == measure_gains(dense, squares, tokens)
    waves = nn.Module()
    waves.w = nn.Parameter(torch.randn(5, dtype=torch.complex64))
    target = torch.randn(5, dtype=torch.complex64)

    def distance(model, _):
        return (model.w - target).abs().square().sum()

    expected = gains_of_a_step(waves, distance, [None])
    assert measure_gains(waves, distance, [None]) == pytest.approx(expected, rel=2e-7)


def test_the_gain_of_a_gradient_without_a_mean_is_the_root_of_its_size():
    draw = torch.Generator().manual_seed(0)
    gradient = torch.randn(60, 50, generator=draw)
    gradient -= gradient.mean()
    found = gains_of({"w": gradient, "scaled": gradient * 1e-20})
    assert found["w"] == pytest.approx(math.sqrt(60 * 50 - 1), rel=1e-6)
    assert found["scaled"] == pytest.approx(found["w"], rel=1e-6)


@pytest.mark.parametrize(
    ("loss_fn", "batches", "eps", "words"),
    [
        (squares, [], 0.0, "batches is empty"),
        (lambda model, batch: model(batch), batches_of(), 0.0, r"one number.*\(8, 1\)"),
        (lambda model, batch: batch.sum(), batches_of(), 0.0, "depends on no parameter"),
        (squares, batches_of(), -1e-8, "eps.*-1e-08"),
        (squares, batches_of(), math.nan, "eps.*nan"),
    ],
)
def test_what_can_not_be_measured_is_refused(loss_fn, batches, eps, words):
    with pytest.raises(ValueError, match=words):
        measure_gains(net(), loss_fn, batches, eps=eps)


def test_a_frozen_model_is_refused():
    with pytest.raises(ValueError, match="depends on no parameter"):
        measure_gains(net().requires_grad_(False), squares, batches_of())
