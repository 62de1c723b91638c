"""SGDSaI in the engines of torch.distributed, each case in several processes over gloo."""

import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint
from sharded_cases import line, square, whole
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from nomadam import SGDSaI

STEPS = 20
BATCH = 24  # a multiple of 2, 3 and 4
WIDTH = 128  # enough for 8 bits


class Net(nn.Module):
    """Layers whose rows are even, uneven and fewer than the processes, and vectors."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.outer = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.few = nn.Linear(WIDTH, 1, bias=False)
        self.uneven = nn.Linear(WIDTH, 5)

    def forward(self, x):
        x = x + self.outer(torch.tanh(self.inner(x)))
        x = self.norm(x)
        return torch.cat([self.few(x), self.uneven(x)], dim=1)


def net(dtype=torch.float64):
    torch.manual_seed(0)
    return Net().to(dtype)


def batch(step, rank=0, size=1, dtype=torch.float64):
    """The part of a process of the batch of a step."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(BATCH, WIDTH, generator=generator, dtype=torch.float64)
    y = torch.randn(BATCH, 6, generator=generator, dtype=torch.float64)
    return x.chunk(size)[rank].to(dtype), y.chunk(size)[rank].to(dtype)


def train(model, optimizer, steps=range(STEPS), rank=0, size=1, dtype=torch.float64):
    for step in steps:
        x, y = batch(step, rank, size, dtype)
        (model(x) - y).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def alone(steps=range(STEPS), **options):
    """The training of one process, on the whole batch."""
    model = net()
    optimizer = SGDSaI(model.named_parameters(), lr=2e-2, **options)
    train(model, optimizer, steps)
    return model, optimizer


def compare(model, optimizer, reference_model, reference, close=1e-12):
    theirs = dict(reference_model.named_parameters())
    for name, param in model.named_parameters():
        other = theirs[name.removeprefix("module.")]
        torch.testing.assert_close(whole(param.detach()), other.detach(), rtol=close, atol=close)
        ours, expected = optimizer.state[param], reference.state[other]
        assert ours.keys() == expected.keys(), name
        for key in ours.keys():
            torch.testing.assert_close(whole(ours[key]), expected[key], rtol=close, atol=close)


def compare_parameters(model, reference, close):
    for (_, one), (_, other) in zip(
        model.named_parameters(), reference.named_parameters(), strict=True
    ):
        torch.testing.assert_close(whole(one.detach()), other.detach(), rtol=close, atol=close)


def here():
    return {"rank": dist.get_rank(), "size": dist.get_world_size()}


def sharded_net(mesh=None, **options):
    """Net with each layer a unit of FSDP2, and the root one."""
    model = net()
    mesh = mesh or line()
    for layer in (model.inner, model.outer, model.uneven):
        fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def ddp():
    model = DistributedDataParallel(net())
    optimizer = SGDSaI(model.named_parameters(), lr=2e-2)
    train(model, optimizer, **here())
    compare(model, optimizer, *alone())


def fsdp2():
    model = sharded_net()
    optimizer = SGDSaI(model.named_parameters(), lr=2e-2)
    train(model, optimizer, **here())
    compare(model, optimizer, *alone())


def fsdp2_with_the_parameters_on_the_cpu():
    model = sharded_net(offload_policy=CPUOffloadPolicy(pin_memory=False))
    optimizer = SGDSaI(model.named_parameters(), lr=2e-2)
    train(model, optimizer, **here())
    compare(model, optimizer, *alone())


def fsdp2_in_mixed_precision():
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = sharded_net(mp_policy=policy)
    optimizer = SGDSaI(model.named_parameters(), lr=2e-2)
    # Few steps: in bfloat16 the two trainings go apart.
    train(model, optimizer, range(3), **here(), dtype=torch.bfloat16)
    other, reference = alone(range(3))
    compare_parameters(model, other, close=0.05)
    for name, gain in reference.gains().items():
        assert abs(optimizer.gains()[name] / gain - 1) < 0.05, name


