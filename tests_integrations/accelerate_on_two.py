"""What the test of accelerate has each of two processes do."""

import sys
from pathlib import Path

import accelerate_loop
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin


def with_ddp(folder):
    """Trains without a break, and with one."""
    accelerate_loop.main(20, folder / "whole")
    accelerate_loop.main(10, folder / "half")
    accelerate_loop.main(20, folder / "half")


class Sharding(Accelerator):
    """Prepares for FSDP2 on a CPU too, which accelerate itself keeps for accelerators."""

    def __init__(self, **options):
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["Linear"],
        )
        super().__init__(fsdp_plugin=plugin, **options)
        self.state.distributed_type = DistributedType.FSDP
        self.state.fsdp_plugin = plugin

    def save_state(self, _):
        """Nothing: saving is not forced too."""


def with_fsdp2(folder):
    accelerate_loop.Accelerator = Sharding
    accelerator, model, optimizer, _ = accelerate_loop.main(20, folder / "fsdp2")
    params = {name: param.full_tensor() for name, param in model.named_parameters()}
    if accelerator.is_main_process:
        cut = {name: type(param).__name__ for name, param in model.named_parameters()}
        gains = optimizer.optimizer.gains()
        torch.save({"params": params, "kinds": cut, "gains": gains}, folder / "fsdp2.pt")


if __name__ == "__main__":
    {"ddp": with_ddp, "fsdp2": with_fsdp2}[sys.argv[1]](Path(sys.argv[2]))
