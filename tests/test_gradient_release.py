"""Gradient release: the ordinary step, bit for bit, in all that a training can ask of it."""

import copy
import pickle
import warnings

import pytest
import torch
from released_net import (
    Net,
    assert_same,
    assert_same_training,
    gradients,
    groups,
    loss_of,
    names,
    net,
    ordinary,
    pair,
    released,
)
from torch import nn

from nomadam import SGDSaI
from nomadam.optimizers.gradient_release import release_gradients

CASES = {
    "plain": {},
    "no momentum": {"momentum": 0.0},
    "nesterov": {"nesterov": True, "lr": torch.tensor(1e-2)},
    "maximize": {"maximize": True, "eps": 1e-8},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
    "sqrt_numel": {"gain": "sqrt_numel"},
    "refresh": {"refresh": 2},
    "sign": {"direction": "sign", "gain": 0.1},
    "mapping": {"gain": dict.fromkeys(names(Net()), 3.0)},
    "bf16": {"dtype": torch.bfloat16},
    "bf16 kahan": {"dtype": torch.bfloat16, "rounding": "kahan"},
    "bf16 int8": {"dtype": torch.bfloat16, "momentum_dtype": "int8", "seed": 7},
    "int8": {"momentum_dtype": "int8"},
    "fp16": {"dtype": torch.float16},
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_the_ordinary_step_bit_for_bit(case):
    one, two = pair(**CASES[case])
    release = release_gradients(*two)
    for step in range(6):
        # An expert that is routed in the first micro-batch only, one from the fourth step on.
        losses = [
            lambda model, number=10 * step + micro, expert=expert: loss_of(model, number, expert)
            for micro, expert in enumerate((2 if step > 2 else 1, 0, 0)[: 1 + step % 3])
        ]
        ordinary(*one, *losses)
        released(release, two[0], *losses)
        assert not gradients(two[0])
        two[1].step()
        two[1].zero_grad()
        assert_same_training(one, two)
    assert len(two[1].gains()) == 6 + 2 * 2
    assert two[0].embedding.weight.ne(net().embedding.weight).any()


def test_groups_and_rates_that_change_between_backwards():
    one, two = ((m, SGDSaI(groups(m), lr=1e-2)) for m in (net(), net()))
    release_gradients(*two)
    for step in range(4):
        for _, optimizer in (one, two):
            optimizer.param_groups[0]["lr"] = 1e-2 / (step + 1)
            optimizer.param_groups[1]["momentum"] = 0.5 + step / 10
        ordinary(*one, lambda m: loss_of(m, 1))
        loss_of(two[0], 1).backward()
        assert_same_training(one, two)


def test_a_backward_is_one_step_and_accumulation_none():
    model, optimizer = pair(momentum_dtype="int8")[0]
    release = release_gradients(model, optimizer)
    before = copy.deepcopy(model.state_dict())
    with release.accumulate():
        loss_of(model, 1).backward()
        with release.accumulate():
            loss_of(model, 2).backward()
        loss_of(model, 3).backward()
    held = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert optimizer.step() is None
    optimizer.zero_grad()
    assert_same(dict(model.state_dict()), dict(before))
    assert optimizer.param_groups[0]["rounding_step"] == 0
    assert len(held) == 6
    for name, p in model.named_parameters():
        assert name not in held or torch.equal(p.grad, held[name])
    for _ in range(3):
        loss_of(model, 4).backward()
        optimizer.step()
    assert optimizer.param_groups[0]["rounding_step"] == 3
    assert optimizer.state_dict()["param_groups"][0]["rounding_step"] == 3


def test_accumulation_ends_with_an_error_too():
    model, optimizer = pair()[0]
    release = release_gradients(model, optimizer)
    with pytest.raises(ZeroDivisionError), release.accumulate():
        loss_of(model, 1).backward()
        raise ZeroDivisionError
    assert gradients(model)
    model.zero_grad()
    loss_of(model, 1).backward()
    assert not gradients(model) and len(optimizer.gains()) > 0


def test_a_closure_is_evaluated_once():
    one, two = pair()
    release_gradients(*two)
    for step in range(3):
        ordinary(*one, lambda m, n=step: loss_of(m, n))
        losses = []

        def closure(n=step, losses=losses):
            two[1].zero_grad()
            losses.append(loss_of(two[0], n))
            losses[-1].backward()
            return losses[-1]

        assert two[1].step(closure) is losses[0] and len(losses) == 1
        assert_same_training(one, two)


@pytest.mark.parametrize("called", [False, True], ids=["step() left out", "step() called"])
@pytest.mark.parametrize("before", [False, True], ids=["after", "before"])
def test_schedulers_follow_and_do_not_complain(before, called):
    one, two = pair(lr=1e-2)
    release = None if before else release_gradients(*two)
    schedulers = [torch.optim.lr_scheduler.StepLR(o, 2, gamma=0.3) for _, o in (one, two)]
    if release is None:
        release = release_gradients(*two)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(6):
            if step == 4:
                release.remove()
            ordinary(*one, lambda m, n=step: loss_of(m, n))
            loss_of(two[0], step).backward()
            if called or step >= 4:
                two[1].step()
                two[1].zero_grad()
            for scheduler in schedulers:
                scheduler.step()
            assert_same_training(one, two)
    assert two[1].param_groups[0]["lr"] == pytest.approx(1e-2 * 0.3**3)


def test_step_hooks_run_when_step_is_called():
    model, optimizer = pair()[0]
    called = []
    optimizer.register_step_post_hook(lambda *_: called.append("post"))
    release_gradients(model, optimizer)
    loss_of(model, 1).backward()
    assert called == []
    optimizer.step()
    assert called == ["post"]


def test_removed_everything_is_as_before():
    one, two = pair()
    attributes = set(vars(two[1]))
    with release_gradients(*two) as release:
        loss_of(two[0], 1).backward()
        with release.accumulate():
            loss_of(two[0], 2).backward()
    held = gradients(two[0])
    release.remove()
    ordinary(*one, lambda m: loss_of(m, 1))
    loss_of(one[0], 2).backward()
    loss_of(two[0], 3).backward()
    loss_of(one[0], 3).backward()
    assert gradients(two[0]) == held == gradients(one[0])
    for _, optimizer in (one, two):
        optimizer.step()
        optimizer.zero_grad()
    assert_same_training(one, two)
    assert not gradients(two[0])
    assert all(not p._post_accumulate_grad_hooks for p in two[0].parameters())
    assert not two[1]._optimizer_step_pre_hooks
    assert set(vars(two[1])) - attributes == {"_opt_called"}
    release_gradients(*two).remove()


def test_parameters_of_others_are_left_alone():
    model = net()
    optimizer = SGDSaI([p for name, p in model.named_parameters() if name.startswith("exp")])
    before = copy.deepcopy(model.state_dict())
    release_gradients(model, optimizer)
    loss_of(model, 1).backward()
    assert gradients(model) == {"embedding.weight", "norm.weight", "norm.bias", "gate"}
    changed = {name for name, t in model.state_dict().items() if t.ne(before[name]).any()}
    assert changed == {"experts.0.weight", "experts.0.bias"}


def test_two_optimizers_share_a_model_and_two_models_an_optimizer():
    models = [nn.ModuleList([net(), net()]) for _ in range(2)]
    both = [SGDSaI(m.parameters()) for m in models]
    release = release_gradients(models[1], both[1])
    for first, second in ((0, 1), (1, 0)):
        ordinary(models[0], both[0], lambda m, i=first: loss_of(m[i], 3))
        loss_of(models[1][first], 3).backward()
        ordinary(models[0], both[0], lambda m, i=second: loss_of(m[0], 5) + loss_of(m[1], 4))
        (loss_of(models[1][0], 5) + loss_of(models[1][1], 4)).backward()
    assert_same_training((models[0], both[0]), (models[1], both[1]))
    release.remove()

    one, two = net(), net()
    split = [[SGDSaI([group], lr=1e-2) for group in groups(m)] for m in (one, two)]
    for optimizer in split[1]:
        release_gradients(two, optimizer)
    for step in range(3):
        loss_of(one, step).backward()
        for optimizer in split[0]:
            optimizer.step()
            optimizer.zero_grad()
        loss_of(two, step).backward()
        for ours, theirs in zip(*split, strict=True):
            assert_same_training((one, ours), (two, theirs))


def test_frozen_and_thawed_parameters():
    one, two = pair()
    release_gradients(*two)
    assert not two[0].scale.requires_grad
    for step in range(6):
        for model in (one[0], two[0]):
            model.scale.requires_grad_(step >= 2)
            model.embedding.requires_grad_(step < 4)
        ordinary(*one, lambda m, n=step: loss_of(m, n))
        loss_of(two[0], step).backward()
        assert_same_training(one, two)
    assert "scale" in two[1].gains()


@pytest.mark.parametrize("frozen", [False, True])
def test_a_group_that_is_added_later(frozen):
    one, two = [
        (m, SGDSaI([(n, p) for n, p in m.named_parameters() if "exp" not in n]))
        for m in (net(), net())
    ]
    release_gradients(*two)
    for step in range(4):
        if step == 2:
            for model, optimizer in (one, two):
                new = [(n, p) for n, p in model.named_parameters() if "exp" in n]
                model.zero_grad()
                model.requires_grad_(not frozen)
                model.experts.requires_grad_(True)
                optimizer.add_param_group({"params": new, "lr": 1e-3})
        ordinary(*one, lambda m, n=step: loss_of(m, n))
        loss_of(two[0], step).backward()
        for model in (one[0], two[0]):
            if step < 2:
                model.experts.zero_grad()
        assert_same_training(one, two)
    assert not gradients(two[0]) and len(two[1].gains()) == (6 if frozen else 7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_that_is_saved_and_loaded_in_mid_course(dtype):
    options = {"dtype": dtype, "momentum_dtype": "int8"}
    one, two = pair(**options)
    three = pair(**options)[0]
    release = release_gradients(*two)
    for step in range(6):
        if step == 3:
            three[0].load_state_dict(copy.deepcopy(two[0].state_dict()))
            later = release_gradients(*three)
            three[1].load_state_dict(copy.deepcopy(two[1].state_dict()))
            two, release = three, later
        losses = [lambda m, n=n: loss_of(m, n, n % 2) for n in (2 * step + 1, 2 * step)]
        ordinary(*one, *losses)
        released(release, two[0], *losses)
    assert_same_training(one, two)


def test_copies_of_optimizer_and_model_are_ordinary():
    model, optimizer = pair()[0]
    release_gradients(model, optimizer)
    loss_of(model, 1).backward()
    for copied in (copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))):
        other, its = copied((model, optimizer))
        assert_same_training((other, its), (model, optimizer))
        before = copy.deepcopy(other.state_dict())
        loss_of(other, 2).backward()
        assert gradients(other)
        assert_same(dict(other.state_dict()), dict(before))
        its.step()
        assert other.gate.ne(before["gate"])
        its.zero_grad()
        assert not gradients(other)


