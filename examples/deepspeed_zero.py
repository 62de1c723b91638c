"""SGDSaI under DeepSpeed, where ZeRO flattens the parameters: the gains are measured before.

Run it as `torchrun --nproc-per-node 2 examples/deepspeed_zero.py --stage 2`, and again with
`--steps 40`: it goes on at step 20. On a GPU `deepspeed examples/deepspeed_zero.py` does too.
"""

import argparse
import os
from pathlib import Path

import deepspeed
import torch
from torch import nn

import nomadam

CONFIG = {
    "train_micro_batch_size_per_gpu": 1,  # DeepSpeed asks for it, and only loaders of its own obey
    "gradient_clipping": 1.0,
    "zero_allow_untested_optimizer": True,  # it tests its own alone
}


def batch_of(step):
    """64 points of a parabola; a function of the step, so that a continued run sees the same."""
    x = torch.rand(64, 8, generator=torch.Generator().manual_seed(step))
    return x, x.square().sum(dim=1, keepdim=True)


def loss_of(model, batch):
    """The mean loss of a batch of the global size, or of a part of it."""
    return nn.functional.mse_loss(model(batch[0]), batch[1])


def gains_of(model, file):
    """Gain of each block: measured once, by one process on the first batch, then read."""
    if deepspeed.comm.get_rank() == 0 and not file.exists():
        nomadam.save_gains(nomadam.measure_gains(model, loss_of, [batch_of(0)]), file)
    deepspeed.comm.barrier()
    return nomadam.load_gains(file)


def main(stage=2, steps=20, folder="deepspeed_zero"):
    """Trains up to a step; returns the engine and the losses of this process's parts."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    deepspeed.init_distributed()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 1))
    if stage == 0:  # blocks stay what they are, and are measured in the first step
        optimizer = nomadam.SGDSaI(model.named_parameters(), lr=1e-2, weight_decay=1e-2)
    else:
        gains = gains_of(model, folder / "gains.json")
        groups = nomadam.scaled_param_groups(model, gains, lr=1e-2, weight_decay=1e-2)
        optimizer = nomadam.SGDSaI(groups, gain=1.0)
    engine, _, _, schedule = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        lr_scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=100),
        config={**CONFIG, "zero_optimization": {"stage": stage}},
    )
    if (folder / "latest").exists():
        engine.load_checkpoint(str(folder))

    rank, size = deepspeed.comm.get_rank(), deepspeed.comm.get_world_size()
    losses = []
    while engine.global_steps < steps:
        part = [
            tensor.chunk(size)[rank].to(engine.device) for tensor in batch_of(engine.global_steps)
        ]
        loss = loss_of(engine, part)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    engine.save_checkpoint(str(folder))
    return engine, losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--stage", type=int, default=2, choices=(0, 1, 2))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--folder", default="deepspeed_zero")
    given = parser.parse_args()
    if "RANK" not in os.environ:
        parser.error("start it by torchrun or deepspeed, which say who is who")
    losses = main(**vars(given))[-1]
    if deepspeed.comm.get_rank() == 0:
        print(f"{len(losses)} steps, loss {losses[-1]:.4f}" if losses else "nothing left to do")
