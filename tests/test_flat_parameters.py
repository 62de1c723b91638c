"""Engines that flatten parameters: refused with the way out, and the way out gives the same."""

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
from processes import in_processes
from torch import nn

import nomadam
from nomadam import SGDSaI


class Zero:
    """What ZeRO does to an optimizer: each group becomes one padded vector, of which a process
    steps its part, and the parts are put together again."""

    def __init__(self, optimizer, rank, size):
        self.optimizer, self.rank, self.size = optimizer, rank, size
        self.whole = [list(group["params"]) for group in optimizer.param_groups]
        for group, params in zip(optimizer.param_groups, self.whole, strict=True):
            group["params"] = [nn.Parameter(self.part([p.detach() for p in params]).clone())]

    def part(self, tensors):
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        padded = -(-flat.numel() // self.size) * self.size
        flat = nn.functional.pad(flat, (0, padded - flat.numel()))
        return flat.chunk(self.size)[self.rank]

    def step(self, gathered):
        for group, params in zip(self.optimizer.param_groups, self.whole, strict=True):
            group["params"][0].grad = self.part([p.grad for p in params])
        self.optimizer.step()
        for group, params in zip(self.optimizer.param_groups, self.whole, strict=True):
            flat = gathered(group["params"][0].detach())
            for param in params:
                part, flat = flat[: param.numel()], flat[param.numel() :]
                param.data.copy_(part.view_as(param))


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.LayerNorm(6), nn.Linear(6, 3)).double()


def loss(model, batch):
    return model(batch).square().mean()


def batch(step):
    return torch.randn(5, 8, generator=torch.Generator().manual_seed(step)).double() + 0.2


def by_zero(rank, size, gathered, zero_step):
    model, other = net(), net()
    gains = nomadam.measure_gains(model, loss, [batch(0)])
    groups = nomadam.scaled_param_groups(model, gains, lr=2e-2, weight_decay=0.1)
    ours = SGDSaI(groups, gain=1.0)
    theirs = SGDSaI(other.named_parameters(), lr=2e-2, weight_decay=0.1)
    engine = Zero(ours, rank, size)
    if zero_step:
        rates = [group["lr"] for group in ours.param_groups]
        for group in ours.param_groups:
            group["lr"] = 0.0
        for param in model.parameters():
            param.grad = torch.zeros_like(param)
        engine.step(gathered)
        for group, lr in zip(ours.param_groups, rates, strict=True):
            group["lr"] = lr
    for step in range(10):
        for each in (model, other):
            each.zero_grad()
            loss(each, batch(step)).backward()
        engine.step(gathered)
        theirs.step()
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("zero_step", [False, True])
def test_the_way_out_equals_blocks_in_one_process(zero_step):
    by_zero(0, 1, lambda part: part, zero_step)


def in_two():
    def gathered(part):
        parts = [torch.empty_like(part) for _ in range(2)]
        dist.all_gather(parts, part)
        return torch.cat(parts)

    for zero_step in (False, True):
        by_zero(dist.get_rank(), 2, gathered, zero_step)


def test_the_way_out_equals_blocks_in_two_processes():
    in_processes(2, in_two)


def test_a_group_that_becomes_a_vector_is_refused():
    model = net()
    optimizer = SGDSaI(model.parameters())
    engine = Zero(optimizer, 0, 1)
    loss(model, batch(0)).backward()
    before = optimizer.param_groups[0]["params"][0].detach().clone()
    with pytest.raises(ValueError, match="flattened.*measure_gains.*gain=1.0"):
        engine.step(lambda part: part)
    assert torch.equal(optimizer.param_groups[0]["params"][0].detach(), before)
    assert not optimizer.state


def test_a_block_of_which_a_part_is_left_is_refused():
    model = nn.Linear(4, 4)
    optimizer = SGDSaI([{"params": [model.weight]}, {"params": [model.bias]}])
    engine = Zero(optimizer, 1, 2)
    model(torch.ones(1, 4)).sum().backward()
    with pytest.raises(ValueError, match="group 0 were flattened"):
        engine.step(lambda part: part)


def test_a_vector_of_the_size_of_a_block_is_refused_too():
    """As ZeRO makes of two equal matrices on two processes."""
    optimizer = SGDSaI([nn.Parameter(torch.randn(4, 4)) for _ in range(2)])
    part = nn.Parameter(torch.randn(16))
    part.grad = torch.randn(16)
    optimizer.param_groups[0]["params"] = [part]
    with pytest.raises(ValueError, match="flattened"):
        optimizer.step()


def test_other_tensors_of_the_same_sizes_are_taken():
    model = net()
    optimizer = SGDSaI(model.parameters())
    group = optimizer.param_groups[0]
    group["params"] = [nn.Parameter(param.detach().clone()) for param in group["params"]]
    for param in group["params"]:
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert len(optimizer.gains()) == len(group["params"])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_know_their_blocks(copied):
    optimizer = copied(SGDSaI(net().parameters()))
    for param in optimizer.param_groups[0]["params"]:
        param.grad = torch.ones_like(param)
    optimizer.step()
    optimizer.param_groups[0]["params"] = [nn.Parameter(torch.zeros(90))]
    with pytest.raises(ValueError, match="flattened"):
        optimizer.step()


def test_the_first_fsdp_is_refused_at_once():
    class FlatParameter(nn.Parameter):
        pass

    with pytest.raises(ValueError, match="FSDP2"):
        SGDSaI([FlatParameter(torch.zeros(12))])
    original = nn.Parameter(torch.zeros(3))
    original._fsdp_flattened = True
    with pytest.raises(ValueError, match="flattened"):
        SGDSaI([original])
    SGDSaI([original], gain=1.0)


def real_fsdp():
    from torch.distributed.fsdp import FullyShardedDataParallel

    for original in (False, True):
        model = FullyShardedDataParallel(
            net(), use_orig_params=original, device_id=torch.device("cpu")
        )
        with pytest.raises(ValueError, match="flattened"):
            SGDSaI(model.parameters())


def test_the_true_first_fsdp_is_refused():
    in_processes(2, real_fsdp)