def gradients_are_clipped_as_in_one_process():
    model, other = sharded_net(), net()
    ours = SGDSaI(model.named_parameters(), lr=2e-2)
    theirs = SGDSaI(other.named_parameters(), lr=2e-2)
    for step in range(5):
        for each, optimizer, part in ((model, ours, here()), (other, theirs, {})):
            x, y = batch(step, **part)
            (each(x) - y).square().mean().backward()
            nn.utils.clip_grad_norm_(each.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()
    compare(model, ours, other, theirs)


def frozen_parts_are_left_alone():
    model, other = net(), net()
    for each in (model, other):
        each.inner.requires_grad_(False)
    mesh = line()
    for layer in (model.inner, model.outer, model.uneven):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    ours = SGDSaI([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    theirs = SGDSaI([p for p in other.parameters() if p.requires_grad], lr=2e-2)
    train(model, ours, range(5), **here())
    train(other, theirs, range(5))
    torch.testing.assert_close(whole(model.few.weight.detach()), other.few.weight.detach())


def hsdp():
    model = sharded_net(square())
    optimizer = SGDSaI(model.named_parameters(), lr=2e-2)
    train(model, optimizer, **here())
    compare(model, optimizer, *alone())


PLAN = {"inner": ColwiseParallel(), "outer": RowwiseParallel()}


def tensor_parallel():
    model = net()
    parallelize_module(model, line(), PLAN)
    optimizer = SGDSaI(model.named_parameters(), lr=2e-2)
    train(model, optimizer)
    compare(model, optimizer, *alone())


def fsdp2_and_tensor_parallel():
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    model = net()
    parallelize_module(model, mesh["tensor"], PLAN)
    for layer in (model.inner, model.outer, model.uneven):
        fully_shard(layer, mesh=mesh["data"])
    fully_shard(model, mesh=mesh["data"])
    optimizer = SGDSaI(model.named_parameters(), lr=2e-2)
    train(model, optimizer, rank=mesh["data"].get_local_rank(), size=2)
    compare(model, optimizer, *alone())


class Stage(nn.Module):
    """Half of a network; the other half lives in the other processes."""

    def __init__(self, first):
        super().__init__()
        torch.manual_seed(int(first))
        self.layer = nn.Linear(12, 12).double()

    def forward(self, x):
        return torch.tanh(self.layer(x))


def two_stages_each_of_two_processes():
    from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("stage", "data"))
    index = mesh["stage"].get_local_rank()
    module = Stage(first=index == 0)
    fully_shard(module, mesh=mesh["data"])
    stage = PipelineStage(
        module,
        index,
        2,
        torch.device("cpu"),
        input_args=torch.randn(2, 12, dtype=torch.float64),
        group=mesh["stage"].get_group(),
    )
    schedule = ScheduleGPipe(stage, 3, loss_fn=nn.MSELoss())
    optimizer = SGDSaI(module.parameters(), lr=2e-2)
    both = nn.Sequential(Stage(True), Stage(False))
    reference = SGDSaI(both.parameters(), lr=2e-2)
    data = mesh["data"].get_local_rank()
    for step in range(5):
        x = torch.randn(12, 12, generator=torch.Generator().manual_seed(step)).double()
        part = x.chunk(2)[data]
        if index == 0:
            schedule.step(part)
        else:
            schedule.step(target=part)
        optimizer.step()
        optimizer.zero_grad()
        nn.functional.mse_loss(both(x), x).backward()
        reference.step()
        reference.zero_grad()
    ours = whole(module.layer.weight.detach())
    torch.testing.assert_close(ours, both[index].layer.weight.detach(), rtol=1e-12, atol=1e-12)


# Checkpoints


def states(model, optimizer):
    return {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer),
    }


def restore(model, optimizer, folder):
    held = states(model, optimizer)
    checkpoint.load(held, checkpoint_id=folder)
    set_model_state_dict(model, held["model"])
    set_optimizer_state_dict(model, optimizer, held["optimizer"])


def checkpoints_go_on_with_the_same_bits():
    folder = [tempfile.mkdtemp()] if dist.get_rank() == 0 else [None]
    dist.broadcast_object_list(folder)
    for options in ({}, {"momentum_dtype": "int8"}, {"momentum_dtype": torch.bfloat16}):
        path = str(Path(folder[0], f"{len(options)}{options.get('momentum_dtype')}"))
        model = sharded_net()
        optimizer = SGDSaI(model.named_parameters(), lr=2e-2, **options)
        train(model, optimizer, range(7), **here())
        checkpoint.save(states(model, optimizer), checkpoint_id=path)
        train(model, optimizer, range(7, STEPS), **here())
        other = sharded_net()
        again = SGDSaI(other.named_parameters(), lr=2e-2, **options)
        restore(other, again, path)
        train(other, again, range(7, STEPS), **here())
        assert again.gains() == optimizer.gains()
        for (_, one), (_, two) in zip(
            model.named_parameters(), other.named_parameters(), strict=True
        ):
            assert torch.equal(one.to_local(), two.to_local())


LINE = (
    ddp,
    fsdp2,
    fsdp2_with_the_parameters_on_the_cpu,
    fsdp2_in_mixed_precision,
    gradients_are_clipped_as_in_one_process,
    frozen_parts_are_left_alone,
    checkpoints_go_on_with_the_same_bits,
)
EVEN = (tensor_parallel,)
SQUARE = (hsdp, fsdp2_and_tensor_parallel, two_stages_each_of_two_processes)


def cases(size):
    return LINE + (EVEN if size in (2, 4) else ()) + (SQUARE if size == 4 else ())
