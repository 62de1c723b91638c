"""Save, load, continue: bit for bit, in every dtype, through every door."""

import copy
import io
import math
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from nomadam import SGDSaI


def model(dtype=torch.float32):
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def train(net, optimizer, steps, seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for p in net.parameters():
            p.grad = (torch.randn(p.shape, generator=generator) * scale).to(p.dtype)
        optimizer.step()


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


OPTIONS = [
    {},
    {"momentum": 0.0},
    {"normalize": True},
    {"nesterov": True, "skip_nonfinite": True},
    {"gain": "sqrt_numel", "foreach": True},
    {"lr": torch.tensor(3e-3)},
]


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_resumed_is_never_having_stopped(options, dtype, named):
    def params(net):
        return net.named_parameters() if named else net.parameters()

    whole = model(dtype)
    first = SGDSaI(params(whole), **options)
    train(whole, first, 5, seed=1)
    resumed = copy.deepcopy(whole)
    second = SGDSaI(params(resumed), **(options | {"lr": 123.0}))
    second.load_state_dict(through_a_file(first.state_dict()))
    for net, optimizer in ((whole, first), (resumed, second)):
        train(net, optimizer, 5, seed=2, scale=100.0)
    assert same(whole, resumed)
    assert first.gains() == second.gains()
    for p, q in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert first.state[p].keys() == second.state[q].keys()
        for key, value in first.state[p].items():
            assert value.dtype == second.state[q][key].dtype
            assert torch.equal(value, second.state[q][key])


def test_loading_does_not_share_memory():
    net = model()
    first = SGDSaI(net.parameters())
    train(net, first, 1, seed=0)
    second = SGDSaI(copy.deepcopy(net).parameters())
    state = first.state_dict()
    second.load_state_dict(state)
    train(net, first, 1, seed=1)
    buffers = [s["momentum_buffer"] for s in second.state.values()]
    assert not any(
        torch.equal(a, s["momentum_buffer"])
        for a, s in zip(buffers, first.state.values(), strict=True)
    )


def test_a_state_saved_before_the_first_step():
    net = model()
    optimizer = SGDSaI(net.parameters())
    optimizer.load_state_dict(through_a_file(optimizer.state_dict()))
    train(net, optimizer, 1, seed=0)
    assert len(optimizer.gains()) == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_released_checkpoint_moves_over(dtype, capsys):
    released = pytest.importorskip("sgd_sai").SGD_sai
    theirs = model(dtype)
    old = released(theirs.parameters(), lr=0.02, weight_decay=0.3)
    train(theirs, old, 3, seed=0, scale=1e-2)
    capsys.readouterr()
    ours = copy.deepcopy(theirs)
    new = SGDSaI(ours.parameters(), lr=1.0, nesterov=False, gain="sqrt_numel")
    new.load_state_dict(old.state_dict())
    group = new.param_groups[0]
    assert (group["lr"], group["weight_decay"], group["eps"]) == (0.02, 0.3, 1e-8)
    assert group["gain"] == "sqrt_numel"
    wanted = {i: float(s["gsnr"]) for i, s in enumerate(old.state.values())}
    assert new.gains() == pytest.approx(wanted)
    for net, optimizer in ((theirs, old), (ours, new)):
        train(net, optimizer, 3, seed=1, scale=1e-2)
    if dtype == torch.float32:
        for a, b in zip(theirs.parameters(), ours.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    assert {s["momentum_buffer"].dtype for s in new.state.values()} == {torch.float32}


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf, -1.0])
def test_a_useless_loaded_gain_counts_as_not_measured(value):
    net = model()
    optimizer = SGDSaI(net.parameters())
    train(net, optimizer, 2, seed=0)
    state = optimizer.state_dict()
    state["state"][2]["gsnr"] = torch.tensor(value)
    fresh = SGDSaI(net.parameters())
    fresh.load_state_dict(state)
    assert set(fresh.gains()) == {0, 1, 3}
    p = list(net.parameters())[2]
    g = torch.randn_like(p)
    p.grad = g
    fresh.step()
    assert fresh.gains()[2] == pytest.approx((g.norm() / g.std()).item(), rel=1e-6)
    assert torch.equal(fresh.state[p]["momentum_buffer"], g)


def test_a_torch_sgd_state_gives_its_options_and_starts_the_gains_anew():
    net = model()
    sgd = torch.optim.SGD(net.parameters(), lr=0.3, momentum=0.8)
    train(net, sgd, 2, seed=0)
    optimizer = SGDSaI(net.parameters())
    optimizer.load_state_dict(sgd.state_dict())
    assert optimizer.param_groups[0]["momentum"] == 0.8
    assert optimizer.gains() == {}
    train(net, optimizer, 1, seed=1)
    assert len(optimizer.gains()) == 4


