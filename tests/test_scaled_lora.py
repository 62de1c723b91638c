"""The Riemannian preconditioner of LoRA pairs: against a dense solve, and as an optimizer."""

import copy
import io
import sys

import numpy as np
import pytest
import torch
from reference import scaled_lora as reference
from torch import nn

from nomadam.optimizers.baselines import BASELINES, build_optimizer
from nomadam.optimizers.scaled_lora import (
    LoRAPair,
    lora_pairs,
    precondition_lora,
    preconditioned,
)

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")


class Net(nn.Module):
    """A layer of every kind that LoRA knows, and a head that has none."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(11, 6)
        self.linear = nn.Linear(6, 8)
        self.transposed = transformers.pytorch_utils.Conv1D(10, 8)
        self.filters = nn.Conv1d(10, 4, 3, padding=1)
        self.head = nn.Linear(4, 11)

    def forward(self, ids):
        hidden = self.transposed(torch.tanh(self.linear(self.table(ids))))
        return self.head(self.filters(hidden.mT).mT)


TARGETS = ["table", "linear", "transposed", "filters"]


def adapted(targets=TARGETS, rank=3, seed=0, **config):
    torch.manual_seed(seed)
    model = Net()
    config = peft.LoraConfig(r=rank, target_modules=list(targets), fan_in_fan_out=False, **config)
    return peft.get_peft_model(model, config)


def filled(model, seed=1):
    """With factors that are neither zero nor small."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def loss_of(model, seed=2):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(11, (4, 5), generator=generator)
    return nn.functional.cross_entropy(model(ids).flatten(0, 1), (ids.flatten() + 1) % 11)


def close(tensor, array, tolerance=1e-6):
    np.testing.assert_allclose(tensor.double().numpy(), array, rtol=tolerance, atol=tolerance)


# The formula


@pytest.mark.parametrize("delta", [1e-6, 1e-2, 1.0])
@pytest.mark.parametrize(("rank", "inputs", "outputs"), [(1, 3, 5), (4, 7, 6), (8, 40, 3)])
def test_it_is_the_dense_solve(rank, inputs, outputs, delta):
    generator = torch.Generator().manual_seed(rank)
    shapes = ((rank, inputs), (outputs, rank)) * 2
    a, b, grad_a, grad_b = (torch.randn(shape, generator=generator) for shape in shapes)
    kept = [x.clone() for x in (a, b, grad_a, grad_b)]
    found = preconditioned(a, b, grad_a, grad_b, delta=delta)
    for one, other in zip(found, reference.preconditioned(*kept, delta), strict=True):
        scale = np.abs(other).max()
        close(one / scale, other / scale)
    assert all(torch.equal(x, y) for x, y in zip((a, b, grad_a, grad_b), kept, strict=True))


def test_a_direction_that_is_a_ten_thousandth_of_another_is_still_right():
    generator = torch.Generator().manual_seed(0)
    a, grad_a = torch.randn(2, 2, 5, generator=generator)
    b, grad_b = torch.randn(2, 6, 2, generator=generator)
    b[:, 1] = b[:, 0] + 1e-4 * b[:, 1]
    grad_a = b.T @ torch.randn(6, 5, generator=generator)  # as a gradient of A is
    found = preconditioned(a, b, grad_a, grad_b, delta=1e-8)
    for one, other in zip(found, reference.preconditioned(a, b, grad_a, grad_b, 1e-8), strict=True):
        scale = np.abs(other).max()
        close(one / scale, other / scale, 1e-5)


def test_where_b_is_zero_a_does_not_move_and_b_does():
    a, b = torch.randn(2, 4), torch.zeros(3, 2)
    grad_b = torch.ones(3, 2)
    found_a, found_b = preconditioned(a, b, torch.zeros(2, 4), grad_b, delta=1e-6)
    assert not found_a.any() and found_b.isfinite().all() and found_b.any()


