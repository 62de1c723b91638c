"""SGDSaI under automatic mixed precision: float16, with torch's GradScaler.

Run it as `python examples/mixed_precision.py`, and again with `--steps 60`: it goes on at step 30.
"""

import argparse
from pathlib import Path

import torch
from torch import nn

import nomadam

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def batch_of(step):
    """64 points of a parabola; a function of the step, so that a continued run sees the same."""
    x = torch.rand(64, 8, generator=torch.Generator().manual_seed(step))
    return x.to(DEVICE), x.square().sum(dim=1, keepdim=True).to(DEVICE)


def main(steps=30, checkpoint="mixed_precision.pt", scale=2.0**16, dtype=torch.float16):
    """Trains up to a step; returns model, optimizer, scaler and the loss of each step taken."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 1)).to(DEVICE)
    optimizer = nomadam.SGDSaI(model.named_parameters(), lr=1e-2)
    # bfloat16 has the range of float32 and needs no scaler.
    scaler = torch.amp.GradScaler(DEVICE, init_scale=scale, enabled=dtype == torch.float16)
    parts = {"model": model, "optimizer": optimizer, "scaler": scaler}
    done = 0
    if Path(checkpoint).exists():
        saved = torch.load(checkpoint, weights_only=True)
        done = saved.pop("step")
        for name, state in saved.items():
            parts[name].load_state_dict(state)

    losses = []
    for step in range(done, steps):
        x, y = batch_of(step)
        with torch.autocast(DEVICE, dtype=dtype):
            loss = nn.functional.mse_loss(model(x), y)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)  # before the clipping, which is in units of the gradient
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)  # left out where a gradient overflowed, at a smaller scale then
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
    states = {name: part.state_dict() for name, part in parts.items()}
    torch.save({**states, "step": max(done, steps)}, checkpoint)
    return model, optimizer, scaler, losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--checkpoint", default="mixed_precision.pt")
    losses = main(**vars(parser.parse_args()))[-1]
    print(f"{len(losses)} steps, loss {losses[-1]:.4f}" if losses else "nothing left to do")
