"""Views of one region of several tensors at a time, so that temporaries stay small."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from torch import Tensor

Piece = TypeVar("Piece")


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


def packed(
    pieces: Iterable[Piece], numel: Callable[[Piece], int], limit: int
) -> Iterator[list[Piece]]:
    """Packs pieces into lists of at most ``limit`` elements, for kernels that take many tensors.

    Args:
        pieces: in order; one above the limit has a list of its own.
        numel: how many elements a piece has.
        limit: the most elements of a list.

    Yields:
        lists of pieces, none empty.

    Examples:
        >>> list(packed(["abcd", "ef", "g", "hi"], len, limit=4))
        [['abcd'], ['ef', 'g'], ['hi']]
    """
    batch: list[Piece] = []
    room = limit
    for piece in pieces:
        if batch and numel(piece) > room:
            yield batch
            batch, room = [], limit
        batch.append(piece)
        room -= numel(piece)
    if batch:
        yield batch
