"""SGDSaI in a loop of one's own on Lightning's Fabric, with a checkpoint to go on from.

Run it as `python examples/lightning_fabric.py`, and again with `--steps 40`: it goes on at step 20.
With `--devices 2` it runs in two processes.
"""

import argparse
from pathlib import Path

import torch
from lightning.fabric import Fabric
from torch import nn

import nomadam


def batch_of(step):
    """64 points of a parabola; a function of the step, so that a continued run sees the same."""
    x = torch.rand(64, 8, generator=torch.Generator().manual_seed(step))
    return x, x.square().sum(dim=1, keepdim=True)


def main(steps=20, checkpoint="lightning_fabric.ckpt", devices=1):
    """Trains up to a step; returns model, optimizer and the loss of each step taken."""
    fabric = Fabric(devices=devices)
    fabric.launch()
    fabric.seed_everything(0, verbose=False)
    model = nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 1))
    groups = nomadam.decay_groups(model, weight_decay=1e-2)  # biases and norms do not decay
    model, optimizer = fabric.setup(model, nomadam.SGDSaI(groups, lr=1e-2))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer.optimizer, T_max=100)
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    if Path(checkpoint).exists():
        fabric.load(checkpoint, parts)

    losses = []
    while schedule.last_epoch < steps:
        batch = fabric.to_device(batch_of(schedule.last_epoch))
        x, y = (tensor.chunk(fabric.world_size)[fabric.global_rank] for tensor in batch)
        loss = nn.functional.mse_loss(model(x), y)
        fabric.backward(loss)
        fabric.clip_gradients(model, optimizer, max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(fabric.all_reduce(loss.detach()).item())
    fabric.save(checkpoint, parts)
    fabric.print(f"{len(losses)} steps, loss {losses[-1]:.4f}" if losses else "nothing left to do")
    return model, optimizer, losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--checkpoint", default="lightning_fabric.ckpt")
    parser.add_argument("--devices", type=int, default=1)
    main(**vars(parser.parse_args()))