def test_momentum_switched_on_at_a_skipped_step_takes_no_nan():
    p = nn.Parameter(torch.randn(4))
    optimizer = SGDSaI([p], momentum=0.0, skip_nonfinite=True)
    p.grad = torch.randn(4)
    optimizer.step()
    optimizer.param_groups[0]["momentum"] = 0.9
    p.grad = torch.full((4,), math.nan)
    optimizer.step()
    assert optimizer.skipped_steps == 1
    p.grad = torch.randn(4)
    optimizer.step()
    assert p.isfinite().all() and optimizer.state[p]["momentum_buffer"].isfinite().all()


@pytest.mark.parametrize("kind", ["float32", "float64"])
@pytest.mark.parametrize("option", ["lr", "momentum", "weight_decay", "eps", "gain"])
def test_numbers_of_numpy_are_saved_as_plain_ones(option, kind):
    number = getattr(pytest.importorskip("numpy"), kind)(0.5)
    net = model()
    optimizer = SGDSaI(net.parameters(), **{option: number})
    train(net, optimizer, 1, seed=0)
    loaded = through_a_file(optimizer.state_dict())
    assert loaded["param_groups"][0][option] == 0.5


def test_gains_by_index_are_loaded_under_names():
    a, b = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(3))
    first = SGDSaI([a, b], gain={0: 1.0, 1: 2.0})
    a.grad = torch.randn(3)
    first.step()
    second = SGDSaI([("a", a), ("b", b)], gain={"a": 5.0, "b": 5.0})
    second.load_state_dict(through_a_file(first.state_dict()))
    b.grad = torch.randn(3)
    second.step()
    assert second.gains() == {"a": 1.0, "b": 2.0}


def test_a_mapping_changed_in_mid_course_lists_what_it_lacks_before_anything_starts():
    a, b = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(3))
    optimizer = SGDSaI([("a", a), ("b", b)], gain={"a": 1.0, "b": 1.0})
    optimizer.param_groups[0]["gain"] = {"a": 1.0}
    a.grad, b.grad = torch.randn(3), torch.randn(3)
    with pytest.raises(ValueError, match="gain lacks parameter names: 'b'"):
        optimizer.step()
    assert optimizer.gains() == {}


def test_the_state_of_another_optimizer_is_not_carried_along():
    net = model()
    adamw = torch.optim.AdamW(net.parameters())
    train(net, adamw, 1, seed=0)
    optimizer = SGDSaI(net.parameters())
    optimizer.load_state_dict(adamw.state_dict())
    train(net, optimizer, 1, seed=1)
    assert {key for state in optimizer.state.values() for key in state} == {
        "momentum_buffer",
        "gsnr",
    }


