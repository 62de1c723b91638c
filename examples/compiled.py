"""SGDSaI with torch.compile: a compiled model, and a compiled optimizer step.

Run it as `python examples/compiled.py`, and again with `--steps 40`: it goes on at step 20. It
needs a C++ compiler on the CPU, Triton on CUDA.
"""

import argparse
from pathlib import Path

import torch
from torch import nn

import nomadam


def batch_of(step):
    """64 points of a parabola."""
    x = torch.rand(64, 8, generator=torch.Generator().manual_seed(step))
    return x, x.square().sum(dim=1, keepdim=True)


def main(steps=20, checkpoint="compiled.pt", backend="inductor"):
    """Trains up to a step; returns model, optimizer and the loss of each step taken."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 1))
    compiled = torch.compile(model, backend=backend)
    # The parameters of the model itself: the names of the compiled one begin with "_orig_mod.".
    # The rate is a tensor, for a schedule that changes a float would have the step compiled again.
    optimizer = nomadam.SGDSaI(model.named_parameters(), lr=torch.tensor(1e-2))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=100)
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    if Path(checkpoint).exists():
        for name, state in torch.load(checkpoint, weights_only=True).items():
            parts[name].load_state_dict(state)

    @torch.compile(backend=backend)
    def take_step():
        optimizer.step()

    losses = []
    while schedule.last_epoch < steps:
        x, y = batch_of(schedule.last_epoch)
        loss = nn.functional.mse_loss(compiled(x), y)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        take_step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
    torch.save({name: part.state_dict() for name, part in parts.items()}, checkpoint)
    return model, optimizer, losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--checkpoint", default="compiled.pt")
    losses = main(**vars(parser.parse_args()))[-1]
    print(f"{len(losses)} steps, loss {losses[-1]:.4f}" if losses else "nothing left to do")
