"""The update of SGD-SaI, from tensors and numbers alone: for one block, and for many at a time."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nomadam.numerics.blockwise import BLOCK, cut, dequantize, quantize
from nomadam.numerics.rounding import (
    Draw,
    high_half,
    low_half,
    random_bits,
    round_stochastically,
)
from nomadam.numerics.slices import packed, slices


class Row(NamedTuple):
    """What the update of one block, or of a piece of it, reads and writes.

    Attributes:
        param: real tensor of any shape and floating dtype.
        grad: gradient, of the shape of ``param``; not modified.
        momentum_buffer: holds the first gradient at the first step; ``None`` for a momentum of 0.
        gain: number that multiplies the step, a float or a 0-d tensor on the host.
        momentum_scale: the scales of an int8 ``momentum_buffer`` (see `quantize`).
        compensation: bfloat16, what ``param`` lacks of the sum of its updates.
        draw: names the random bits; ``None`` where all is rounded to nearest.
        stochastic: bfloat16 is rounded with the draw too, and not the codes of int8 alone.
    """

    param: Tensor
    grad: Tensor
    momentum_buffer: Tensor | None
    gain: float | Tensor
    momentum_scale: Tensor | None = None
    compensation: Tensor | None = None
    draw: Draw | None = None
    stochastic: bool = False


class Options(NamedTuple):
    """What the update of all rows of a call has in common.

    Attributes:
        lr: learning rate, a float or a 0-d tensor.
        momentum: coefficient of the moving average.
        weight_decay: decoupled decay coefficient.
        nesterov: step along ``momentum * m + (1 - momentum) * g``.
        maximize: ascend.
        keep: a bool tensor; where it is False, nothing changes.
        grad_scale: a 0-d tensor that the gradient is divided by.
        sign: step along the sign of what is stepped along otherwise.
    """

    lr: float | Tensor
    momentum: float
    weight_decay: float
    nesterov: bool = False
    maximize: bool = False
    keep: Tensor | None = None
    grad_scale: Tensor | None = None
    sign: bool = False

    def on(self, device: torch.device) -> "Options":
        """The same for rows of a device, where the kernels read the tensors."""
        keep, scale = self.keep, self.grad_scale
        return self._replace(
            keep=None if keep is None else keep.to(device),
            grad_scale=None if scale is None else scale.to(device),
        )


def update_one(row: Row, options: Options) -> None:
    """One step of one block, in place on its parameter and its state: the definition.

    The arithmetic is done in the parameter's dtype, or in float32 if that is wider, and rounded to
    the dtypes of storage at the end.
    """
    param, grad, momentum_buffer, gain, momentum_scale, compensation, draw, stochastic = row
    lr, momentum, weight_decay, nesterov, maximize, keep, grad_scale, sign = options
    wide = torch.promote_types(param.dtype, torch.float32)
    copy = keep is not None
    half_p, half_m = _halves(param, momentum_buffer, draw, stochastic)
    p = param.to(wide, copy=copy)
    if compensation is not None:
        p.add_(compensation)
    g = grad.to(wide) if grad_scale is None else grad.to(wide) / grad_scale
    g = g.neg() if maximize else g
    direction = g
    if momentum_buffer is not None:
        m = _read(momentum_buffer, momentum_scale).to(wide, copy=copy).lerp_(g, 1 - momentum)
        direction = g.lerp(m, momentum) if nesterov else m
        _store_momentum(momentum_buffer, momentum_scale, m, half_m, keep)
    if weight_decay != 0.0:
        p.mul_(1 - lr * weight_decay)
    _descend(p, direction.sign() if sign else direction, lr, gain)
    _store_param(param, compensation, p, half_p, keep)


def update_forloop(rows: Iterable[Row], options: Options, limit: int | None = None) -> None:
    """`update_one` for each row, cut to pieces of ``limit`` elements where it needs temporaries.

    Args:
        rows: of any mix of dtypes, devices and strides; their parameters and state are modified.
        options: of all rows.
        limit: the most elements that are worked on at a time; ``None`` does not cut.
    """
    for row in rows:
        for piece in [row] if _in_place(row, options) else _pieces(row, limit):
            update_one(piece, options)


def update_foreach(rows: Iterable[Row], options: Options, limit: int | None = None) -> None:
    """The step of `update_forloop`, with the same arguments, by kernels that take many tensors."""
    kinds: dict[Any, list[Row]] = {}
    for row in rows:
        if limit is not None and _is_gathered(row):
            update_forloop([row], options, limit)
            continue
        stored = (row.param, row.grad, row.momentum_buffer, row.compensation)
        kind = (row.param.device, *(None if t is None else t.dtype for t in stored))
        kinds.setdefault((*kind, row.draw is None, row.stochastic), []).append(row)
    for alike in kinds.values():
        if limit is None or _in_place(alike[0], options):
            _update_batch(alike, options)
            continue
        room = _room(alike[0], limit)
        pieces = (piece for row in alike for piece in _pieces(row, limit))
        for batch in packed(pieces, lambda piece: piece.param.numel(), room):
            _update_batch(batch, options)


def _update_batch(rows: Sequence[Row], options: Options) -> None:
    """One list of the same dtypes; a function of its own, so that its temporaries end with it."""
    lr, momentum, weight_decay, nesterov, maximize, keep, grad_scale, sign = options
    copy = keep is not None
    wide = torch.promote_types(rows[0].param.dtype, torch.float32)
    halves = [_halves(r.param, r.momentum_buffer, r.draw, r.stochastic) for r in rows]
    p = [row.param.to(wide, copy=copy) for row in rows]
    if lost := [row.compensation for row in rows if row.compensation is not None]:
        torch._foreach_add_(p, lost)
    g = [row.grad.to(wide) for row in rows]
    if grad_scale is not None:
        g = list(torch._foreach_div(g, grad_scale.to(g[0].device)))
    g = list(torch._foreach_neg(g)) if maximize else g
    direction = g
    if buffers := [row.momentum_buffer for row in rows if row.momentum_buffer is not None]:
        scales = [row.momentum_scale for row in rows]
        m = [_read(b, s).to(wide, copy=copy) for b, s in zip(buffers, scales, strict=True)]
        torch._foreach_lerp_(m, g, 1 - momentum)
        direction = torch._foreach_lerp(g, m, momentum) if nesterov else m
        for buffer, scale, new, (_, half) in zip(buffers, scales, m, halves, strict=True):
            _store_momentum(buffer, scale, new, half, keep)
    if weight_decay != 0.0:
        torch._foreach_mul_(p, 1 - lr * weight_decay)
    direction = list(torch._foreach_sign(direction)) if sign else direction
    for row, new, d, (half, _) in zip(rows, p, direction, halves, strict=True):
        _descend(new, d, lr, row.gain)
        _store_param(row.param, row.compensation, new, half, keep)


def _in_place(row: Row, options: Options) -> bool:
    """Whether the update needs no temporaries: all is stored as it is computed."""
    if options.nesterov or options.maximize or options.sign:
        return False
    wide = torch.promote_types(row.param.dtype, torch.float32)
    stored = (row.param, row.grad, row.momentum_buffer)
    in_place = options.keep is None and options.grad_scale is None
    return in_place and all(t is None or t.dtype == wide for t in stored)


def _room(row: Row, limit: int) -> int:
    """Elements at a time: bits and codes take four times the temporaries of plain arithmetic."""
    return limit if row.draw is None else max(1, limit // 4)


def _pieces(row: Row, limit: int | None) -> Iterator[Row]:
    """Cuts a row into views of a limited number of elements that follow one another."""
    if limit is None:
        yield row
        return
    room = _room(row, limit)
    if row.momentum_scale is not None:
        yield from _flat_pieces(row, room)
        return
    start = 0
    names = ("param", "grad", "momentum_buffer", "compensation")
    tensors = {name: getattr(row, name) for name in names if getattr(row, name) is not None}
    for views in slices(list(tensors.values()), room):
        yield _moved(row._replace(**dict(zip(tensors, views, strict=True))), start)
        start += views[0].numel()


def _is_gathered(row: Row) -> bool:
    """Whether pieces are copies: what is stored beside 8 bits lies in another order than they."""
    stored = (row.param, row.compensation)
    return row.momentum_scale is not None and not all(map(_is_flat, stored))


def _is_flat(tensor: Tensor | None) -> bool:
    return tensor is None or tensor.is_contiguous()


def _flat_pieces(row: Row, room: int) -> Iterator[Row]:
    """Pieces that begin where a block of the 8-bit storage does; copies are written back."""
    assert row.momentum_buffer is not None and row.momentum_scale is not None
    numel, step = row.param.numel(), max(BLOCK, room // BLOCK * BLOCK)
    for start in range(0, numel, step):
        stop = min(start + step, numel)
        codes, scales = cut(row.momentum_buffer, row.momentum_scale, start, stop)
        lost = None if row.compensation is None else _flat_part(row.compensation, start, stop)
        piece = Row(
            _flat_part(row.param, start, stop),
            _flat_part(row.grad, start, stop),
            codes,
            row.gain,
            scales,
            lost,
            row.draw,
            row.stochastic,
        )
        yield _moved(piece, start)
        for whole, part in (row.param, piece.param), (row.compensation, lost):
            if whole is not None and part is not None and not _is_flat(whole):
                whole.put_(_indices(whole, start, stop), part)


def _flat_part(tensor: Tensor, start: int, stop: int) -> Tensor:
    """Elements ``start`` to ``stop`` in row-major order: a view, or else a copy."""
    if _is_flat(tensor):
        return tensor.view(-1)[start:stop]
    return tensor.take(_indices(tensor, start, stop))


def _indices(tensor: Tensor, start: int, stop: int) -> Tensor:
    return torch.arange(start, stop, device=tensor.device)


def _moved(row: Row, start: int) -> Row:
    draw = row.draw
    return row if draw is None else row._replace(draw=draw._replace(first=draw.first + start))


def _halves(
    param: Tensor, momentum_buffer: Tensor | None, draw: Draw | None, stochastic: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Random halves that round the parameter and the momentum; ``None`` for what needs none."""
    low_precision = {torch.bfloat16} if stochastic else set()
    for_param = param.dtype in low_precision
    low_precision.add(torch.int8)
    for_momentum = momentum_buffer is not None and momentum_buffer.dtype in low_precision
    if draw is None or not (for_param or for_momentum):
        return None, None
    bits = random_bits(draw, param.shape, param.device)
    return high_half(bits) if for_param else None, low_half(bits) if for_momentum else None


