"""SGDSaI in Lightning's Trainer: schedule, clipping, and a checkpoint to go on from.

Run it as `python examples/lightning_trainer.py`, and again with `--epochs 4`: it goes on after
epoch 2.
"""

import argparse
from pathlib import Path

import lightning
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import nomadam


class Parabola(lightning.LightningModule):
    """Learns a parabola, and keeps the loss of each step."""

    def __init__(self):
        """Makes the layers."""
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 1))
        self.losses = []

    def training_step(self, batch, _):
        """The mean loss of a batch."""
        loss = nn.functional.mse_loss(self.net(batch[0]), batch[1])
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        """Biases and norms do not decay; the schedule counts steps."""
        groups = nomadam.decay_groups(self, weight_decay=1e-2)
        optimizer = nomadam.SGDSaI(groups, lr=1e-2)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=100)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def batches():
    """10 batches an epoch, always in the same order, so that a continued run sees the same."""
    x = torch.rand(640, 8, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(x, x.square().sum(dim=1, keepdim=True)), batch_size=64)


def main(epochs=2, folder="lightning_trainer"):
    """Trains up to an epoch; returns the trainer, its model and the loss of each step taken."""
    lightning.seed_everything(0, verbose=False)
    model = Parabola()
    trainer = lightning.Trainer(
        max_epochs=epochs,
        gradient_clip_val=1.0,  # of the norm
        accelerator="auto",
        default_root_dir=folder,
        callbacks=[lightning.pytorch.callbacks.ModelCheckpoint(folder, save_last=True)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    last = Path(folder, "last.ckpt")
    trainer.fit(model, batches(), ckpt_path=last if last.exists() else None)
    return trainer, model.losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--folder", default="lightning_trainer")
    losses = main(**vars(parser.parse_args()))[-1]
    print(f"{len(losses)} steps, loss {losses[-1]:.4f}" if losses else "nothing left to do")
