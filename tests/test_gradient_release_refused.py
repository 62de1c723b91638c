"""What gradient release refuses, when, and with which way out; and backwards that fail."""

import copy
import gc
import warnings

import pytest
import torch
from released_net import (
    assert_same,
    assert_same_training,
    gradients,
    groups,
    loss_of,
    net,
    ordinary,
    pair,
    released,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

from nomadam import SGDSaI
from nomadam.optimizers.gradient_release import release_gradients
from nomadam.optimizers.sgd_sai_controls import ShuffledSGDSaI


def test_a_group_that_is_refused_changes_nothing():
    model = net()
    optimizer = SGDSaI([model.gate])
    release_gradients(model, optimizer)
    with pytest.raises(ValueError, match="momentum"):
        optimizer.add_param_group({"params": [model.norm.weight], "momentum": 2.0})
    loss_of(model, 1).backward()
    assert "norm.weight" in gradients(model) and "gate" not in gradients(model)


def test_gains_that_are_exchanged_among_blocks_are_refused():
    model = net()
    with pytest.raises(ValueError, match="ShuffledSGDSaI"):
        release_gradients(model, ShuffledSGDSaI(model.named_parameters()))


def test_an_optimizer_that_was_dropped_is_missed():
    model = net()
    release_gradients(model, SGDSaI(model.parameters()))
    gc.collect()
    with pytest.raises(RuntimeError, match=r"dropped without release.remove\(\)"):
        loss_of(model, 1).backward()
    model.zero_grad()
    loss_of(model, 1).backward()
    assert gradients(model)


class Fails(torch.autograd.Function):
    """Passes its input on, and fails in the backward."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise ZeroDivisionError("as it was told to")


def test_a_backward_that_fails_half_way():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    optimizer = SGDSaI(model.named_parameters(), momentum_dtype="int8")
    release = release_gradients(model, optimizer)
    x = torch.randn(3, 4)
    first = copy.deepcopy(model[0].state_dict())
    with pytest.raises(ZeroDivisionError):
        model[1](Fails.apply(model[0](x))).sum().backward()
    assert_same(dict(model[0].state_dict()), dict(first))
    assert set(optimizer.gains()) == {"1.weight", "1.bias"}
    assert optimizer.param_groups[0]["rounding_step"] == 0
    with release.accumulate():
        model(x).sum().backward()
    model(x).sum().backward()
    assert not gradients(model) and len(optimizer.gains()) == 4
    assert optimizer.param_groups[0]["rounding_step"] == 1


@pytest.mark.parametrize("fused", [False, True])
def test_a_graph_that_is_kept_can_not_be_used_again(fused):
    model, optimizer = pair(fused=fused)[0]
    release_gradients(model, optimizer)
    loss = loss_of(model, 1)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


class Checkpointed(nn.Module):
    """Layers under checkpoints, the first one used twice where it is shared."""

    def __init__(self, reentrant, shared):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.reentrant, self.shared = reentrant, shared

    def forward(self, x):
        for i in (0, 1, 2, 0) if self.shared else (0, 1, 2):
            layer = nn.Sequential(self.layers[i], nn.Tanh())
            x = checkpoint(layer, x, use_reentrant=self.reentrant)
        return x.square().sum()


@pytest.mark.parametrize("shared", [False, True])
def test_gradient_checkpointing(shared):
    models = [Checkpointed(reentrant=False, shared=shared) for _ in range(2)]
    one, two = [(m, SGDSaI(m.parameters())) for m in models]
    release = release_gradients(*two)
    for _ in range(3):
        x = torch.randn(4, 6)
        ordinary(*one, lambda m, x=x: m(x), lambda m, x=x: m(-x))
        released(release, two[0], lambda m, x=x: m(x), lambda m, x=x: m(-x))
        assert_same_training(one, two)


@pytest.mark.parametrize("shared", [False, True])
def test_reentrant_checkpointing_is_refused(shared):
    model = Checkpointed(reentrant=True, shared=shared)
    optimizer = SGDSaI(model.parameters())
    release = release_gradients(model, optimizer)
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(4, 6, requires_grad=True)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        model(x).backward()
    assert_same(dict(model.state_dict()), dict(before))
    model.zero_grad()
    with release.accumulate():
        model(x).backward()
    release.remove()
    optimizer.step()
    assert len(optimizer.gains()) == 6


def test_compiled_autograd_is_refused():
    compiled_autograd = pytest.importorskip("torch._dynamo.compiled_autograd")
    model = nn.Linear(2, 2)
    optimizer = SGDSaI(model.parameters())
    before = copy.deepcopy(model.state_dict())
    release_gradients(model, optimizer)
    compiler = torch.compile(backend="eager")
    with compiled_autograd._enable(compiler), pytest.raises(RuntimeError, match="compiled"):
        model(torch.ones(1, 2)).sum().backward()
    assert_same(dict(model.state_dict()), dict(before))


def test_a_model_that_is_none_and_an_optimizer_of_another_kind():
    model, optimizer = pair()[0]
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got list"):
        release_gradients(list(model.parameters()), optimizer)
    with pytest.raises(TypeError, match="optimizer must be an SGDSaI itself.*got SGD"):
        release_gradients(model, torch.optim.SGD(model.parameters()))


@pytest.mark.parametrize("option", ["normalize", "skip_nonfinite", "differentiable"])
def test_options_that_need_all_gradients(option):
    model = net()
    first, second = groups(model)
    optimizer = SGDSaI([first, {**second, option: True}])
    with pytest.raises(ValueError, match=f"{option}=True"):
        release_gradients(model, optimizer)
    assert all(not p._post_accumulate_grad_hooks for p in model.parameters())
    optimizer.param_groups[1][option] = False
    release_gradients(model, optimizer)
    loss_of(model, 1).backward()
    before = copy.deepcopy(model.state_dict())
    optimizer.param_groups[1][option] = True
    with pytest.raises(ValueError, match=f"{option}=True"):
        loss_of(model, 2).backward()
    assert_same(dict(model.state_dict()), dict(before))


def test_an_optimizer_is_released_once():
    model, optimizer = pair()[0]
    release = release_gradients(model, optimizer)
    with pytest.raises(ValueError, match="released already"):
        release_gradients(model, optimizer)
    release.remove()
    release_gradients(model, optimizer)


def test_two_releases_of_one_parameter():
    model, optimizer = pair()[0]
    other = SGDSaI(model.parameters())
    release_gradients(model, optimizer)
    release_gradients(model, other)
    with pytest.raises(RuntimeError, match="freed before its release"):
        loss_of(model, 1).backward()


def test_parameters_that_the_model_lacks():
    model, optimizer = pair()[0]
    optimizer.add_param_group({"params": [("temperature", nn.Parameter(torch.ones(())))]})
    with pytest.raises(ValueError, match="lacks.*temperature.*ModuleList"):
        release_gradients(model, optimizer)


def test_sparse_gradients():
    model = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Linear(3, 2))
    optimizer = SGDSaI(model.parameters())
    with pytest.raises(ValueError, match="Embedding at '0' has sparse gradients"):
        release_gradients(model, optimizer)
    model[0].sparse = False
    release_gradients(model, optimizer)
    model[0].sparse = True
    with pytest.raises(RuntimeError, match="sparse"):
        model(torch.tensor([1, 2])).sum().backward()


def test_gradients_that_are_to_be_differentiated():
    model, optimizer = pair()[0]
    before = copy.deepcopy(model.state_dict())
    release_gradients(model, optimizer)
    with warnings.catch_warnings(), pytest.raises(RuntimeError, match="create_graph=True"):
        warnings.simplefilter("ignore")
        loss_of(model, 1).backward(create_graph=True)
    assert_same(dict(model.state_dict()), dict(before))
    model.zero_grad()


@pytest.mark.filterwarnings("ignore:Using backward")
def test_a_gradient_without_a_graph_is_released_all_the_same():
    model = nn.ParameterList([torch.ones(3)])
    optimizer = SGDSaI(model.parameters(), lr=0.5, weight_decay=0.0, gain=1.0)
    release_gradients(model, optimizer)
    model[0].sum().backward(create_graph=True)
    assert model[0].grad is None and model[0].eq(0.5).all()


@pytest.mark.parametrize("fused", [None, True])
def test_a_scaler_is_told_that_it_came_too_late(fused):
    model, optimizer = pair(fused=fused)[0]
    release_gradients(model, optimizer)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loss_of(model, 1)).backward()
    with pytest.raises((RuntimeError, AssertionError), match="GradScaler|No inf checks"):
        scaler.step(optimizer)


def test_a_scaler_that_is_switched_off():
    one, two = pair()
    release_gradients(*two)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    scaler.scale(loss_of(two[0], 1)).backward()
    scaler.step(two[1])
    scaler.update()
    ordinary(*one, lambda m: loss_of(m, 1))
    assert_same_training(one, two)


@pytest.fixture
def process_group(tmp_path):
    if not torch.distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    store = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:FSDP is switching")
def test_modules_that_exchange_gradients(process_group):
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
    from torch.nn.parallel import DistributedDataParallel

    def check(model, match):
        optimizer = SGDSaI(model.parameters(), gain=1.0)
        for outer in (model, nn.ModuleDict({"inner": model})):
            with pytest.raises(ValueError, match=match):
                release_gradients(outer, optimizer)

    model = nn.Linear(4, 4)
    check(DistributedDataParallel(model), "DistributedDataParallel.* exchanges gradients")
    check(FullyShardedDataParallel(model, device_id="cpu"), "FullyShardedDataParallel")
    check(fully_shard(nn.Linear(4, 4)), "DTensor")
