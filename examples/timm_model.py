"""SGDSaI under its name in timm, with timm's groups, layer-wise rates and scheduler.

Run it as `python examples/timm_model.py`, and again with `--steps 40`: it goes on at step 20.
It needs timm and torchvision, which timm imports.
"""

import argparse
from pathlib import Path

import timm
import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import nn

from nomadam.integrations import register_timm

register_timm()


def batch_of(step):
    """16 small pictures and what each is of; a function of the step."""
    generator = torch.Generator().manual_seed(step)
    classes = torch.randint(4, (16,), generator=generator)
    pictures = torch.randn(16, 3, 32, 32, generator=generator)
    return pictures / 4 + classes.view(-1, 1, 1, 1), classes


def main(steps=20, checkpoint="timm_model.pt", **options):
    """Trains up to a step; returns model, optimizer and the loss of each step taken."""
    torch.manual_seed(0)
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=4, **size)
    options = {"lr": 2e-2, "weight_decay": 1e-2, "layer_decay": 0.75, **options}
    optimizer = create_optimizer_v2(model, "sgdsai", **options)
    schedule, _ = create_scheduler_v2(
        optimizer, "cosine", num_epochs=10, updates_per_epoch=10, step_on_epochs=False
    )
    done = 0
    if Path(checkpoint).exists():
        kept = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(kept["model"])
        optimizer.load_state_dict(kept["optimizer"])
        done = kept["step"]
    schedule.step_update(done)

    losses = []
    for step in range(done, steps):
        pictures, classes = batch_of(step)
        loss = nn.functional.cross_entropy(model(pictures), classes)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step_update(step + 1)
        losses.append(loss.item())
    if losses:  # a checkpoint of a later step keeps its number
        parts = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": steps}
        torch.save(parts, checkpoint)
    return model, optimizer, losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--checkpoint", default="timm_model.pt")
    losses = main(**vars(parser.parse_args()))[-1]
    print(f"{len(losses)} steps, loss {losses[-1]:.4f}" if losses else "nothing left to do")
