"""SGDSaI with torch.compile: a compiled model, and a compiled optimizer step.

Run it as `python examples/compiled.py`. It needs a C++ compiler on the CPU, Triton on CUDA.
"""

import torch
from torch import nn

import nomadam


def batch_of(step):
    """64 points of a parabola."""
    x = torch.rand(64, 8, generator=torch.Generator().manual_seed(step))
    return x, x.square().sum(dim=1, keepdim=True)


def main(steps=20, backend="inductor"):
    """Trains; returns model, optimizer and the loss of each step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 1))
    compiled = torch.compile(model, backend=backend)
    # The parameters of the model itself: the names of the compiled one begin with "_orig_mod.".
    # The rate is a tensor, for a schedule that changes a float would have the step compiled again.
    optimizer = nomadam.SGDSaI(model.named_parameters(), lr=torch.tensor(1e-2))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=100)

    @torch.compile(backend=backend)
    def take_step():
        optimizer.step()

    losses = []
    for step in range(steps):
        x, y = batch_of(step)
        loss = nn.functional.mse_loss(compiled(x), y)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        take_step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
    return model, optimizer, losses


if __name__ == "__main__":
    print(f"20 steps, loss {main()[-1][-1]:.4f}")