def test_what_a_wrapper_keeps_beside_ours_is_loaded():
    model = nn.Linear(3, 2)
    optimizer = SGDSaI(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    optimizer.state[model.weight]["slow_weights"] = torch.full((2, 3), 5.0)
    other = nn.Linear(3, 2)
    resumed = SGDSaI(other.parameters())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert torch.equal(resumed.state[other.weight]["slow_weights"], torch.full((2, 3), 5.0))
    assert "slow_weights" not in resumed.state[other.bias]


def test_normalize_switched_on_in_mid_course():
    net = model()
    optimizer = SGDSaI(net.parameters())
    train(net, optimizer, 1, seed=0)
    optimizer.param_groups[0]["normalize"] = True
    train(net, optimizer, 1, seed=1)
    assert max(optimizer.gains().values()) == 1.0


def test_momentum_switched_on_in_mid_course_starts_at_the_gradient():
    net = model()
    optimizer = SGDSaI(net.parameters(), momentum=0.0)
    train(net, optimizer, 2, seed=0)
    optimizer.param_groups[0]["momentum"] = 0.9
    train(net, optimizer, 1, seed=1)
    for p in net.parameters():
        assert torch.equal(optimizer.state[p]["momentum_buffer"], p.grad)


def test_user_hooks_on_loading_see_and_change_what_they_should():
    net = model()
    optimizer = SGDSaI(net.parameters())
    train(net, optimizer, 1, seed=0)
    state = optimizer.state_dict()
    fresh = SGDSaI(net.parameters())
    seen = []

    def double(_, saved):
        saved = copy.deepcopy(saved)
        for entry in saved["state"].values():
            entry["gsnr"] = entry["gsnr"] * 2
        return saved

    fresh.register_load_state_dict_pre_hook(double)
    fresh.register_load_state_dict_post_hook(lambda o: seen.append(o.gains()))
    fresh.load_state_dict(state)
    assert fresh.gains() == {k: 2 * v for k, v in optimizer.gains().items()}
    assert seen == [fresh.gains()]
    assert len(fresh._optimizer_load_state_dict_pre_hooks) == 1
    assert len(fresh._optimizer_load_state_dict_post_hooks) == 1


def test_a_state_that_does_not_fit_is_refused_and_leaves_no_hook_behind():
    net = model()
    optimizer = SGDSaI(net.parameters())
    train(net, optimizer, 1, seed=0)
    gains = optimizer.gains()
    with pytest.raises(ValueError, match="size|number of parameter groups"):
        optimizer.load_state_dict(SGDSaI([nn.Parameter(torch.ones(3))]).state_dict())
    assert optimizer.gains() == gains
    assert not optimizer._optimizer_load_state_dict_pre_hooks


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_go_on_alike(duplicate):
    net = model()
    optimizer = SGDSaI(net.parameters(), skip_nonfinite=True)
    train(net, optimizer, 2, seed=0)
    copied_net, copied = duplicate((net, optimizer))
    train(net, optimizer, 2, seed=1)
    train(copied_net, copied, 2, seed=1)
    assert same(net, copied_net)
    assert copied.gains() == optimizer.gains()


def test_a_pickle_of_an_older_version_takes_the_defaults():
    net = model()
    optimizer = SGDSaI(net.parameters())
    state = optimizer.__getstate__()
    for group in state["param_groups"]:
        for key in ("normalize", "largest_gain", "skip_nonfinite", "skipped_steps"):
            del group[key]
    older = SGDSaI.__new__(SGDSaI)
    older.__setstate__(state)
    train(net, older, 1, seed=0)
    assert older.gains() and older.skipped_steps == 0


SAVER = """
import sys, torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import state_dict as dcp_state
from test_sgd_sai_state import DCP_OPTIONS, model, train
from nomadam import SGDSaI
for i, options in enumerate(DCP_OPTIONS):
    net = model()
    optimizer = SGDSaI(net.named_parameters(), **options)
    train(net, optimizer, 3, seed=0)
    flat = dcp_state.StateDictOptions(flatten_optimizer_state_dict=bool(i % 2))
    saved = dcp_state.get_optimizer_state_dict(net, optimizer, options=flat)
    dcp.save(saved, checkpoint_id=f"{sys.argv[1]}/{i}", no_dist=True)
"""
DCP_OPTIONS = [
    {"lr": 0.05},
    {"lr": 0.05},
    {"normalize": True},
    {"momentum": 0.0},
    {"skip_nonfinite": True, "nesterov": True},
]


def test_distributed_checkpoint_restores_every_entry_in_a_fresh_process(tmp_path):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import state_dict as dcp_state

    here = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(here), str(here.parent)])}
    command = [sys.executable, "-W", "ignore", "-c", SAVER, str(tmp_path)]
    subprocess.run(command, check=True, env=environment, timeout=300)
    for i, options in enumerate(DCP_OPTIONS):
        net = model()
        optimizer = SGDSaI(net.named_parameters(), **options)
        train(net, optimizer, 3, seed=0)
        fresh_net = model()
        fresh_net.load_state_dict(net.state_dict())
        fresh = SGDSaI(fresh_net.named_parameters(), **(options | {"lr": 0.7}))
        flat = dcp_state.StateDictOptions(flatten_optimizer_state_dict=bool(i % 2))
        # Steps once with zero gradients, to make the state that is loaded into.
        blank = dcp_state.get_optimizer_state_dict(fresh_net, fresh, options=flat)
        assert fresh.gains() == {}
        dcp.load(blank, checkpoint_id=tmp_path / str(i), no_dist=True)
        dcp_state.set_optimizer_state_dict(fresh_net, fresh, blank, options=flat)
        assert fresh.gains() == optimizer.gains()
        assert fresh.param_groups[0]["lr"] == options.get("lr", 1e-2)
        train(net, optimizer, 3, seed=1)
        train(fresh_net, fresh, 3, seed=1)
        assert same(net, fresh_net)


def test_materialised_before_the_first_step_and_then_trained():
    """What distributed checkpointing does at the start of a run must not freeze the model."""
    from torch.distributed.checkpoint import state_dict as dcp_state

    plain, materialised = model(), model()
    first, second = SGDSaI(plain.parameters()), SGDSaI(materialised.parameters())
    dcp_state.get_optimizer_state_dict(materialised, second)
    train(plain, first, 3, seed=0)
    train(materialised, second, 3, seed=0)
    assert same(plain, materialised)
