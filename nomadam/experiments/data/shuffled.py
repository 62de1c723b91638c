"""Which rows a batch holds, and its random numbers: pure functions of seed, step and micro."""

import functools
import math

import numpy as np

# Set these draws apart from one another and from any other use of the same seed.
_ORDER = 0x6F72646572
_DRAWS = 0x6472617773


def shuffled_rows(
    num_rows: int, *, seed: int, step: int, micro: int, batch_size: int
) -> np.ndarray:
    """The numbers of a batch's rows, where each pass over the data has an order of its own.

    Batch t of micro-batch m holds the rows at the places (t - 1) · batch_size ... of an endless
    list: one shuffle of all rows after another, so that every row comes once in a pass, the first
    one too. Each m has its own list.

    Args:
        num_rows: of the data, at least 1.
        seed: from 0 to 2**64 - 1.
        step: the optimizer step t, from 1.
        micro: the micro-batch within the step, from 0.
        batch_size: at least 1.

    Returns:
        int64 `[batch_size]`, from 0 to `num_rows - 1`.

    Errors:
        ValueError: for a step below 1.

    Examples:
        >>> two = [shuffled_rows(6, seed=0, step=t, micro=0, batch_size=3) for t in (1, 2)]
        >>> sorted(np.concatenate(two).tolist())
        [0, 1, 2, 3, 4, 5]
    """
    if step < 1:
        raise ValueError(f"step = {step}: must be at least 1, as the first one of a training is")
    places = (step - 1) * batch_size + np.arange(batch_size)
    passes = places // num_rows
    rows = np.empty(batch_size, np.int64)
    for number in np.unique(passes):
        here = passes == number
        rows[here] = _order(num_rows, seed, int(number), micro)[places[here] % num_rows]
    return rows


@functools.lru_cache(maxsize=4)
def _order(num_rows: int, seed: int, number: int, micro: int) -> np.ndarray:
    # Sorting raw numbers, since numpy may change its shuffle from one version to another.
    raw = np.random.Philox(key=_ORDER << 64 | seed, counter=number << 128 | micro << 64)
    order = np.argsort(raw.random_raw(num_rows), kind="stable")
    order.setflags(write=False)
    return order


def uniform_draws(shape: tuple[int, ...], *, seed: int, step: int, micro: int) -> np.ndarray:
    """Random numbers of a batch, from 0 to below 1; fewer rows are the first of more.

    Args:
        shape: of the result.
        seed: from 0 to 2**64 - 1.
        step: the optimizer step, from 0.
        micro: the micro-batch within the step, from 0.

    Examples:
        >>> uniform_draws((2, 3), seed=0, step=1, micro=0).shape
        (2, 3)
    """
    raw = np.random.Philox(key=_DRAWS << 64 | seed, counter=step << 128 | micro << 64)
    # The upper 53 bits as a number from 0 to below 1.
    return ((raw.random_raw(math.prod(shape)) >> np.uint64(11)) * 2.0**-53).reshape(shape)
