"""How many bytes of state each optimizer keeps for a model, from its shapes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from nomadam.numerics.blockwise import num_scales
from nomadam.optimizers.adam_mini import mini_groups
from nomadam.optimizers.apollo_mini import apollo_mini_groups
from nomadam.optimizers.muon_pair import muon_groups
from nomadam.optimizers.options import named_dtype
from nomadam.optimizers.param_groups import trainable_parameters
from nomadam.optimizers.scale import scale_groups
from nomadam.optimizers.sgd_sai_rows import row_groups
from nomadam.optimizers.sgd_sai_state import keeps_compensation, momentum_dtype


def copies(number: int) -> Callable[[nn.Module, dict[str, Any]], int]:
    """That many tensors like each parameter."""

    def count(model: nn.Module, arguments: dict[str, Any]) -> int:
        tensors = [parameter for _, parameter, _ in trainable_parameters(model)]
        return sum(number * p.numel() * p.element_size() for p in tensors)

    return count


def momentum_state(model: nn.Module, arguments: dict[str, Any]) -> int:
    """One buffer, none at a momentum of 0."""
    return copies(1)(model, arguments) if arguments["momentum"] else 0


def sgd_sai_state(model: nn.Module, arguments: dict[str, Any]) -> int:
    """The momentum, with its scales in 8 bits, and what kahan keeps; none at a momentum of 0."""
    option, total = named_dtype(arguments["momentum_dtype"]), 0
    for _, p, _ in trainable_parameters(model):
        if arguments["momentum"]:
            dtype = momentum_dtype(p, option)
            pairs = 2 if p.is_complex() and not dtype.is_complex else 1
            total += pairs * p.numel() * dtype.itemsize
            total += 4 * num_scales(pairs * p.numel()) if dtype == torch.int8 else 0
        if keeps_compensation(p, arguments["rounding"]):
            total += p.numel() * p.element_size()
    return total


def plain_sgd_sai_state(model: nn.Module, arguments: dict[str, Any]) -> int:
    """Of SGDSaI without a choice of dtypes."""
    return sgd_sai_state(model, {"momentum_dtype": None, "rounding": "auto", **arguments})


def row_state(model: nn.Module, arguments: dict[str, Any]) -> int:
    """One buffer, and a number for each row of embeddings and output layer."""
    total = 0
    for group in row_groups(model, 0.0, **_of(arguments, "head", "rest")):
        for _, p in group["params"]:
            rows = (
                p.numel() // max(p.shape[group["row_dim"]], 1)
                if group["row_dim"] is not None
                else 0
            )
            wide = torch.promote_types(p.dtype, torch.float32)
            total += p.numel() * p.element_size() + rows * wide.itemsize
    return total


def adam_mini_state(model: nn.Module, arguments: dict[str, Any]) -> int:
    """The first moment, and a number for each block."""
    keys = ("head_dim", "blocks", "decay_embeddings")
    groups = mini_groups(model, 0.0, **{key: arguments[key] for key in keys})
    return sum(
        (p.numel() + sum(count for count, _ in group["blocks"])) * p.element_size()
        for group in groups
        for _, p in group["params"]
    )


def prodigy_state(model: nn.Module, arguments: dict[str, Any]) -> int:
    """Two moments, the averaged gradient and the start, which is not kept where it is 0."""
    total = 0
    for _, p, _ in trainable_parameters(model):
        slice_numel = math.ceil(p.numel() / arguments["slice_p"])
        kept = slice_numel if p.is_meta or bool(p.any()) else 0
        total += (2 * p.numel() + slice_numel + kept) * p.element_size()
    return total


def adafactor_state(model: nn.Module, arguments: dict[str, Any]) -> int:
    """Rows and columns of the last two dimensions; all of the second moment of vectors."""
    total = 0
    for _, p, _ in trainable_parameters(model):
        numel = p.numel()
        if p.ndim > 1:
            numel = numel // max(p.shape[-1], 1) + numel // max(p.shape[-2], 1)
        total += numel * p.element_size()
    return total


def muon_state(model: nn.Module, arguments: dict[str, Any]) -> int:
    """One buffer for hidden matrices, two for the rest."""
    keys = ("head", "adamw", "convolutions", "decay_embeddings")
    return sum(
        (1 if group["method"] == "muon" else 2) * p.numel() * p.element_size()
        for group in muon_groups(model, 0.0, **{key: arguments[key] for key in keys})
        for _, p in group["params"]
    )


def scale_state(model: nn.Module, arguments: dict[str, Any]) -> int:
    """One buffer for the output layer, two for vectors, nothing for the rest."""
    buffers = {"column": 0, "last": 1, "adamw": 2}
    return sum(
        buffers[group["method"]] * p.numel() * p.element_size()
        for group in scale_groups(model, 0.0, **_of(arguments, "head", "rest"))
        for _, p in group["params"]
    )


def apollo_mini_state(model: nn.Module, arguments: dict[str, Any]) -> int:
    """Two numbers for each row or column, whichever are more; two buffers for the rest."""
    total = 0
    for group in apollo_mini_groups(model, 0.0, **_of(arguments, "head", "adamw")):
        for _, p in group["params"]:
            if group["method"] == "adamw":
                total += 2 * p.numel() * p.element_size()
            elif p.numel():
                longer = max(p.shape[0], p.numel() // p.shape[0])
                total += 2 * longer * torch.promote_types(p.dtype, torch.float32).itemsize
    return total


def _of(arguments: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: arguments[key] for key in keys}
