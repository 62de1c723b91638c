"""Counter-based random bits, and stochastic rounding to bfloat16 with them."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

MASK = 0xFFFFFFFF
# The finaliser of MurmurHash3 (Appleby), and the golden ratio in 32 bits to part the words.
FIRST_FACTOR, SECOND_FACTOR, STRIDE = 0x85EBCA6B, 0xC2B2AE35, 0x9E3779B9


class Draw(NamedTuple):
    """Which random bits: those of one block at one step, whoever draws them and wherever.

    Attributes:
        seed: at least 0, below 2^64.
        step: counts from 0; a number, or a 0-d integer tensor where the host is not to know it.
        block: index of the block in the optimizer.
        first: row-major index, in the whole block, of the first element of the piece at hand.
    """

    seed: int
    step: int | Tensor
    block: int
    first: int = 0


def key(draw: Draw) -> tuple[Any, Any]:
    """Two words of 32 bits for a block at a step, as ints, or tensors where the step is one.

    Examples:
        >>> key(Draw(seed=0, step=0, block=0)) != key(Draw(seed=0, step=1, block=0))
        True
    """
    words = (draw.seed & MASK, draw.seed >> 32, draw.block, draw.step)
    first, second = 0, 1
    for word in words:
        first = _mixed(((first ^ word) + STRIDE) & MASK)
        second = _mixed(((second ^ word) + STRIDE) & MASK)
    return first, second


def random_bits(draw: Draw, shape: Sequence[int], device: torch.device | str) -> Tensor:
    """32 random bits for each element of a piece of a block, in int32.

    They depend on the draw and on the element's index in the whole block alone, so that any cut of
    a block gives the same bits as the whole: x is the low word of the index plus the first key
    word; then MurmurHash3's finaliser, with the second key word (plus the index's high word times
    a constant) mixed in midway.

    Args:
        draw: names the bits.
        shape: of the piece, whose elements follow one another in the whole block.
        device: where they are made.

    Returns:
        int32 of that shape.

    Examples:
        >>> whole = random_bits(Draw(1, 2, 3), (6,), "cpu")
        >>> piece = random_bits(Draw(1, 2, 3, first=4), (2,), "cpu")
        >>> torch.equal(whole[4:], piece)
        True
    """
    numel = torch.Size(shape).numel()
    k0, k1 = key(draw)
    if draw.first >> 32 == (draw.first + numel - 1) >> 32:
        x = torch.arange(numel, dtype=torch.int32, device=device) if numel < 2**31 else None
        high: Any = draw.first >> 32
    else:
        x, high = None, torch.arange(numel, device=device).add_(draw.first).bitwise_right_shift_(32)
    if x is None:
        x = torch.arange(numel, device=device).to(torch.int32)
    x += _signed(k0 + draw.first)
    x ^= _shifted(x, 16)
    x *= _signed(FIRST_FACTOR)
    x ^= _signed(k1 + high * STRIDE)
    x ^= _shifted(x, 13)
    x *= _signed(SECOND_FACTOR)
    x ^= _shifted(x, 16)
    return x.view(shape)


def high_half(bits: Tensor) -> Tensor:
    """The upper 16 of 32 bits, 0 to 65535, which round the parameter."""
    return _shifted(bits, 16)


def low_half(bits: Tensor) -> Tensor:
    """The lower 16 of 32 bits, 0 to 65535, which round the momentum."""
    return bits & 0xFFFF


def round_stochastically(values: Tensor, half: Tensor) -> Tensor:
    """Rounds float32 to one of the two nearest bfloat16, up with the fraction as probability.

    The expectation is the value itself, up to the range of bfloat16. What bfloat16 holds exactly
    stays, and so do infinities and NaN.

    Args:
        values: float32 of any shape; not modified.
        half: random integers from 0 to 65535, of that shape (`high_half`, `low_half`).

    Returns:
        bfloat16 of that shape.

    Examples:
        >>> round_stochastically(torch.full((2,), 1 + 2**-8), torch.tensor([0, 2**15]))
        tensor([1.0000, 1.0078], dtype=torch.bfloat16)
    """
    rounded = values.view(torch.int32) + half.to(torch.int32)
    rounded &= -65536  # the upper 16 bits: what is left is a bfloat16
    return torch.where(values.isfinite(), rounded.view(torch.float32), values).to(torch.bfloat16)


def _mixed(h: Any) -> Any:
    """MurmurHash3's finaliser, of an int or an int64 tensor below 2^32."""
    h = h ^ (h >> 16)
    h = (h * FIRST_FACTOR) & MASK
    h = h ^ (h >> 13)
    h = (h * SECOND_FACTOR) & MASK
    return h ^ (h >> 16)


def _signed(word: Any) -> Any:
    """The low 32 bits as an int32."""
    if isinstance(word, Tensor):
        return word.to(torch.int32)
    word &= MASK
    return word - 2**32 if word >= 2**31 else word


def _shifted(x: Tensor, places: int) -> Tensor:
    """Unsigned shift to the right of int32."""
    return (x >> places) & (MASK >> places)
