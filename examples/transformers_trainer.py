"""SGDSaI under the Trainer of transformers: a byte-level GPT of two layers.

Run it as `python examples/transformers_trainer.py`, or with `--named`, for gains by name; by
`torchrun --nproc-per-node 2` on two processes.
"""

import argparse
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import nomadam

LENGTH = 32


def dataset_of(samples):
    """Windows of the source of argparse, a byte a token."""
    text = torch.tensor(list(Path(argparse.__file__).read_bytes()[: samples * LENGTH]))
    return [{"input_ids": window, "labels": window} for window in text.split(LENGTH)]


def model_of():
    """The same at every call."""
    torch.manual_seed(0)
    shape = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": LENGTH}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    tokens = {"vocab_size": 256, "bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(**shape, **dropout, **tokens))


def main(folder="transformers_trainer", steps=20, samples=256, named=False, resume=None):
    """Trains up to a step, from a checkpoint of the folder if one is named; returns the Trainer."""
    model = model_of()
    settings = TrainingArguments(
        folder,
        max_steps=steps,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        max_grad_norm=1.0,
        weight_decay=2e-2,
        lr_scheduler_type="cosine",
        warmup_steps=2,
        logging_steps=1,
        save_steps=10,
        use_cpu=not torch.cuda.is_available(),
        report_to="none",
        disable_tqdm=True,
    )
    if named:
        groups = nomadam.decay_groups(model, settings.weight_decay)
        optimizer = {"optimizers": (nomadam.SGDSaI(groups, lr=1e-2), None)}
    else:
        # The Trainer makes the groups: with its weight_decay and without. It takes the learning
        # rate from here, not from its own settings, and hands over no names.
        optimizer = {"optimizer_cls_and_kwargs": (nomadam.SGDSaI, {"lr": 1e-2})}
    trainer = Trainer(model, settings, train_dataset=dataset_of(samples), **optimizer)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", default="transformers_trainer")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--named", action="store_true")
    parser.add_argument("--resume", help="such as transformers_trainer/checkpoint-10")
    trainer = main(**vars(parser.parse_args()))
    print(f"{trainer.state.global_step} steps, loss {trainer.state.log_history[-2]['loss']:.4f}")
