"""Views of one region of several tensors at a time, so that temporaries stay small."""

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor


def slices(tensors: Sequence[Tensor], limit: int) -> Iterator[tuple[Tensor, ...]]:
    """Cuts tensors of one shape into views of the same regions, none above ``limit`` elements.

    Only whole leading dimensions are cut, so that any stride will do and nothing is copied.

    Args:
        tensors: tensors of one shape, of any dtypes, strides and devices.
        limit: the most elements of a view, at least 1.

    Yields:
        one tuple of views for each region; the regions cover every element once.

    Raises:
        ValueError: for a limit below 1.

    Examples:
        >>> import torch
        >>> [tuple(a.shape) for (a,) in slices([torch.zeros(5, 4)], limit=8)]
        [(2, 4), (2, 4), (1, 4)]
    """
    if limit < 1:
        raise ValueError(f"limit must be at least 1 element, got {limit}")
    numel = tensors[0].numel()
    if numel <= limit:
        yield tuple(tensors)
        return
    num_rows = tensors[0].shape[0]
    row = numel // num_rows
    if row > limit:
        for i in range(num_rows):
            yield from slices([tensor[i] for tensor in tensors], limit)
        return
    step = limit // row
    for i in range(0, num_rows, step):
        yield tuple(tensor[i : i + step] for tensor in tensors)


def batches(
    rows: Sequence[tuple[Sequence[Tensor], Any]], limit: int
) -> Iterator[list[tuple[tuple[Tensor, ...], Any]]]:
    """Packs rows of tensors, sliced, into lists of at most ``limit`` elements for foreach kernels.

    Args:
        rows: pairs of tensors of one shape (see `slices`) and the number that goes with them.
        limit: the most elements of a list, counted over one tensor of each row.

    Yields:
        lists of pairs: views, and the number of the row they come from.

    Examples:
        >>> import torch
        >>> rows = [([torch.zeros(6)], 1.0), ([torch.zeros(3)], 2.0)]
        >>> [[(len(a), x) for (a,), x in batch] for batch in batches(rows, limit=4)]
        [[(4, 1.0)], [(2, 1.0)], [(3, 2.0)]]
    """
    batch: list[tuple[tuple[Tensor, ...], Any]] = []
    room = limit
    for tensors, number in rows:
        for views in slices(tensors, limit):
            if batch and views[0].numel() > room:
                yield batch
                batch, room = [], limit
            batch.append((views, number))
            room -= views[0].numel()
    if batch:
        yield batch
