"""The update of SGD-SaI, from tensors and numbers alone: for one block, and for many at a time."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nomadam.numerics.slices import batches


def update_one(
    param: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor | None,
    gain: float | Tensor,
    *,
    lr: float | Tensor,
    momentum: float,
    weight_decay: float,
    nesterov: bool = False,
    maximize: bool = False,
    keep: Tensor | None = None,
) -> None:
    """One step of one block, in place on ``param`` and ``momentum_buffer``: the definition.

    Args:
        param: real tensor of any shape and floating dtype; the arithmetic is done in its dtype, or
            in float32 if that is wider, and rounded to the dtypes of storage at the end.
        grad: gradient, of the shape of ``param``; not modified.
        momentum_buffer: holds the first gradient at the first step; ``None`` for a momentum of 0.
        gain: number that multiplies the step, a float or a 0-d tensor on the host.
        lr: learning rate, a float or a 0-d tensor.
        momentum: coefficient of the moving average.
        weight_decay: decoupled decay coefficient.
        nesterov: step along ``momentum * m + (1 - momentum) * g``.
        maximize: ascend.
        keep: a bool tensor on the device; where it is False, nothing changes.
    """
    wide = torch.promote_types(param.dtype, torch.float32)
    copy = keep is not None
    p = param.to(wide, copy=copy)
    g = grad.to(wide).neg() if maximize else grad.to(wide)
    direction = g
    if momentum_buffer is not None:
        m = momentum_buffer.to(wide, copy=copy).lerp_(g, 1 - momentum)
        direction = g.lerp(m, momentum) if nesterov else m
        _store([momentum_buffer], [m], keep)
    if weight_decay != 0.0:
        p.mul_(1 - lr * weight_decay)
    _descend(p, direction, lr, gain)
    _store([param], [p], keep)


def update_foreach(
    params: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor | None],
    gains: Sequence[float | Tensor],
    *,
    lr: float | Tensor,
    momentum: float,
    weight_decay: float,
    nesterov: bool = False,
    maximize: bool = False,
    keep: Tensor | None = None,
    limit: int | None = None,
) -> None:
    """The step of `update_one` for many blocks at a time.

    Args:
        params: its ``param`` of each block, with any mix of dtypes, devices and strides.
        grads: its ``grad`` of each block.
        momentum_buffers: its ``momentum_buffer`` of each block.
        gains: its ``gain`` of each block.
        lr: as there, like all up to ``keep``.
        momentum: as there.
        weight_decay: as there.
        nesterov: as there.
        maximize: as there.
        keep: as there.
        limit: where temporaries are needed, the most elements that are worked on at a time.
    """
    kinds: dict[Any, list[tuple[list[Tensor], Any]]] = {}
    for *row, gain in zip(params, grads, momentum_buffers, gains, strict=True):
        tensors = [tensor for tensor in row if tensor is not None]
        kind = (tensors[0].device, *(tensor.dtype for tensor in tensors))
        kinds.setdefault(kind, []).append((tensors, gain))
    temporaries = nesterov or maximize or keep is not None
    for (_, *dtypes), rows in kinds.items():
        wide = torch.promote_types(dtypes[0], torch.float32)
        in_place = set(dtypes) == {wide} and not temporaries
        for batch in [rows] if in_place or limit is None else batches(rows, limit):
            _update_batch(batch, wide, lr, momentum, weight_decay, nesterov, maximize, keep)


def _update_batch(
    batch: Sequence[tuple[Sequence[Tensor], Any]],
    wide: torch.dtype,
    lr: float | Tensor,
    momentum: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
    keep: Tensor | None,
) -> None:
    """One list of the same dtypes; a function of its own, so that its temporaries end with it."""
    copy = keep is not None
    p_store, g_store, *m_store = map(list, zip(*(row for row, _ in batch), strict=True))
    p = [tensor.to(wide, copy=copy) for tensor in p_store]
    g = [tensor.to(wide) for tensor in g_store]
    g = list(torch._foreach_neg(g)) if maximize else g
    direction = g
    if m_store:
        m = [tensor.to(wide, copy=copy) for tensor in m_store[0]]
        torch._foreach_lerp_(m, g, 1 - momentum)
        direction = torch._foreach_lerp(g, m, momentum) if nesterov else m
        _store(m_store[0], m, keep)
    if weight_decay != 0.0:
        torch._foreach_mul_(p, 1 - lr * weight_decay)
    for a, d, (_, gain) in zip(p, direction, batch, strict=True):
        _descend(a, d, lr, gain)
    _store(p_store, p, keep)


def _descend(p: Tensor, direction: Tensor, lr: float | Tensor, gain: float | Tensor) -> None:
    if isinstance(lr, Tensor) or isinstance(gain, Tensor):
        # A learnable lr saves what it multiplies, and the next step writes into the buffer.
        learnable = isinstance(lr, Tensor) and lr.requires_grad
        direction = direction.clone() if learnable else direction
        p.addcmul_(direction, torch.as_tensor(lr * gain), value=-1)
    else:
        p.add_(direction, alpha=-lr * gain)


def _store(stored: list[Tensor], computed: list[Tensor], keep: Tensor | None) -> None:
    """Writes results back in the storage dtype, unless they were computed in place."""
    for old, new in zip(stored, computed, strict=True):
        if keep is not None:
            old.copy_(torch.where(keep.to(old.device), new, old))
        elif new is not old:
            old.copy_(new)