def test_autograd_grad_takes_no_step():
    model, optimizer = pair()[0]
    before = copy.deepcopy(model.state_dict())
    release_gradients(model, optimizer)
    found = torch.autograd.grad(loss_of(model, 1), [model.gate, model.norm.weight])
    assert found[1].any() and not gradients(model) and not optimizer.state
    assert_same(dict(model.state_dict()), dict(before))


def test_a_backward_into_chosen_inputs_steps_these():
    one, two = pair()
    release_gradients(*two)
    for model, _ in (one, two):
        loss_of(model, 1).backward(inputs=[model.gate, model.norm.weight])
    one[1].step()
    assert_same_training(one, two)
    assert set(two[1].gains()) == {"gate", "norm.weight"}


def test_a_gradient_penalty_within_accumulation():
    def penalty(model):
        loss = loss_of(model, 1)
        (slope,) = torch.autograd.grad(loss, [model.norm.weight], create_graph=True)
        return loss + slope.square().sum()

    one, two = pair()
    release = release_gradients(*two)
    ordinary(*one, penalty, penalty)
    released(release, two[0], penalty, penalty)
    assert_same_training(one, two)


def test_a_compiled_model():
    torch._dynamo.reset()
    one, two = pair()
    release = release_gradients(*two)
    compiled = [torch.compile(m, backend="aot_eager") for m, _ in (one, two)]
    for step in range(3):
        losses = [lambda m, n=n: loss_of(m, n) for n in (2 * step + 1, 2 * step)]
        ordinary(compiled[0], one[1], *losses)
        released(release, compiled[1], *losses)
        assert_same_training(one, two)
    release.remove()
    release_gradients(compiled[1], two[1]).remove()


