"""SGDSaI on parameters that FSDP2 cuts over processes, with a distributed checkpoint.

Run it as `torchrun --nproc-per-node 2 examples/fsdp2.py`. Again with `--steps 40` it goes on at
step 20, with any number of processes.
"""

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import nomadam

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def model_of():
    """A small network, the same in every process."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 65), nn.GELU(), nn.LayerNorm(65), nn.Linear(65, 1))


def batch_of(step, rank=0, size=1):
    """This process's part of 64 points of a parabola."""
    x = torch.rand(64, 8, generator=torch.Generator().manual_seed(step)).chunk(size)[rank]
    return x.to(DEVICE), x.square().sum(dim=1, keepdim=True).to(DEVICE)


def main(steps=20, folder="fsdp2_checkpoint"):
    """Trains up to a step, each process on its part of the batch."""
    dist.init_process_group("nccl" if DEVICE == "cuda" else "gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh(DEVICE, (size,))
    model = model_of()
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = nomadam.SGDSaI(model.named_parameters(), lr=1e-2)  # after fully_shard

    done = 0
    if Path(folder, ".metadata").exists():
        parts, states = get_state_dict(model, optimizer)
        held = {"model": parts, "optimizer": states, "step": 0}
        checkpoint.load(held, checkpoint_id=folder)
        set_state_dict(
            model, optimizer, model_state_dict=held["model"], optim_state_dict=held["optimizer"]
        )
        done = held["step"]
    for step in range(done, steps):
        x, y = batch_of(step, rank, size)
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        dist.all_reduce(loss.detach())
        if rank == 0 and step == steps - 1:
            print(f"step {steps}, loss {loss.item() / size:.4f}")
    parts, states = get_state_dict(model, optimizer)
    held = {"model": parts, "optimizer": states, "step": max(done, steps)}
    checkpoint.save(held, checkpoint_id=folder)
    if rank == 0 and done >= steps:
        print("nothing left to do")
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--folder", default="fsdp2_checkpoint")
    given = parser.parse_args()
    if "RANK" not in os.environ:
        parser.error("start it by torchrun, which says who is who")
    main(**vars(given))
