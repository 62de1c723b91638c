"""PyTorch's laws on what an optimizer carries: state dicts, hooks, copies.

The list of all laws, and where each is run, is in ``test_torch_laws.py``.
"""

import io
import pickle
from collections import ChainMap
from copy import deepcopy
from types import MappingProxyType

import pytest
import torch
from torch import nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.testing import assert_close
from torch_cases import INFO, arguments, linear_problem, over_configurations

from nomadam import SGDSaI

EXACT = {"rtol": 0, "atol": 0}


def named_or_not(params, named):
    return [(f"name{i}", param) for i, param in enumerate(params)] if named else list(params)


def train(optimizer, loss, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()


def twins():
    """One problem twice: parameters, twin parameters, and their losses, which begin equal."""
    x = torch.randn(3)
    params = [nn.Parameter(torch.randn(2, 3)), nn.Parameter(torch.randn(2))]
    copies = deepcopy(params)
    losses = [lambda p=p: (p[0].mv(x) + p[1]).square().sum() for p in (params, copies)]
    return params, copies, *losses


def copy_values(source, target):
    with torch.no_grad():
        for one, other in zip(source, target, strict=True):
            other.copy_(one)


def assert_equal(found, expected):
    """Compares states, groups or lists of them, tensor by tensor, to the last bit."""
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype and torch.equal(found, expected)
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert_equal(found[key], value)
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_equal(one, other)
    else:
        assert found == expected


def without_names(state_dict):
    groups = [
        {k: v for k, v in group.items() if k != "param_names"}
        for group in state_dict["param_groups"]
    ]
    return {**state_dict, "param_groups": groups}


over_stored = over_configurations(skip=("differentiable",))


@pytest.mark.parametrize("named_twin", [True, False])
@pytest.mark.parametrize("named", [True, False])
@over_stored
def test_state_dict_is_deterministic(configuration, named, named_twin):
    params, copies, loss, loss_of_twin = twins()
    optimizer = SGDSaI(named_or_not(params, named), **arguments(configuration))
    train(optimizer, loss, 10)
    copy_values(params, copies)
    twin = SGDSaI(named_or_not(copies, named_twin), **arguments(configuration))
    saved = deepcopy(optimizer.state_dict())
    given = deepcopy(saved)
    twin.load_state_dict(given)
    for _ in range(10):
        train(optimizer, loss, 1)
        train(twin, loss_of_twin, 1)
        assert_equal(copies, params)
    assert_equal(given, saved)  # neither loading nor stepping writes into what was given
    assert_equal(without_names(twin.state_dict()), without_names(optimizer.state_dict()))
    twin.param_groups.extend(twin.param_groups)  # repeated parameters keep their numbers
    repeated = without_names(twin.state_dict())["param_groups"][-1]
    assert_equal(repeated, without_names(optimizer.state_dict())["param_groups"][-1])


def convolution_and_norm():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(4, 2, 1, stride=2), nn.BatchNorm2d(2))
    picture = torch.rand(1, 4, 16, 16)
    return model, lambda: (model(picture) - 1).square().mean()


@over_stored
def test_older_state_dict_loads(configuration):
    model, loss = convolution_and_norm()
    optimizer = SGDSaI(model.parameters(), **arguments(configuration))
    train(optimizer, loss, 3)
    continued, gains = deepcopy(optimizer.param_groups), optimizer.gains()
    old = deepcopy(optimizer.state_dict())
    for group in old["param_groups"]:
        for flag in INFO.not_og_supported_flags:
            group.pop(flag, None)
    optimizer.load_state_dict(old)
    for group, before in zip(optimizer.param_groups, continued, strict=True):
        assert group.keys() == before.keys()
        for name in ("gain", "nesterov", "foreach", "normalize", "skip_nonfinite"):
            assert group[name] == before[name]
    assert optimizer.gains() == gains
    train(optimizer, loss, 1)


def test_released_state_dict_loads():
    """Keys of sgd-sai 1.0.3, and its gains, which may be 0; it has no others."""
    params, _, loss, _ = twins()
    momentum = [torch.randn_like(param) for param in params]
    released = {
        "state": {
            0: {"momentum_buffer": momentum[0], "gsnr": torch.tensor(2.5)},
            1: {"momentum_buffer": momentum[1], "gsnr": torch.tensor(0.0)},
        },
        "param_groups": [
            {"lr": 0.05, "momentum": 0.8, "eps": 1e-8, "weight_decay": 0.2, "maximize": False,
             "params": [0, 1]},
        ],
    }  # fmt: skip
    optimizer = SGDSaI(params, nesterov=True)
    optimizer.load_state_dict(released)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.05, 0.8, 0.2)
    assert group["nesterov"] is True and group["gain"] == "gsnr" and optimizer.skipped_steps == 0
    assert optimizer.gains() == {0: 2.5}
    assert_equal(optimizer.state[params[0]]["momentum_buffer"], momentum[0])
    train(optimizer, loss, 1)
    assert optimizer.gains()[0] == 2.5 and optimizer.gains()[1] > 0


