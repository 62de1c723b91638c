"""SGDSaI in Ray Train: DDP over workers, with a checkpoint to go on from.

Run it as `python examples/ray_train.py`, and again with `--steps 40`: it goes on at step 20.
On a cluster `storage` is a folder that all machines see, or an address as s3://bucket/folder.
"""

import argparse
import tempfile
from pathlib import Path

import ray.train
import ray.train.torch
import torch
from ray.train import Checkpoint, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from torch import nn

import nomadam


def batch_of(step):
    """64 points of a parabola; a function of the step, so that a continued run sees the same."""
    x = torch.rand(64, 8, generator=torch.Generator().manual_seed(step))
    return x, x.square().sum(dim=1, keepdim=True)


def train_worker(config):
    """What each worker runs."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 1))
    groups = nomadam.decay_groups(model, weight_decay=1e-2)  # biases and norms do not decay
    optimizer = nomadam.SGDSaI(groups, lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=100)
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    kept = ray.train.get_checkpoint()
    if kept:
        with kept.as_directory() as folder:
            for name, state in torch.load(Path(folder, "state.pt"), weights_only=True).items():
                parts[name].load_state_dict(state)
    wrapped = ray.train.torch.prepare_model(model)  # moves it, and wraps it in DDP

    context = ray.train.get_context()
    rank, size = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    while schedule.last_epoch < config["steps"]:
        step = schedule.last_epoch
        x, y = (tensor.chunk(size)[rank].to(device) for tensor in batch_of(step))
        loss = nn.functional.mse_loss(wrapped(x), y)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = None
            if rank == 0 and (step + 1) % 10 == 0:
                state = {name: part.state_dict() for name, part in parts.items()}
                torch.save(state, Path(folder, "state.pt"))
                checkpoint = Checkpoint.from_directory(folder)
            ray.train.report({"step": step, "loss": loss.item()}, checkpoint=checkpoint)


def main(steps=20, storage="ray_results", workers=2):
    """Trains up to a step, from the last checkpoint in the storage on; returns Ray's result."""
    if "://" not in str(storage):
        storage = Path(storage).resolve()
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"steps": steps},
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=torch.cuda.is_available()),
        run_config=RunConfig(name="parabola", storage_path=str(storage)),
    )
    return trainer.fit()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--storage", default="ray_results")
    parser.add_argument("--workers", type=int, default=2)
    metrics = main(**vars(parser.parse_args())).metrics
    print(f"step {metrics['step']}, loss {metrics['loss']:.4f}" if metrics else "nothing to do")
