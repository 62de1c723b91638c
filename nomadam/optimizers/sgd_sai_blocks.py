"""What SGDSaI knows of one block: its place, its state, and what it reads from its group."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nomadam.numerics.moments import Moments, gsnr


class Slot(NamedTuple):
    """The place of a block in the optimizer."""

    name: str | int  # where unnamed the index, as in a state dict
    index: int
    param: Tensor
    group: dict[str, Any]


class Plan(NamedTuple):
    """What all blocks of a step decide together."""

    numel: int  # elements of all parameters
    limit: int  # elements of a temporary
    one_pass: bool  # whether the one-pass kernels are the default
    skips: bool  # whether a gradient that is not finite stops a step
    normalizes: bool  # whether gains are divided by the largest


class Block(NamedTuple):
    """A block with a gradient, and its state."""

    slot: Slot
    grad: Tensor
    state: dict[str, Any]
    gain: float  # as it was measured before this step; 0 where it was not, or is to be again
    starts: bool  # no gain yet, or no momentum yet
    remeasures: bool = False  # it has a gain, and this step measures it again


def real(tensor: Any) -> Any:
    """A complex tensor as reals, two an element, in a view; anything else as it is."""
    return torch.view_as_real(tensor) if tensor is not None and tensor.is_complex() else tensor


def gain_of(name: str | int, group: dict[str, Any], found: Moments, eps: float) -> float:
    """The gain, before any normalisation, of a block whose first gradient was found so."""
    gain = group["gain"]
    if gain == "gsnr":
        return gsnr(found, eps)
    if gain == "sqrt_numel":
        return math.sqrt(found.count)
    return gain[name] if isinstance(gain, Mapping) else gain


def divisor(group: dict[str, Any]) -> float:
    """What the gains of a group are divided by: 1, or the settled largest with ``normalize``."""
    return group["largest_gain"] or 1.0 if group["normalize"] else 1.0


def learning_rate(group: dict[str, Any], compiling: bool) -> float | Tensor:
    """A float where reading it costs nothing; else the tensor: no recompile, no synchronisation."""
    lr = group["lr"]
    if not isinstance(lr, Tensor):
        return lr
    on_device = lr.device.type != "cpu"
    return lr.reshape(()) if compiling or on_device or group["differentiable"] else lr.item()


def is_measured(state: Mapping[str, Any]) -> bool:
    """Whether a block has its gain: 0, or nothing, stands for not yet."""
    return "gsnr" in state and float(state["gsnr"]) > 0.0


def is_a_step(group: Mapping[str, Any], states: Mapping[Any, Any]) -> bool:
    """Whether a step counts: not one at rate 0 that was to make the state and measured nothing."""
    lr = group["lr"]
    on_host = not isinstance(lr, Tensor) or lr.device.type == "cpu"
    if not on_host or float(lr) != 0.0:
        return True
    return any(is_measured(states.get(param, {})) for param in group["params"])


def is_refreshed(group: Mapping[str, Any]) -> bool:
    """Whether this step measures the gains of a group again."""
    every, step = group["refresh"], group["refresh_step"]
    return every is not None and step > 0 and step % every == 0


def gain_dtype(param: Tensor) -> torch.dtype:
    """Float32, or float64 for float64 and complex128 blocks."""
    return torch.promote_types(param.dtype.to_real(), torch.float32)