def test_the_step_of_the_product_does_not_depend_on_how_it_is_factored():
    """Of W = B A only the product matters: (B S)(S^-1 A) takes the same step, to first order."""
    generator = torch.Generator().manual_seed(3)
    a, b = torch.randn(2, 5, generator=generator), torch.randn(4, 2, generator=generator)
    gradient = torch.randn(4, 5, generator=generator)
    mix = torch.tensor([[3.0, 1.0], [0.0, 0.2]])
    steps = []
    for a_, b_ in ((a, b), (mix.inverse() @ a, b @ mix)):
        step_a, step_b = preconditioned(a_, b_, b_.T @ gradient, gradient @ a_.T, delta=1e-12)
        steps.append(b_ @ step_a + step_b @ a_)
    close(steps[0], steps[1].double().numpy(), 1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_it_is_computed_in_high_precision_and_has_the_gradients_type(dtype):
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 5), (4, 2)) * 2
    parts = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    parts = [part.to(dtype) for part in parts]
    found = preconditioned(*parts, delta=1e-3)
    exact = reference.preconditioned(*(part.double() for part in parts), 1e-3)
    for one, other in zip(found, exact, strict=True):
        assert one.dtype == dtype
        close(one, other, 4 * torch.finfo(dtype).eps * max(1.0, np.abs(other).max()))


# The pairs


def test_pairs_are_those_of_every_kind_of_layer():
    model = adapted()
    base = model.base_model.model
    expected = [
        (base.table.lora_embedding_A["default"], base.table.lora_embedding_B["default"]),
        *(
            (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
            for layer in (base.linear, base.transposed, base.filters)
        ),
    ]
    found = lora_pairs(model)
    assert len(found) == 4
    assert all(f.a is a and f.b is b for f, (a, b) in zip(found, expected, strict=True))


def test_names_do_not_matter():
    class Misleading(nn.Module):
        def __init__(self):
            super().__init__()
            self.lora_A = nn.Linear(4, 4)
            self.lora_B = nn.Linear(4, 4)

    with pytest.raises(ValueError, match="no LoRA layer of peft"):
        lora_pairs(Misleading())
    config = peft.LoraConfig(r=2, target_modules=["lora_B"])
    model = peft.get_peft_model(Misleading(), config)
    (pair,) = lora_pairs(model)
    assert pair.a is model.base_model.model.lora_B.lora_A["default"].weight


def test_frozen_adapters_are_left_out():
    model = adapted(["linear", "filters"])
    for parameter in model.base_model.model.linear.parameters():
        parameter.requires_grad_(False)
    assert len(lora_pairs(model)) == 1
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="that trains"):
        lora_pairs(model)


def test_a_second_adapter_has_pairs_of_its_own():
    model = adapted(["linear"])
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["linear"]))
    assert len(lora_pairs(model)) == 1  # the new one does not train yet
    model.set_adapter("other")
    (pair,) = lora_pairs(model)
    assert pair.a.shape[0] == 2


# As an optimizer


@pytest.mark.parametrize("kind", ["sgd", "momentum", "adamw", "rmsprop"])
def test_any_optimizer_takes_the_step_of_the_dense_solve(kind):
    make = {
        "sgd": lambda p: torch.optim.SGD(p, 0.1),
        "momentum": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1),
        "adamw": lambda p: torch.optim.AdamW(p, 0.01),
        "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01),
    }[kind]
    model = filled(adapted(modules_to_save=["head"]))
    other = copy.deepcopy(model)
    trained = [[p for p in m.parameters() if p.requires_grad] for m in (model, other)]
    optimizer = precondition_lora(make(trained[0]), lora_pairs(model), delta=1e-3)
    plain = make(trained[1])
    for step in range(3):
        loss_of(model, step).backward()
        loss_of(other, step).backward()
        for a, b in lora_pairs(other):
            solved = reference.preconditioned(a, b, a.grad, b.grad, 1e-3)
            a.grad, b.grad = (torch.from_numpy(x).to(a.dtype) for x in solved)
        raw = [parameter.grad.clone() for parameter in trained[0]]
        optimizer.step()
        plain.step()
        assert all(torch.equal(p.grad, g) for p, g in zip(trained[0], raw, strict=True))
        for one, two in zip(*trained, strict=True):
            close(one.detach(), two.detach().double().numpy(), 1e-4)
        optimizer.zero_grad()
        plain.zero_grad()


def test_a_side_that_is_frozen_or_has_no_gradient_is_left_alone():
    model = filled(adapted(["linear"]))
    (pair,) = lora_pairs(model)
    pair.a.requires_grad_(False)
    before = pair.a.clone()
    optimizer = precondition_lora(torch.optim.SGD([pair.b], 0.1), lora_pairs(model))
    loss_of(model).backward()
    _, expected = reference.preconditioned(pair.a, pair.b, pair.a, pair.b.grad, 1e-6)
    start = pair.b.detach().clone()
    optimizer.step()
    assert torch.equal(pair.a, before) and pair.a.grad is None
    close(pair.b.detach(), start.double().numpy() - 0.1 * expected, 1e-4)


