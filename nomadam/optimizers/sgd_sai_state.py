"""How SGDSaI stores momentum and the compensation of bfloat16: made and converted."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nomadam.numerics.blockwise import dequantize, num_scales, quantize
from nomadam.optimizers.sgd_sai_blocks import Slot, gain_dtype, real

# A smaller tensor gains little by 8 bits, and norms and biases are the ones that would suffer.
SMALLEST_INT8 = 4096

INT8 = "int8"


def momentum_dtype(param: Tensor, option: torch.dtype | str | None) -> torch.dtype:
    """In which dtype a block keeps its momentum.

    Args:
        param: the block.
        option: ``None`` for its own dtype, but single precision for float16, whose range is too
            small; or a real dtype, which complex blocks keep as pairs; or ``"int8"``, which blocks
            below 4096 real elements answer with float32.

    Examples:
        >>> momentum_dtype(torch.zeros(64, 64), "int8"), momentum_dtype(torch.zeros(64), "int8")
        (torch.int8, torch.float32)
    """
    if option == INT8:
        numel = param.numel() * (2 if param.is_complex() else 1)
        return torch.int8 if numel >= SMALLEST_INT8 else torch.float32
    if isinstance(option, torch.dtype):
        return option
    return {torch.float16: torch.float32, torch.complex32: torch.complex64}.get(
        param.dtype, param.dtype
    )


def make_momentum(param: Tensor, option: torch.dtype | str | None, state: dict[str, Any]) -> None:
    """Puts a momentum of zeros into a block's state."""
    dtype = momentum_dtype(param, option)
    like = param.detach() if dtype.is_complex else real(param.detach())
    layout = torch.contiguous_format if dtype == torch.int8 else torch.preserve_format
    state["momentum_buffer"] = torch.zeros_like(like, dtype=dtype, memory_format=layout)
    state.pop("momentum_scale", None)
    if dtype == torch.int8:
        state["momentum_scale"] = like.new_zeros(num_scales(like.numel()), dtype=torch.float32)


def restore_momentum(
    param: Tensor,
    option: torch.dtype | str | None,
    state: dict[str, Any],
    saved: Mapping[str, Any],
) -> None:
    """Puts a saved momentum into a block's state, converted where it was kept otherwise.

    What was kept in the same way is copied bit for bit.
    """
    buffer, scale = saved["momentum_buffer"], saved.get("momentum_scale")
    make_momentum(param, option, state)
    ours = state["momentum_buffer"]
    if (scale is not None) != (ours.dtype == torch.int8):
        buffer = buffer.to(param.device)
        buffer = real(buffer) if scale is None else dequantize(buffer, scale.to(param.device))
        if scale is None:
            buffer, scale = quantize(buffer.to(torch.float32))
        elif ours.is_complex():
            buffer = torch.view_as_complex(buffer)
    elif ours.is_complex() != buffer.is_complex():
        buffer = real(buffer) if buffer.is_complex() else torch.view_as_complex(buffer.float())
    ours.copy_(buffer)
    if "momentum_scale" in state:
        state["momentum_scale"].copy_(scale)


def restore_block(slot: Slot, state: dict[str, Any], saved: Mapping[str, Any]) -> None:
    """Fills a block's state from a saved one, each tensor in the dtype that it is to have."""
    param = slot.param
    state.clear()  # what another optimizer kept is not carried along
    if isinstance(saved.get("momentum_buffer"), Tensor):
        restore_momentum(param, slot.group["momentum_dtype"], state, saved)
    if isinstance(saved.get("compensation"), Tensor):
        state["compensation"] = torch.zeros_like(param.detach()).copy_(saved["compensation"])
    if saved.get("gsnr") is not None:
        number = float(saved["gsnr"])
        number = number if 0.0 < number < math.inf else 0.0
        state["gsnr"] = torch.tensor(number, dtype=gain_dtype(param), device="cpu")


def keeps_compensation(param: Tensor, rounding: str) -> bool:
    """Whether a block is summed with a second bfloat16 beside it."""
    return rounding == "kahan" and param.dtype == torch.bfloat16


def is_stochastic(param: Tensor, group: Mapping[str, Any]) -> bool:
    """Whether what a block keeps in bfloat16 is rounded stochastically."""
    if torch.bfloat16 not in (param.dtype, group["momentum_dtype"]):
        return False
    return group["rounding"] in ("auto", "stochastic") and not group["differentiable"]
