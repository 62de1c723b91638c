"""How SGDSaI stores momentum and the compensation of bfloat16: made and converted."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nomadam.numerics.blockwise import BLOCK, dequantize, num_scales, quantize
from nomadam.numerics.sharded import is_sharded, laid_out, local, part_of, shard_dims
from nomadam.optimizers.sgd_sai_blocks import Slot, gain_dtype, real

# A smaller tensor gains little by 8 bits, and norms and biases are the ones that would suffer.
SMALLEST_INT8 = 4096

INT8 = "int8"
OWN = ("momentum_buffer", "momentum_scale", "compensation", "gsnr")


def momentum_dtype(param: Tensor, option: torch.dtype | str | None) -> torch.dtype:
    """In which dtype a block keeps its momentum.

    Args:
        param: the block.
        option: ``None`` for its own dtype, but single precision for float16, whose range is too
            small; or a real dtype, which complex blocks keep as pairs; or ``"int8"``, which blocks
            below 4096 real elements answer with float32, and sharded blocks of which a part would
            end within the 128 elements of a scale with bfloat16.

    Examples:
        >>> momentum_dtype(torch.zeros(64, 64), "int8"), momentum_dtype(torch.zeros(64), "int8")
        (torch.int8, torch.float32)
    """
    if option == INT8:
        numel = param.numel() * (2 if param.is_complex() else 1)
        if numel < SMALLEST_INT8:
            return torch.float32
        return torch.int8 if not is_sharded(param) or keeps_scales_whole(param) else torch.bfloat16
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
        scales = torch.zeros(scale_shape(local(like).shape), device=local(like).device)
        if is_sharded(param):
            scales = laid_out(scales, param, scale_shape(like.shape))
        state["momentum_scale"] = scales


def scale_shape(shape: Sequence[int]) -> list[int]:
    """The shape of the scales of int8 codes: a 128th of the codes', where rows are multiples of it.

    A row is an index of the first dimension. So scales are sharded as their codes are; those of
    other rows are one vector.

    Examples:
        >>> scale_shape([10, 256]), scale_shape([10, 8, 16]), scale_shape([10, 200])
        ([10, 2], [10, 1, 1], [16])
    """
    for d in range(len(shape) - 1, 0, -1):
        inner = math.prod(shape[d:])
        if inner % BLOCK == 0:
            return [*shape[:d], inner // BLOCK, *[1] * (len(shape) - d - 1)]
    return [num_scales(math.prod(shape))]


def keeps_scales_whole(param: Any) -> bool:
    """Whether no scale of a sharded block has elements of two parts of it."""
    shape = (*param.shape, 2) if param.is_complex() else param.shape
    in_rows = math.prod(shape[1:]) % BLOCK == 0
    cut = shard_dims(param)
    for dim in cut:
        d = param.placements[dim].dim % param.ndim
        size, inner = shape[d], math.prod(shape[d + 1 :])
        num_parts = param.device_mesh.size(dim)
        if num_parts == 1 and d == 0:
            continue
        part = -(-size // num_parts) * inner
        if d > 0 and (size * inner % BLOCK or part % BLOCK):
            return False
        # Scales in one vector are cut evenly, and so have to be the rows.
        if not in_rows and (d > 0 or len(cut) > 1 or size % num_parts or part % BLOCK):
            return False
    return True


def restore_momentum(
    param: Tensor,
    option: torch.dtype | str | None,
    state: dict[str, Any],
    saved: Mapping[str, Any],
) -> None:
    """Puts a saved momentum into a block's state, converted where it was kept otherwise.

    What was kept in the same way is copied bit for bit.
    """
    kept, scale = saved["momentum_buffer"], saved.get("momentum_scale")
    make_momentum(param, option, state)
    buffer = state["momentum_buffer"]
    ours, scales = local(buffer), state.get("momentum_scale")
    if scale is not None and scales is not None:
        scale = scale if is_sharded(scale) else scale.reshape(scale_shape(kept.shape))
        ours.copy_(part_of(kept, buffer))
        local(scales).copy_(part_of(scale, scales))
        return
    part = part_of(kept if scale is None else _decoded(kept, scale), buffer).to(param.device)
    if scales is not None:
        codes, found = quantize(real(part).to(torch.float32))
        local(scales).view(-1).copy_(found)
        ours.copy_(codes)
    elif ours.is_complex() != part.is_complex():
        ours.copy_(real(part) if part.is_complex() else torch.view_as_complex(part.float()))
    else:
        ours.copy_(part)


def _decoded(codes: Tensor, scales: Tensor) -> Tensor:
    """The float32 momentum of codes that are whole or sharded, and so are their scales."""
    values = dequantize(local(codes), local(scales).reshape(-1).to(codes.device))
    return laid_out(values, codes, codes.shape) if is_sharded(codes) else values


def restore_block(slot: Slot, state: dict[str, Any], saved: Mapping[str, Any]) -> None:
    """Fills a block's state from a saved one, each tensor in the dtype that it is to have.

    What a wrapper has put beside ours, as Lookahead its slow weights, stays as torch loaded it.
    """
    param = slot.param
    ours = saved.get("gsnr") is not None  # what another optimizer kept is not carried along
    beside = {key: kept for key, kept in state.items() if ours and key not in OWN}
    state.clear()
    state.update(beside)
    if isinstance(saved.get("momentum_buffer"), Tensor):
        restore_momentum(param, slot.group["momentum_dtype"], state, saved)
    if isinstance(saved.get("compensation"), Tensor):
        state["compensation"] = torch.zeros_like(param.detach())
        local(state["compensation"]).copy_(part_of(saved["compensation"], state["compensation"]))
    if saved.get("gsnr") is not None:
        number = float(saved["gsnr"])
        number = number if 0.0 < number < math.inf else 0.0
        state["gsnr"] = torch.tensor(number, dtype=gain_dtype(param), device="cpu")


def keeps_compensation(param: Tensor, rounding: str) -> bool:
    """Whether a block is summed with a second bfloat16 beside it."""
    return rounding == "kahan" and param.dtype == torch.bfloat16


def is_stochastic(param: Tensor, group: Mapping[str, Any]) -> bool:
    """Whether what a block keeps in bfloat16 is rounded stochastically."""
    if torch.bfloat16 not in (param.dtype, momentum_dtype(param, group["momentum_dtype"])):
        return False
    return group["rounding"] in ("auto", "stochastic") and not group["differentiable"]
