"""SGDSaI in a loop of plain PyTorch, with a checkpoint to go on from.

Run it as `python examples/plain_pytorch.py`, and again with `--steps 40`: it goes on at step 20.
"""

import argparse
from pathlib import Path

import torch
from torch import nn

import nomadam


def batch_of(step):
    """64 points of a parabola; a function of the step, so that a continued run sees the same."""
    x = torch.rand(64, 8, generator=torch.Generator().manual_seed(step))
    return x, x.square().sum(dim=1, keepdim=True)


def main(steps=20, checkpoint="plain_pytorch.pt"):
    """Trains up to a step; returns model, optimizer and the loss of each step taken."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 1))
    groups = nomadam.decay_groups(model, weight_decay=1e-2)  # biases and norms do not decay
    optimizer = nomadam.SGDSaI(groups, lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=100)
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    if Path(checkpoint).exists():
        for name, state in torch.load(checkpoint, weights_only=True).items():
            parts[name].load_state_dict(state)

    losses = []
    while schedule.last_epoch < steps:
        x, y = batch_of(schedule.last_epoch)
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
    torch.save({name: part.state_dict() for name, part in parts.items()}, checkpoint)
    return model, optimizer, losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--checkpoint", default="plain_pytorch.pt")
    losses = main(**vars(parser.parse_args()))[-1]
    print(f"{len(losses)} steps, loss {losses[-1]:.4f}" if losses else "nothing left to do")