@pytest.mark.parametrize("named_twin", [True, False])
@pytest.mark.parametrize("named", [True, False])
@over_stored
def test_named_and_unnamed_state_dicts_load_each_other(configuration, named, named_twin):
    model, loss = convolution_and_norm()
    params = model.named_parameters() if named else model.parameters()
    optimizer = SGDSaI(params, **arguments(configuration))
    train(optimizer, loss, 3)
    params = model.named_parameters() if named_twin else model.parameters()
    twin = SGDSaI(params, **arguments(configuration))
    twin.load_state_dict(deepcopy(optimizer.state_dict()))
    train(twin, loss, 1)
    names = [name for name, _ in model.named_parameters()]
    found = twin.state_dict()["param_groups"][0].get("param_names")
    assert found == (names if named or named_twin else None)
    expected = dict(zip(found or range(4), optimizer.gains().values(), strict=True))
    assert twin.gains() == expected


@pytest.mark.parametrize("named", [True, False])
@over_stored
def test_saved_and_loaded_are_equal(configuration, named):
    params, copies, loss, loss_of_twin = twins()
    optimizer = SGDSaI(named_or_not(params, named), **arguments(configuration))
    train(optimizer, loss, 3)
    saved = optimizer.state_dict()
    for weights_only in (True, False):
        file = io.BytesIO()
        torch.save(saved, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=weights_only)
        assert_equal(loaded, saved)
    copy_values(params, copies)
    twin = SGDSaI(named_or_not(copies, named), **arguments(configuration))
    twin.load_state_dict(loaded)
    train(optimizer, loss, 3)
    train(twin, loss_of_twin, 3)
    assert_equal(copies, params)


@over_stored
def test_gain_that_is_no_tensor_loads(configuration):
    params, _, loss, _ = twins()
    optimizer = SGDSaI(params, **arguments(configuration))
    train(optimizer, loss, 3)
    saved = deepcopy(optimizer.state_dict())
    gains = optimizer.gains()
    for state in saved["state"].values():
        state["gsnr"] = state["gsnr"].item()
    optimizer.load_state_dict(saved)
    assert optimizer.gains() == gains
    train(optimizer, loss, 1)
    state = optimizer.state[params[0]]
    assert isinstance(state["gsnr"], torch.Tensor) and state["gsnr"].dtype == torch.float32


