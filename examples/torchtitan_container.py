"""SGDSaI in torchtitan: a `build_optimizers_fn` for its TrainSpec, run on its smallest Llama.

Run it as `python examples/torchtitan_container.py`, and again with `--steps 40`: it goes on at
step 20. With `torchrun --nproc-per-node 2` the model is cut by FSDP2. In a job of torchtitan's own
only `build_sgd_sai` is needed:

    spec = dataclasses.replace(get_train_spec("llama3"), build_optimizers_fn=build_sgd_sai)
    register_train_spec("llama3_sgd_sai", spec)  # then --model.name llama3_sgd_sai
"""

import argparse
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import fully_shard
from torchtitan.components.lr_scheduler import build_lr_schedulers
from torchtitan.components.optimizer import OptimizersContainer
from torchtitan.config import LRScheduler, Optimizer
from torchtitan.models.llama3 import Transformer, TransformerModelArgs

import nomadam


class SGDSaIContainer(OptimizersContainer):
    """One SGDSaI for each part of the model; its blocks keep their names."""

    def __init__(self, model_parts, optimizer_kwargs):
        """Makes them, biases and norms without decay."""
        self.model_parts = model_parts
        self.optimizers = []
        options = dict(optimizer_kwargs)
        decay = options.pop("weight_decay")
        for part in model_parts:
            groups = nomadam.decay_groups(part, decay)
            self.optimizers.append(nomadam.SGDSaI(groups, **options))
        params = [p for part in model_parts for p in part.parameters() if p.requires_grad]
        self._validate_length(len(model_parts))
        self._post_init(params, options)


def build_sgd_sai(model_parts, config, parallel_dims=None, ft_manager=None):
    """From the section `[optimizer]`: beta1 becomes the momentum; beta2 and eps go."""
    if config.early_step_in_backward:  # it would take each step before the clipping of the norm
        raise ValueError("early_step_in_backward=True: build_sgd_sai takes False only")
    if ft_manager and ft_manager.enabled:
        raise ValueError("fault_tolerance.enable=True: build_sgd_sai takes False only")
    options = {
        "lr": config.lr,
        "momentum": config.beta1,
        "weight_decay": config.weight_decay,
        "fused": config.implementation == "fused",
        "foreach": config.implementation == "foreach",
    }
    return SGDSaIContainer(model_parts, options)


def batch_of(step):
    """8 rows that count up, by strides of their own; a function of the step."""
    generator = torch.Generator().manual_seed(step)
    start, stride = torch.randint(1, 6, (2, 8, 1), generator=generator)
    rows = (start + stride * torch.arange(17)) % 32
    return rows[:, :-1], rows[:, 1:]


def main(steps=20, folder="torchtitan_container", implementation="foreach"):
    """Trains up to a step; returns model, container and the losses of this process's parts."""
    torch.manual_seed(0)
    sizes = {"dim": 64, "n_layers": 2, "n_heads": 4, "vocab_size": 32, "max_seq_len": 16}
    model = Transformer(TransformerModelArgs(**sizes))
    with torch.no_grad():
        model.init_weights()
    rank, size = 0, 1
    if torch.distributed.is_torchelastic_launched():
        torch.distributed.init_process_group()
        rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        fully_shard(model)
    config = Optimizer(lr=1e-2, weight_decay=1e-2, implementation=implementation)
    optimizers = build_sgd_sai([model], config)
    schedule = build_lr_schedulers(optimizers, LRScheduler(warmup_steps=5), 100)
    if Path(folder, ".metadata").exists():
        kept = {"model": get_model_state_dict(model), "optimizer": optimizers, "schedule": schedule}
        dcp.load(kept, checkpoint_id=folder)
        set_model_state_dict(model, kept["model"])

    losses = []
    for step in range(schedule.schedulers[0].last_epoch, steps):
        tokens, labels = (t.chunk(size)[rank] for t in batch_of(step))
        loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), labels.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizers.step()
        schedule.step()
        optimizers.zero_grad()
        losses.append(loss.item())
    kept = {"model": get_model_state_dict(model), "optimizer": optimizers, "schedule": schedule}
    dcp.save(kept, checkpoint_id=folder)
    return model, optimizers, losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--folder", default="torchtitan_container")
    losses = main(**vars(parser.parse_args()))[-1]
    print(f"{len(losses)} steps, loss {losses[-1]:.4f}" if losses else "nothing left to do")