def _read(momentum_buffer: Tensor, momentum_scale: Tensor | None) -> Tensor:
    return (
        momentum_buffer if momentum_scale is None else dequantize(momentum_buffer, momentum_scale)
    )


def _descend(p: Tensor, direction: Tensor, lr: float | Tensor, gain: float | Tensor) -> None:
    if isinstance(lr, Tensor) or isinstance(gain, Tensor):
        # A learnable lr saves what it multiplies, and the next step writes into the buffer.
        learnable = isinstance(lr, Tensor) and lr.requires_grad
        direction = direction.clone() if learnable else direction
        p.addcmul_(direction, torch.as_tensor(lr * gain), value=-1)
    else:
        p.add_(direction, alpha=-lr * gain)


def _store_momentum(
    momentum_buffer: Tensor,
    momentum_scale: Tensor | None,
    m: Tensor,
    half: Tensor | None,
    keep: Tensor | None,
) -> None:
    if momentum_scale is not None:
        codes, scales = quantize(m.to(torch.float32), half)
        _store(momentum_buffer, codes, keep)
        _store(momentum_scale, scales, keep)
    else:
        _store(momentum_buffer, _rounded(m, half), keep)


def _store_param(
    param: Tensor, compensation: Tensor | None, p: Tensor, half: Tensor | None, keep: Tensor | None
) -> None:
    if compensation is not None:
        stored = p.to(param.dtype)
        _store(compensation, p - stored, keep)
        p = stored
    _store(param, _rounded(p, half), keep)


def _rounded(values: Tensor, half: Tensor | None) -> Tensor:
    return values if half is None else round_stochastically(values.to(torch.float32), half)


def _store(stored: Tensor, computed: Tensor, keep: Tensor | None) -> None:
    """Writes a result back in the storage dtype, unless it was computed in place."""
    if keep is not None:
        stored.copy_(torch.where(keep.to(stored.device), computed.to(stored.dtype), stored))
    elif computed is not stored:
        stored.copy_(computed)
