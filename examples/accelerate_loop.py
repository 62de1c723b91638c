"""SGDSaI in a loop of accelerate: prepare, accumulate, save_state, load_state.

Run it as `python examples/accelerate_loop.py`, or on two processes, of a machine without a GPU too,
as `accelerate launch --multi_gpu --num_processes 2 examples/accelerate_loop.py`; again with
`--steps 40` it goes on at step 20.
"""

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import nomadam

ACCUMULATED = 2  # batches to a step


def dataset_of():
    """Points of a parabola, an epoch of 64 steps."""
    x = torch.rand(64 * ACCUMULATED * 32, 8, generator=torch.Generator().manual_seed(0))
    return TensorDataset(x, x.square().sum(dim=1, keepdim=True))


def model_of():
    """A small network, the same in every process."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 1))


def main(steps=20, folder="accelerate_loop"):
    """Trains up to a step; returns accelerator, model, optimizer and the last loss, or None."""
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),  # else processes without a GPU know nothing of another
        gradient_accumulation_steps=ACCUMULATED,
        dataloader_config=DataLoaderConfiguration(split_batches=True),  # 32 points over all
    )
    model = model_of()
    optimizer = nomadam.SGDSaI(nomadam.decay_groups(model, weight_decay=1e-2), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=100)
    points = DataLoader(dataset_of(), batch_size=32)
    model, optimizer, points = accelerator.prepare(model, optimizer, points)
    accelerator.register_for_checkpointing(schedule)
    if Path(folder, "custom_checkpoint_0.pkl").exists():  # the schedule, which is saved last
        accelerator.load_state(folder)

    loss = None
    while schedule.last_epoch < steps:  # an epoch, or what is left of one
        seen = ACCUMULATED * schedule.last_epoch % len(points)
        for x, y in accelerator.skip_first_batches(points, seen):
            with accelerator.accumulate(model):
                loss = nn.functional.mse_loss(model(x), y)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()  # does nothing until gradients are summed up
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                schedule.step()
                if schedule.last_epoch == steps:
                    break
    accelerator.save_state(folder)
    if loss is not None:
        loss = accelerator.reduce(loss.detach(), "mean").item()
    return accelerator, model, optimizer, loss


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--folder", default="accelerate_loop")
    accelerator, _, _, loss = main(**vars(parser.parse_args()))
    accelerator.print("nothing left to do" if loss is None else f"loss {loss:.4f}")