def test_a_closure_and_a_delta_of_zero_are_refused():
    model = filled(adapted(["linear"]))
    optimizer = build_optimizer("scaled_sgd", model, lr=0.1, weight_decay=0.0)
    for call in (lambda: optimizer.step(lambda: 0.0), lambda: optimizer.step(closure=lambda: 0.0)):
        with pytest.raises(ValueError, match="closure"):
            call()
    pair = LoRAPair(nn.Parameter(torch.eye(2)), nn.Parameter(torch.eye(2)))
    for delta in (0.0, -1.0, float("nan"), "1e-6"):
        with pytest.raises(ValueError, match="delta must be"):
            precondition_lora(torch.optim.SGD(pair, 0.1), [pair], delta=delta)


def test_not_finite_gradients_stay_visible():
    model = filled(adapted(["linear"]))
    optimizer = build_optimizer("scaled_sgd", model, lr=0.1, weight_decay=0.0)
    (pair,) = lora_pairs(model)
    loss_of(model).backward()
    pair.a.grad[0, 0] = float("nan")
    optimizer.step()
    assert pair.a.isnan().any() and pair.b.isfinite().all()


# The rows of the table


@pytest.mark.parametrize("name", ["scaled_sgd", "scaled_adamw"])
def test_a_row_learns_from_the_start_at_zero(name):
    model = adapted(modules_to_save=["head"])
    optimizer = build_optimizer(name, model, lr=3e-2, weight_decay=0.01, delta=1e-2)
    before, first = [pair.a.clone() for pair in lora_pairs(model)], loss_of(model).item()
    for _ in range(30):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
    assert loss_of(model).item() < first - 0.1
    after = [pair.a for pair in lora_pairs(model)]
    assert all(not torch.equal(one, two) for one, two in zip(before, after, strict=True))


@pytest.mark.parametrize("name", ["scaled_sgd", "scaled_adamw"])
def test_a_row_goes_on_exactly_and_tells_its_state(name):
    arguments = {"momentum": 0.9} if name == "scaled_sgd" else {}
    model = filled(adapted())

    def steps(model, optimizer, seeds):
        for seed in seeds:
            optimizer.zero_grad()
            loss_of(model, seed).backward()
            optimizer.step()

    optimizer = build_optimizer(name, model, lr=1e-3, weight_decay=0.1, **arguments)
    steps(model, optimizer, range(3))
    tensors = [t for entry in optimizer.state.values() for t in entry.values() if t.ndim]
    counted = sum(t.numel() * t.element_size() for t in tensors)
    assert counted == BASELINES[name].state_bytes(model, **arguments)
    file, other = io.BytesIO(), copy.deepcopy(model)
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    resumed = build_optimizer(name, other, lr=1.0, weight_decay=0.0, **arguments)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    steps(model, optimizer, range(3, 6))
    steps(other, resumed, range(3, 6))
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("name", ["scaled_sgd", "scaled_adamw"])
def test_a_row_refuses_a_model_without_lora(name):
    with pytest.raises(ValueError, match="no LoRA layer of peft that trains, which scaled_sgd"):
        build_optimizer(name, Net(), lr=0.1, weight_decay=0.0)


def test_without_peft_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft.tuners.lora", None)
    with pytest.raises(ImportError, match=r"nomadam\[lab\]"):
        build_optimizer("scaled_sgd", Net(), lr=0.1, weight_decay=0.0)


def test_the_released_measurement_waits_for_a_gradient_of_a():
    """B starts at zero, so A has no gradient at first: SGDSaI measures it when it comes."""
    model = adapted()
    optimizer = build_optimizer("sgd_sai", model, lr=1e-2, weight_decay=0.0)
    before = [pair.a.clone() for pair in lora_pairs(model)]
    gains = []
    for step in range(4):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
        gains.append(dict(optimizer.gains()))
    of_a = [
        n for n, p in model.named_parameters() if any(p is pair.a for pair in lora_pairs(model))
    ]
    of_a = of_a[1:]  # of an embedding it is A that starts at zero, and B that waits
    assert len(of_a) == 3 and not set(of_a) & set(gains[0]) and set(of_a) <= set(gains[1])
    assert all(0 < gains[3][name] < 1e3 and gains[3][name] == gains[1][name] for name in of_a)
    for (a, _), start in zip(lora_pairs(model), before, strict=True):
        assert not torch.equal(a, start)
