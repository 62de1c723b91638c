"""Sharded blocks in a step of SGD-SaI: who waits with whom, and where a part lies in the whole."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from nomadam.numerics.moments import Share
from nomadam.numerics.sharded import is_sharded, local, merged_over_mesh, offsets, runs, shard_dims
from nomadam.optimizers.sgd_sai_blocks import Slot, is_measured, is_refreshed
from nomadam.optimizers.sgd_sai_state import scale_shape
from nomadam.optimizers.sgd_sai_update import Row


def meshes_of(slots: Sequence[Slot]) -> list[Any]:
    """The meshes of the sharded blocks, each once, in an order that all their processes have."""
    params: list[Any] = [slot.param for slot in slots]
    return list(dict.fromkeys(param.device_mesh for param in params if is_sharded(param)))


def whole(joining: Sequence[Slot], here: Mapping[int, Share]) -> dict[int, Share]:
    """What is known of whole blocks from the parts that lie here and elsewhere, by index.

    A gradient that is missing where a part lies makes the whole one not finite: the block is left
    alone, and waits.
    """
    by_mesh: dict[Any, list[Slot]] = {}
    for slot in joining:
        by_mesh.setdefault(slot.param.device_mesh, []).append(slot)  # pyright: ignore
    found = {}
    for mesh, slots in by_mesh.items():
        own = [here.get(slot.index) or _missing(slot) for slot in slots]
        together = merged_over_mesh(mesh, [slot.param for slot in slots], own)
        found |= {slot.index: share for slot, share in zip(slots, together, strict=True)}
    return found


def _missing(slot: Slot) -> Share:
    count = local(slot.param).numel()
    return Share(count, math.nan if count else 0.0, math.nan, math.nan)


def joining(slots: Sequence[Slot], states: Mapping[Any, Any]) -> list[Slot]:
    """The blocks in parts that wait to be measured, the same ones in every process of a mesh.

    Not those that every process has whole, which each measures by itself, nor what is empty
    everywhere, nor frozen, and would wait for ever.
    """
    found = []
    for slot in slots:
        if is_sharded(slot.param):
            state, group = states.get(slot.param, {}), slot.group
            lacks = group["momentum"] != 0.0 and state.get("momentum_buffer") is None
            waits = lacks or not is_measured(state) or is_refreshed(group)
            # Looked at last: once all are measured a step is to cost nothing here.
            if waits and _comes_in_parts(slot.param):
                found.append(slot)
    return found


def _comes_in_parts(param: Any) -> bool:
    frozen = not param.requires_grad and param.grad is None
    return not frozen and param.numel() > 0 and bool(shard_dims(param))


def placed_rows(row: Row, whole: Any) -> list[Row]:
    """A row of a part, with the draws that its elements have in the whole block.

    Where the part does not lie in the whole in one piece, it is a row for each piece.
    """
    draw = row.draw
    if draw is None:
        return [row]
    shape = row.param.shape
    scale = row.momentum_scale
    scale = None if scale is None else scale.view(scale_shape(shape))
    pieces = []
    pair = shape[len(whole.shape) :]  # of a complex element
    start = (*offsets(whole), *(0 for _ in pair))
    for index, first in runs((*whole.shape, *pair), shape, start):
        views = {
            name: None if tensor is None else tensor[index]
            for name, tensor in (
                ("param", row.param),
                ("grad", row.grad),
                ("momentum_buffer", row.momentum_buffer),
                ("compensation", row.compensation),
            )
        }
        own = None if scale is None else (scale[index] if index else scale).reshape(-1)
        piece = row._replace(**views, momentum_scale=own)
        pieces.append(piece._replace(draw=draw._replace(first=first)))
    return pieces