def test_autocast_changes_nothing():
    one, two = pair()
    release_gradients(*two)
    for step in range(3):
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(one[0], step)
        loss.backward()
        one[1].step()
        one[1].zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss_of(two[0], step).backward()
        assert_same_training(one, two)


def test_gradients_that_are_there_already_count():
    one, two = pair()
    for model, _ in (one, two):
        loss_of(model, 1, expert=2).backward()
    release_gradients(*two)
    loss_of(one[0], 2).backward()
    loss_of(two[0], 2).backward()
    one[1].step()
    assert_same_training(one, two)
    assert not gradients(two[0])


def test_gains_are_measured_alike_one_by_one_and_together(monkeypatch):
    """The compiled measure is chosen by the whole optimizer, not by what a call is handed."""
    monkeypatch.setattr("nomadam.numerics.moments.SMALLEST_COMPILED", 10_000)
    gains = []
    for within in (False, True):
        torch.manual_seed(0)
        blocks = torch.nn.ParameterList([torch.nn.Parameter(torch.randn(2000)) for _ in range(30)])
        optimizer = SGDSaI(blocks.parameters())
        if within:
            release_gradients(blocks, optimizer)
        sum((p * torch.randn(2000)).sum() + i * p.sum() for i, p in enumerate(blocks)).backward()
        optimizer.step()
        gains.append(optimizer.gains())
    assert gains[0] == gains[1]
