"""Checkpoints of sharded training: loaded by another number of processes, and back."""

import warnings

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint
from engine_cases import STEPS, alone, net, restore, sharded_net, states, train
from processes import in_processes
from sharded_cases import whole
from torch.distributed.tensor import DTensor

from nomadam import SGDSaI

MIDDLE = 7
OPTIONS = {
    "float32": {},
    "int8": {"momentum_dtype": "int8"},
    "bf16": {"momentum_dtype": torch.bfloat16},
}


def made(kind):
    size = dist.get_world_size() if dist.is_initialized() else 1
    model = sharded_net() if size > 1 else net()
    optimizer = SGDSaI(model.named_parameters(), lr=2e-2, **OPTIONS[kind])
    return model, optimizer, {"rank": dist.get_rank() if size > 1 else 0, "size": size}


def whole_state(model, optimizer):
    """All parameters and states of a training, gathered."""
    found = {}
    for name, param in model.named_parameters():
        found[name] = whole(param.detach()).clone()
        for key, value in optimizer.state[param].items():
            found[f"{name}.{key}"] = whole(value).clone()
    return found


def save(folder, begin_at=None):
    """Train, save, and write down what the whole state is and what comes of it."""
    for kind in OPTIONS:
        save_one(f"{folder}/{kind}", kind, begin_at and f"{begin_at}/{kind}/checkpoint")


def save_one(folder, kind, begin_at):
    model, optimizer, part = made(kind)
    if begin_at is None:
        train(model, optimizer, range(MIDDLE), **part)
    else:
        restore(model, optimizer, begin_at)
    pending = checkpoint.async_save(states(model, optimizer), checkpoint_id=f"{folder}/checkpoint")
    pending.result()
    held = whole_state(model, optimizer)
    train(model, optimizer, range(MIDDLE, STEPS), **part)
    ended = whole_state(model, optimizer)
    if part["rank"] == 0:
        torch.save({"held": held, "ended": ended}, f"{folder}/whole.pt")


def load(folder):
    """What is loaded has the bits of what was saved, and goes on as that did, to rounding."""
    for kind in OPTIONS:
        load_one(f"{folder}/{kind}", kind)


def load_one(folder, kind):
    warnings.simplefilter("ignore")
    model, optimizer, part = made(kind)
    restore(model, optimizer, f"{folder}/checkpoint")
    saved = torch.load(f"{folder}/whole.pt", weights_only=True)
    found = whole_state(model, optimizer)
    assert found.keys() == saved["held"].keys()
    assert ("inner.weight.momentum_scale" in found) == (kind == "int8")
    for name, tensor in found.items():
        assert torch.equal(tensor, saved["held"][name]), name
    train(model, optimizer, range(MIDDLE, STEPS), **part)
    close = 1e-12 if kind == "float32" else 1e-2
    for name, param in model.named_parameters():
        ended = saved["ended"][name]
        torch.testing.assert_close(whole(param.detach()), ended, rtol=close, atol=close)


@pytest.fixture(autouse=True, scope="module")
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def test_saved_by_four_loaded_by_fewer_and_back(tmp_path):
    first, second = tmp_path / "four", tmp_path / "three"
    for kind in OPTIONS:
        (first / kind).mkdir(parents=True)
        (second / kind).mkdir(parents=True)
    in_processes(4, save, str(first))
    in_processes(1, load, str(first))
    in_processes(2, load, str(first))
    in_processes(3, save, str(second), str(first))
    in_processes(4, load, str(second))


def one_for_all(folder):
    """A plain state dict of one process, loaded by each of several."""
    model, optimizer, part = made("float32")
    held = torch.load(f"{folder}/one.pt", weights_only=True)
    whole_model = net()
    whole_model.load_state_dict(held["model"])
    for (_, param), (_, other) in zip(
        model.named_parameters(), whole_model.named_parameters(), strict=True
    ):
        from nomadam.numerics.sharded import local, part_of

        local(param).copy_(part_of(other.detach(), param))
    optimizer.load_state_dict(held["optimizer"])
    assert isinstance(optimizer.state[model.few.weight]["momentum_buffer"], DTensor)
    train(model, optimizer, range(MIDDLE, STEPS), **part)
    reference, _ = alone()
    for (name, param), (_, other) in zip(
        model.named_parameters(), reference.named_parameters(), strict=True
    ):
        torch.testing.assert_close(
            whole(param.detach()), other.detach(), rtol=1e-12, atol=1e-12, msg=name
        )


def test_a_plain_state_of_one_process_is_taken_up_by_three(tmp_path):
    model, optimizer = alone(range(MIDDLE))
    held = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(held, tmp_path / "one.pt")
    with torch.no_grad():
        in_processes(3, one_for_all, str(tmp_path))
