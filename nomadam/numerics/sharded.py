"""Tensors in parts on several processes: the part that lies here, and what is known of the whole.

A sharded tensor is a ``DTensor`` of ``torch.distributed``: on a mesh of processes, along each of
whose dimensions it is either cut (``Shard``) or kept whole by everyone (``Replicate``). Nothing of
it is gathered here but a few numbers.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from nomadam.numerics.moments import Share, merged

NUMBERS = 4  # of a Share


def is_sharded(tensor: Any) -> bool:
    """Whether a tensor is a DTensor; asks for no import of what may never be used.

    Examples:
        >>> is_sharded(torch.zeros(2))
        False
    """
    return hasattr(tensor, "device_mesh")


def local(tensor: Any) -> Any:
    """The part that lies here, which shares its memory; a whole tensor, or None, as it is."""
    return tensor._local_tensor if is_sharded(tensor) else tensor


def shard_dims(tensor: Any) -> list[int]:
    """The dimensions of the mesh along which a sharded tensor is cut."""
    return [d for d, placed in enumerate(tensor.placements) if not placed.is_replicate()]


def as_placed(tensor: Any, like: Any) -> Any:
    """A sharded tensor laid out as another one; where it is so already, itself.

    A gradient that is still to be summed (``Partial``) is summed here.
    """
    if tensor.placements == like.placements and tensor.device_mesh == like.device_mesh:
        return tensor
    return tensor.redistribute(like.device_mesh, like.placements)


def offsets(tensor: Any) -> tuple[int, ...]:
    """Of the part that lies here, the index of its first element in the whole tensor."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, mesh, placements = tensor.shape, tensor.device_mesh, tensor.placements
    return compute_local_shape_and_global_offset(shape, mesh, placements)[1]


def runs(
    whole: Sequence[int], part: Sequence[int], start: Sequence[int]
) -> Iterator[tuple[tuple[int, ...], int]]:
    """Cuts a part of a tensor into runs whose elements follow one another in the whole tensor.

    Args:
        whole: shape of the whole tensor.
        part: shape of a box in it.
        start: index of the box's first element.

    Yields:
        the leading indices in the box that select a run, and the row-major index in the whole of
        its first element. Runs come in order; an empty box has none.

    Examples:
        >>> list(runs((4, 6), (2, 6), (2, 0)))
        [((), 12)]
        >>> list(runs((4, 6), (2, 3), (2, 3)))
        [((0,), 15), ((1,), 21)]
    """
    if 0 in part:
        return
    # From here on the box is as wide as the whole, but for the first of these dimensions.
    first = len(whole)
    while first > 0 and (first == len(whole) or part[first] == whole[first]):
        first -= 1
    strides = [math.prod(whole[d + 1 :]) for d in range(len(whole))]
    origin = sum(o * stride for o, stride in zip(start, strides, strict=True))
    for index in itertools.product(*(range(size) for size in part[:first])):
        yield index, origin + sum(i * s for i, s in zip(index, strides, strict=False))


def laid_out(part: Tensor, like: Any, shape: Sequence[int]) -> Any:
    """The whole tensor whose parts, one in each process, are laid out as those of another one.

    Args:
        part: what lies here.
        like: a sharded tensor.
        shape: of the whole.
    """
    from torch.distributed.tensor import DTensor

    stride = tuple(math.prod(shape[d + 1 :]) for d in range(len(shape)))
    return DTensor.from_local(
        part,
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=torch.Size(shape),
        stride=stride,
    )


def part_of(tensor: Any, like: Any) -> Tensor:
    """Of a tensor the part that lies where that of another one of the same shape does.

    Args:
        tensor: whole or sharded, or already the part.
        like: whole or sharded.

    Returns:
        a whole tensor where ``like`` is whole; sharded ones are gathered for it.
    """
    if not is_sharded(like):
        return tensor.full_tensor() if is_sharded(tensor) else tensor
    if is_sharded(tensor):
        return local(as_placed(tensor, like))
    here = local(like).shape
    if tensor.shape == like.shape and tensor.shape != here:
        for d, (start, size) in enumerate(zip(offsets(like), here, strict=True)):
            tensor = tensor.narrow(d, start, size)
    return tensor


def merged_over_mesh(mesh: Any, tensors: Sequence[Any], own: Sequence[Share]) -> list[Share]:
    """What is known of whole tensors from what each process knows of its part.

    One collective for each dimension of the mesh along which any is cut, with 32 bytes for each
    tensor that is; every process of the mesh has to call it, with the same tensors.

    Args:
        mesh: of all the tensors.
        tensors: sharded ones.
        own: of the part of each that lies here, in the same order.

    Returns:
        one record for each tensor, the same in every process that holds parts of it.
    """
    import torch.distributed as dist

    found = list(own)
    cut = [set(shard_dims(tensor)) for tensor in tensors]
    for dim in sorted(set().union(*cut)):
        size, here = mesh.size(dim), [i for i, dims in enumerate(cut) if dim in dims]
        own_rows = [found[i] for i in here]
        table = torch.tensor(own_rows, dtype=torch.float64, device=mesh.device_type).view(-1)
        everyone = table.new_empty(size * table.numel())
        dist.all_gather_into_tensor(everyone, table, group=mesh.get_group(dim))
        rows = everyone.view(size, len(here), NUMBERS).tolist()
        for place, i in enumerate(here):
            found[i] = merged([Share(int(row[place][0]), *row[place][1:]) for row in rows])
    return found


def all_agree(mesh: Any, keep: Tensor) -> Tensor:
    """Whether a bool tensor is True in every process of a mesh; one number for each dimension."""
    import torch.distributed as dist

    word = keep.to(mesh.device_type, torch.int32)
    for dim in range(mesh.ndim):
        dist.all_reduce(word, dist.ReduceOp.MIN, group=mesh.get_group(dim))
    return word.bool()
