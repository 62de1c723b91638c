"""The model of what processes hold and send, against what they do."""

import math

import pytest
import torch
import torch.distributed as dist
from processes import in_processes
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from nomadam import SGDSaI
from nomadam.experiments.cost.models import on_meta
from nomadam.experiments.cost.sharding import (
    LARGE_MODELS,
    STORAGES,
    bytes_held,
    gain_bytes,
    part_numel,
)
from nomadam.numerics.sharded import local
from nomadam.optimizers.baselines import BASELINES
from nomadam.optimizers.sgd_sai_state import make_momentum

ADAMW, FLOAT32, INT8, PURE = STORAGES
SHAPES = ((5, 3), (64, 128), (130, 64), (4100,), (3,), (256, 100), (33, 2, 96))


def small_model():
    return nn.ParameterList([nn.Parameter(torch.zeros(shape)) for shape in SHAPES])


@pytest.mark.parametrize("world", [1, 2, 3, 4, 7, 64, 1000])
def test_parts_make_up_the_whole_and_the_first_is_the_largest(world):
    for shape in SHAPES:
        parts = [part_numel(shape, world, rank) for rank in range(world)]
        assert sum(parts) == math.prod(shape) and max(parts) == parts[0]


@pytest.mark.parametrize(
    ("name", "numel"),
    [("Llama-2-7B", 6738415616), ("Llama-3-70B", 70553706496), ("Llama-3-405B", 405853388800)],
)
def test_the_large_models_have_their_published_sizes(name, numel):
    assert on_meta(LARGE_MODELS[name]).numel == numel


def test_one_process_holds_what_the_optimizers_count_on_the_meta_device():
    model = on_meta(LARGE_MODELS["Llama-2-7B"])
    counts = [
        (ADAMW, BASELINES["adamw"].state_bytes(model)),
        (FLOAT32, BASELINES["sgd_sai"].state_bytes(model)),
        (INT8, BASELINES["sgd_sai"].state_bytes(model, momentum_dtype="int8")),
    ]
    for storage, state in counts:
        assert bytes_held(model, storage, 1) == 8 * model.numel + state
        if storage.state is not None:  # 8 bits are given up where parts cut a scale
            parts = sum(bytes_held(model, storage, 64, rank) for rank in range(64))
            assert parts == 8 * model.numel + state


@pytest.mark.parametrize(("world", "rank"), [(2, 0), (2, 1), (3, 2), (8, 0), (8, 7), (512, 0)])
@pytest.mark.parametrize("model", ["small", "Llama-3-70B"])
def test_the_state_of_a_rank_is_the_one_that_the_shapes_say(model, world, rank):
    """Of any number of processes, on the meta device, under a process group that sends nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        mesh = init_device_mesh("cpu", (world,))
        with torch.device("meta"):
            whole = small_model() if model == "small" else LARGE_MODELS[model]()
        shapes = {}
        for param in whole.parameters():
            shapes.setdefault(param.shape, []).append(param)
        total = 0
        for same in shapes.values():  # by shape, of which there are few
            param = dist.tensor.distribute_tensor(same[0].data, mesh, [dist.tensor.Shard(0)])
            state = {}
            make_momentum(param, "int8", state)
            held = sum(local(kept).nbytes for kept in state.values())
            total += len(same) * (8 * local(param).numel() + held)
    finally:
        dist.destroy_process_group()
    assert total == bytes_held(whole, INT8, world, rank)


def check_measured():
    """One step of SGDSaI under FSDP2: bytes received for the gains, and bytes held afterwards."""
    torch.manual_seed(0)
    world, rank = dist.get_world_size(), dist.get_rank()
    whole = nn.Sequential(nn.Linear(7, 640), nn.Linear(640, 130), nn.Linear(130, 5))
    model = nn.Sequential(nn.Linear(7, 640), nn.Linear(640, 130), nn.Linear(130, 5))
    mesh = init_device_mesh("cpu", (world,))
    fully_shard(model, mesh=mesh)
    optimizers = {
        FLOAT32: SGDSaI(model.named_parameters()),
        INT8: SGDSaI(model.named_parameters(), momentum_dtype="int8"),
    }
    model(torch.ones(3, 7)).square().mean().backward()
    received = []
    gather = dist.all_gather_into_tensor

    def counted(output, *rest, **more):
        received.append(output.nbytes)
        return gather(output, *rest, **more)

    dist.all_gather_into_tensor = counted
    try:
        for storage, optimizer in optimizers.items():
            optimizer.step()
            assert received == [gain_bytes(6, world)], received
            received.clear()
            optimizer.step()
            assert not received
            held = sum(
                local(kept).nbytes
                for state in optimizer.state.values()
                for name, kept in state.items()
                if name != "gsnr"
            )
            held += sum(local(p).nbytes + local(p.grad).nbytes for p in model.parameters())
            assert held == bytes_held(whole, storage, world, rank)
    finally:
        dist.all_gather_into_tensor = gather


@pytest.mark.parametrize("size", [2, 4])
def test_processes_hold_and_send_what_the_model_says(size):
    in_processes(size, check_measured)
