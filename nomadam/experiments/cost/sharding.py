"""What a process holds and sends under FSDP2, from the shapes of a model alone."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import NamedTuple

from torch import nn

from nomadam.experiments.cost.models import MODELS, Tensors, llama
from nomadam.numerics.blockwise import BLOCK
from nomadam.numerics.sharded import NUMBERS
from nomadam.optimizers.sgd_sai_state import SMALLEST_INT8

# Beyond what one machine steps.
LARGE_MODELS: Mapping[str, Callable[[], Tensors]] = MappingProxyType(
    {
        "Llama-2-7B": MODELS["llama2_7b"],
        "Llama-3-70B": partial(
            llama, layers=80, width=8192, heads=64, key_heads=8, inner=28672, vocabulary=128256
        ),
        "Llama-3-405B": partial(
            llama, layers=126, width=16384, heads=128, key_heads=8, inner=53248, vocabulary=128256
        ),
    }
)


class Storage(NamedTuple):
    """How a training keeps its numbers, in bytes a parameter.

    Attributes:
        label: for tables.
        weights: of a weight.
        gradient: of its gradient.
        state: of the optimizer's state, None for SGDSaI's momentum in 8 bits.
    """

    label: str
    weights: int
    gradient: int
    state: int | None


STORAGES = (
    Storage("AdamW, float32", 4, 4, 8),
    Storage("SGDSaI, float32", 4, 4, 4),
    Storage("SGDSaI, float32, int8 momentum", 4, 4, None),
    Storage("SGDSaI, bfloat16, int8 momentum", 2, 2, None),
)


def part_numel(shape: Sequence[int], world: int, rank: int) -> int:
    """Elements of a tensor that lie on a rank where FSDP2 cuts it in rows.

    Each rank has as many rows as the first one, as long as there are any.

    Args:
        shape: of the whole tensor, with one dimension at least.
        world: number of ranks, at least 1.
        rank: which, from 0 on.

    Example:
        >>> [part_numel((5, 2), 4, rank) for rank in range(4)]
        [4, 4, 2, 0]
    """
    rows = -(-shape[0] // world)
    return max(0, min(rows, shape[0] - rank * rows)) * math.prod(shape[1:])


def int8_bytes(shape: Sequence[int], world: int, rank: int) -> int:
    """Bytes of a momentum in 8 bits that lie on a rank, with their scales.

    Args:
        shape: as `part_numel` takes it, like the others.
        world: number of ranks.
        rank: which.

    Example:
        >>> int8_bytes((256, 512), 4, 0)  # 32768 codes and 256 scales
        33792
        >>> int8_bytes((300,), 4, 0), int8_bytes((4100,), 4, 0)  # float32, bfloat16
        (300, 2050)
    """
    numel, inner = part_numel(shape, world, rank), math.prod(shape[1:])
    if math.prod(shape) < SMALLEST_INT8:
        return 4 * numel
    even = shape[0] % world == 0 and shape[0] // world * inner % BLOCK == 0
    if world > 1 and inner % BLOCK and not even:
        return 2 * numel
    return numel + 4 * -(-numel // BLOCK)


def bytes_held(model: nn.Module, storage: Storage, world: int, rank: int = 0) -> int:
    """Bytes of weights, gradients and state on a rank, between two steps.

    Not counted: activations, and what FSDP2 gathers for a layer that is being computed.

    Args:
        model: with the shapes of the whole; on the meta device it takes no memory.
        storage: how the numbers are kept.
        world: number of ranks.
        rank: which; the first one holds the most.

    Example:
        >>> bytes_held(nn.Linear(8, 8, bias=False), STORAGES[0], world=2)
        512
    """
    total = 0
    for param in model.parameters():
        numel = part_numel(param.shape, world, rank)
        total += numel * (storage.weights + storage.gradient)
        known = storage.state
        total += int8_bytes(param.shape, world, rank) if known is None else known * numel
    return total


def gain_bytes(num_blocks: int, world: int) -> int:
    """Bytes that a rank receives in a step that measures gains, and none afterwards.

    Each rank sends four numbers in float64 for every block that waits, to all of its mesh.

    Args:
        num_blocks: that wait.
        world: number of ranks along the dimension that is cut.

    Example:
        >>> gain_bytes(148, 8)
        37888
    """
    return 8 * NUMBERS * num_blocks * world


def update_bytes(numel: int, storage: Storage) -> float:
    """Bytes of memory that an update reads and writes: weights, gradients read once, and state.

    Args:
        numel: parameters on this rank.
        storage: how they are kept.

    Example:
        >>> update_bytes(100, STORAGES[0]), update_bytes(100, STORAGES[1])
        (2800.0, 2000.0)
    """
    state = 1 + 4 / BLOCK if storage.state is None else storage.state
    return numel * (2 * storage.weights + storage.gradient + 2.0 * state)
