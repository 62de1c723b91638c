"""The paper's table of optimizer state and step time, and the state that our shapes give."""

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import torch

from nomadam.experiments.cost.models import MODELS, Tensors, on_meta
from nomadam.optimizers.baselines import BASELINES

# arXiv 2412.11768, Tables 1 and 3: GB of state and ms of a step, float32, one A100-80GB; None: out
# of memory. Their GB are near 2^30 bytes.
PAPER: Mapping[str, Mapping[str, tuple[float, float | None]]] = MappingProxyType(
    {
        "vit_s_16": {
            "sgdm": (0.08, 7.9), "adamw": (0.17, 45), "adam_mini": (0.08, 84),
            "prodigy": (0.33, 78), "sgd_sai": (0.08, 12.4),
        },
        "vit_h_14": {
            "sgdm": (2.42, 40), "adamw": (4.86, 124), "adam_mini": (2.54, 220),
            "prodigy": (9.70, 260), "sgd_sai": (2.42, 54),
        },
        "gpt2_xl": {
            "sgdm": (5.93, 41), "adamw": (11.86, 138), "adam_mini": (6.52, 223),
            "prodigy": (23.72, 360), "sgd_sai": (5.93, 68),
        },
        "llama2_7b": {
            "sgdm": (25.15, 100), "adamw": (49.48, None), "adam_mini": (27.21, 421),
            "prodigy": (98.96, None), "sgd_sai": (25.15, 180),
        },
    }
)  # fmt: skip
# Our settings beside the paper's optimizers: arguments of SGDSaI, and the dtype of the weights.
SETTINGS: Mapping[str, tuple[dict[str, Any], torch.dtype]] = MappingProxyType(
    {
        "sgd_sai, bf16 momentum": ({"momentum_dtype": torch.bfloat16}, torch.float32),
        "sgd_sai, int8 momentum": ({"momentum_dtype": "int8"}, torch.float32),
    }
)


def state_table(models: Iterable[str] = PAPER) -> dict[str, dict[str, int]]:
    """Bytes of state for each model of the paper's table, from shapes alone.

    Args:
        models: of `PAPER`; default all.

    Returns:
        Model to optimizer to bytes: those of the paper in float32, then ours with small momentum.
    """
    return {model: _of_model(on_meta(MODELS[model]), PAPER[model]) for model in models}


def _of_model(module: Tensors, names: Mapping[str, Any]) -> dict[str, int]:
    found = {name: BASELINES[name].state_bytes(module) for name in names}
    row = BASELINES["sgd_sai"]
    for label, (arguments, dtype) in SETTINGS.items():
        found[label] = row.state_bytes(module.to(dtype), **arguments)
    return found