ELSEWHERE = ["meta", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.mark.parametrize("device", ELSEWHERE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@over_stored
def test_state_goes_to_its_parameters_device_and_dtype(configuration, dtype, device):
    params, _, loss, _ = twins()
    optimizer = SGDSaI(params, **arguments(configuration))
    train(optimizer, loss, 3)
    before = deepcopy(optimizer.state_dict())
    given = deepcopy(before)
    moved = [param.detach().to(device, dtype).requires_grad_() for param in params]
    for param in moved:
        param.grad = torch.ones_like(param)
    there = SGDSaI(moved, **arguments(configuration))
    there.load_state_dict(given)
    assert_equal(given, before)
    for param, moved_param in zip(params, moved, strict=True):
        state, moved_state = optimizer.state[param], there.state[moved_param]
        assert moved_state.keys() == state.keys()
        assert moved_state["gsnr"].device.type == "cpu"  # a number of the host's
        assert moved_state["gsnr"].dtype == torch.promote_types(dtype, torch.float32)
        assert moved_state["gsnr"] == state["gsnr"]
        if "momentum_buffer" in state:
            momentum = moved_state["momentum_buffer"]
            assert momentum.device.type == device and momentum.dtype == dtype
            if device != "meta":
                assert_close(momentum.cpu(), state["momentum_buffer"].to(dtype), **EXACT)
    there.step()


def mark(optimizer):
    optimizer.state["mark"] = 1


def unmark(optimizer, state_dict):
    return {**state_dict, "found": state_dict["state"].pop("mark", None)}


@over_configurations()
def test_state_dict_hooks(configuration):
    optimizer = SGDSaI([torch.rand(2, 3)], **arguments(configuration))
    post = optimizer.register_state_dict_post_hook(unmark)
    assert optimizer.state_dict()["found"] is None
    optimizer.register_state_dict_pre_hook(mark)
    saved = optimizer.state_dict()
    assert saved["found"] == 1 and "mark" not in saved["state"]
    post.remove()
    assert optimizer.state_dict()["state"]["mark"] == 1


def write_2e_3(optimizer, state_dict):
    state_dict["param_groups"][0]["lr"] = 2e-3


def replace_by_3e_3(optimizer, state_dict):
    changed = deepcopy(state_dict)
    changed["param_groups"][0]["lr"] = 3e-3
    return changed


@over_configurations()
def test_load_state_dict_pre_hooks_in_order(configuration):
    optimizer = SGDSaI([torch.rand(2, 3)], **arguments(configuration))
    saved = optimizer.state_dict()
    optimizer.register_load_state_dict_pre_hook(write_2e_3)
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == 2e-3
    first = optimizer.register_load_state_dict_pre_hook(replace_by_3e_3, prepend=True)
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == 2e-3
    first.remove()
    optimizer.register_load_state_dict_pre_hook(replace_by_3e_3)
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == 3e-3


@over_configurations(skip=("differentiable",))
def test_load_state_dict_post_hook_sees_the_loaded_state(configuration):
    params, copies, loss, _ = twins()
    optimizer = SGDSaI(params, **arguments(configuration))
    train(optimizer, loss, 2)
    twin = SGDSaI(copies, **arguments(configuration))
    seen = []
    twin.register_load_state_dict_pre_hook(replace_by_3e_3)
    for prepend in (False, True):
        twin.register_load_state_dict_post_hook(
            lambda o: seen.append((o.param_groups[0]["lr"], o.gains(), deepcopy(o.state_dict()))),
            prepend=prepend,
        )
    twin.load_state_dict(optimizer.state_dict())
    for lr, gains, state_dict in seen:
        assert (lr, gains) == (3e-3, optimizer.gains())
        assert_equal(state_dict["state"], optimizer.state_dict()["state"])
    assert len(seen) == 2


@over_configurations()
def test_step_hooks(configuration):
    optimizer = SGDSaI([torch.tensor([[1.0, 1.0]])], **arguments(configuration))
    calls = []
    handles = [
        optimizer.register_step_pre_hook(lambda *_: calls.append("before")),
        optimizer.register_step_post_hook(lambda *_: calls.append("after")),
    ]
    optimizer.step(lambda: calls.append("loss"))
    optimizer.step()
    for handle in handles:
        handle.remove()
    optimizer.step()
    assert calls == ["before", "loss", "after", "before", "after"]


@over_configurations()
def test_step_hooks_of_all_optimizers(configuration):
    params = [torch.tensor([[1.0, 1.0]])]
    optimizer, other = SGDSaI(params, **arguments(configuration)), torch.optim.SGD(params)
    calls = []
    handles = [
        register_optimizer_step_pre_hook(lambda *_: calls.append("all before")),
        register_optimizer_step_post_hook(lambda *_: calls.append("all after")),
    ]
    try:
        for each in (optimizer, other):
            handles.append(each.register_step_pre_hook(lambda *_: calls.append("before")))
            handles.append(each.register_step_post_hook(lambda *_: calls.append("after")))
        for each in (optimizer, other, optimizer):
            each.step()
    finally:
        for handle in handles:
            handle.remove()
    optimizer.step()
    other.step()
    assert calls == ["all before", "before", "after", "all after"] * 3


@pytest.mark.parametrize("copied", ["deepcopy", "pickle"])
@over_stored
def test_deepcopy_and_pickle_go_on_as_the_original(configuration, copied):
    weight, bias, _ = linear_problem()
    model = nn.ParameterList([weight, bias])
    optimizer = SGDSaI(model.parameters(), **arguments(configuration))
    pair = (model, optimizer)
    grads = [[torch.randn_like(p) for p in model] for _ in range(6)]

    def steps(model, optimizer, chosen):
        for grad_of in chosen:
            for param, grad in zip(model, grad_of, strict=True):
                param.grad = grad.clone()
            optimizer.step()

    steps(*pair, grads[:3])
    other = deepcopy(pair) if copied == "deepcopy" else pickle.loads(pickle.dumps(pair))
    public = {name for name in vars(optimizer) if not name.startswith("_")}
    assert {name for name in vars(other[1]) if not name.startswith("_")} == public
    assert other[1].gains() == optimizer.gains()
    steps(*pair, grads[3:])
    steps(*other, grads[3:])
    assert_equal(list(other[0]), list(model))
    assert_equal(other[1].state_dict(), optimizer.state_dict())


@pytest.mark.parametrize("mapping", [dict, MappingProxyType, ChainMap])
def test_optimizer_with_any_mapping_of_gains_can_be_copied(mapping):
    optimizer = SGDSaI([torch.ones(2)], gain=mapping({0: 2.0}))
    for other in (deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        other.param_groups[0]["params"][0].grad = torch.ones(2)
        other.step()
        assert other.gains() == {0: 2.0}
