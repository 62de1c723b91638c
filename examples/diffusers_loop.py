"""SGDSaI in a training loop of diffusers: a small UNet, or a DiT whose gates begin at zero.

Run it as `python examples/diffusers_loop.py --model dit`; again with `--steps 60` it goes on at
step 30.
"""

import argparse
from pathlib import Path

import torch
from diffusers import DDPMScheduler, DiTTransformer2DModel, UNet2DModel
from torch import nn

import nomadam


def unet():
    """A UNet of two resolutions for pictures of 1 x 8 x 8; the labels are its classes."""
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    widths = {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8}
    pictures = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "num_class_embeds": 4}
    return UNet2DModel(**pictures, **blocks, **widths)


def dit():
    """A DiT of two layers, each of which is the identity at first (adaLN-zero)."""
    shape = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2}
    pictures = {"sample_size": 8, "patch_size": 2, "in_channels": 1, "out_channels": 1}
    model = DiTTransformer2DModel(**shape, **pictures, num_embeds_ada_norm=4, norm_num_groups=1)
    for block in model.transformer_blocks:
        nn.init.zeros_(block.norm1.linear.weight)
        nn.init.zeros_(block.norm1.linear.bias)
    nn.init.zeros_(model.proj_out_2.weight)
    nn.init.zeros_(model.proj_out_2.bias)
    return model


def batch_of():
    """16 pictures of one brightness each, by their label, and the noise and times of a step."""
    labels = torch.randint(4, (16,))
    clean = (labels.float() / 2 - 0.75).view(-1, 1, 1, 1).expand(16, 1, 8, 8)
    return clean, labels, torch.randn(clean.shape), torch.randint(1000, (16,))


def main(steps=30, make=dit, checkpoint="diffusers_loop.pt"):
    """Trains up to a step; returns model, optimizer and the loss of each step taken."""
    torch.manual_seed(0)
    model = make().train()
    noising = DDPMScheduler(num_train_timesteps=1000)
    optimizer = nomadam.SGDSaI(nomadam.decay_groups(model, weight_decay=1e-2), lr=5e-3)
    done, losses = 0, []
    if Path(checkpoint).exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        torch.set_rng_state(saved["random"])
        done = saved["step"]
    for _ in range(done, steps):
        clean, labels, noise, times = batch_of()
        predicted = model(noising.add_noise(clean, noise, times), times, class_labels=labels).sample
        loss = nn.functional.mse_loss(predicted, noise)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    states = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    states |= {"random": torch.get_rng_state(), "step": max(done, steps)}
    torch.save(states, checkpoint)
    return model, optimizer, losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--model", choices=["unet", "dit"], default="dit")
    asked = parser.parse_args()
    losses = main(asked.steps, {"unet": unet, "dit": dit}[asked.model], f"{asked.model}.pt")[-1]
    print(f"{len(losses)} steps, loss {losses[-1]:.4f}" if losses else "nothing left to do")
