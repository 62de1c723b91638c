"""SGDSaI with LoRA factors of peft: a frozen Llama, in a plain loop and under the Trainer.

Run it as `python examples/peft_lora.py`, and again with `--steps 40`: it goes on at step 20.
With `--trainer` it goes on where `--resume peft_lora/checkpoint-10` says so.
"""

import argparse
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import nomadam

LENGTH = 32


def model_of():
    """A small Llama with factors of rank 4, of which B begins at zero, so that A waits a step."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, **shape, **heads))
    targets = ["q_proj", "v_proj", "lm_head"]
    return get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=targets))


def dataset_of(samples=256):
    """Windows of the source of argparse, a byte a token."""
    text = torch.tensor(list(Path(argparse.__file__).read_bytes()[: samples * LENGTH]))
    return [{"input_ids": window, "labels": window} for window in text.split(LENGTH)]


def main(steps=20, checkpoint="peft_lora.pt"):
    """Trains in a plain loop up to a step; returns model, optimizer and losses."""
    model = model_of()
    trainable = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    optimizer = nomadam.SGDSaI(trainable, lr=0.1, weight_decay=0.0)
    done, losses = 0, []
    if Path(checkpoint).exists():
        saved = torch.load(checkpoint, weights_only=True)
        set_peft_model_state_dict(model, saved["factors"])
        optimizer.load_state_dict(saved["optimizer"])
        done = saved["step"]
    batches = torch.stack([window["input_ids"] for window in dataset_of()]).split(8)
    for step in range(done, steps):
        batch = batches[step % len(batches)]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    states = {"factors": get_peft_model_state_dict(model), "optimizer": optimizer.state_dict()}
    torch.save({**states, "step": max(done, steps)}, checkpoint)
    return model, optimizer, losses


def with_trainer(folder="peft_lora", steps=20, resume=None):
    """The same under the Trainer, whose checkpoints keep the factors alone; returns it."""
    settings = TrainingArguments(
        folder,
        max_steps=steps,
        max_grad_norm=1.0,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_steps=10,
        use_cpu=not torch.cuda.is_available(),
        report_to="none",
        disable_tqdm=True,
    )
    ours = {"optimizer_cls_and_kwargs": (nomadam.SGDSaI, {"lr": 0.1})}
    trainer = Trainer(model_of(), settings, train_dataset=dataset_of(), **ours)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--trainer", action="store_true")
    parser.add_argument("--resume", help="with --trainer, such as peft_lora/checkpoint-10")
    asked = parser.parse_args()
    if asked.trainer:
        history = with_trainer(steps=asked.steps, resume=asked.resume).state.log_history
        losses = [entry["loss"] for entry in history if "loss" in entry]
    else:
        losses = main(asked.steps)[-1]
    print(f"{len(losses)} steps, loss {losses[-1]:.4f}" if losses else "nothing left to do")
