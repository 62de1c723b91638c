"""8-bit blockwise storage: signed codes on a square-law map, and one scale for 128 elements."""

import torch
from torch import Tensor

BLOCK = 128
TOP = 127 * 127  # the square of the largest code
SMALLEST_SCALE = 2.0**-100  # below it a block counts as zero, and no quotient overflows


def num_scales(numel: int) -> int:
    """How many scales go with so many elements: one for each 128, the last for what is left.

    Examples:
        >>> num_scales(4096), num_scales(4097)
        (32, 33)
    """
    return -(-numel // BLOCK)


def quantize(values: Tensor, half: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Codes and scales of a tensor, in blocks of 128 elements in row-major order.

    With s the largest magnitude of a block, y = 127² |x| / s lies between two squares k² and
    (k + 1)²; the code is k or k + 1 with the sign of x, so that small values, of which momentum
    has most, lie on a finer grid. With random halves the choice has the expectation x; without, it
    is the nearer one. 0 stays 0 exactly. A block whose s is not finite decodes to NaN.

    Args:
        values: float32 of any shape and strides; not modified.
        half: random integers from 0 to 65535, of that shape.

    Returns:
        int8 codes of that shape, contiguous, and float32 scales [ceil(numel / 128)].

    Examples:
        >>> codes, scales = quantize(torch.tensor([0.0, -1.0, 4.0]))
        >>> codes.tolist(), scales.tolist()
        ([0, -63, 127], [4.0])
    """
    flat = values.reshape(-1)
    numel, rows = flat.numel(), num_scales(flat.numel())
    blocks = torch.nn.functional.pad(flat, (0, rows * BLOCK - numel)).view(rows, BLOCK)
    scales = blocks.abs().amax(dim=1) if numel else flat.new_empty(0)
    scales = torch.where(scales < SMALLEST_SCALE, 0.0, scales)
    usable = scales.isfinite() & (scales > 0)
    y = blocks.abs() * torch.where(usable, TOP / scales, 0.0)[:, None]
    y = torch.where(usable[:, None], y, 0.0).clamp_(max=TOP).view(-1)[:numel]
    k = y.sqrt().floor_()
    above = y.sub_(k * k)
    share: Tensor | float = 0.5 if half is None else (half.reshape(-1) + 0.5) / 65536
    k += above > (2 * k + 1) * share
    codes = k.clamp_(max=127).copysign_(flat).to(torch.int8)
    return codes.view(values.shape), scales


def dequantize(codes: Tensor, scales: Tensor) -> Tensor:
    """The float32 values of codes and scales, of the codes' shape.

    Examples:
        >>> codes, scales = quantize(torch.tensor([0.0, -1.0, 4.0]))
        >>> dequantize(codes, scales)
        tensor([ 0.0000, -0.9843,  4.0000])
    """
    flat = codes.reshape(-1).to(torch.float32)
    units = (scales / TOP).repeat_interleave(BLOCK, output_size=len(scales) * BLOCK)
    return (flat * flat.abs()).mul_(units[: flat.numel()]).view(codes.shape)


def cut(codes: Tensor, scales: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """The codes and scales of elements ``start`` to ``stop`` in row-major order, as views.

    Args:
        codes: contiguous, of any shape.
        scales: theirs.
        start: a multiple of 128, at least 0.
        stop: a multiple of 128, or the number of elements.

    Raises:
        ValueError: for a cut within a block, which has one scale for all its elements.

    Examples:
        >>> codes, scales = quantize(torch.ones(2, 128))
        >>> [part.shape for part in cut(codes, scales, 128, 256)]
        [torch.Size([128]), torch.Size([1])]
    """
    numel = codes.numel()
    if not 0 <= start <= stop <= numel or start % BLOCK or (stop % BLOCK and stop != numel):
        raise ValueError(
            f"8-bit state can be cut at multiples of {BLOCK} from 0 to {numel}, "
            f"got {start} to {stop}"
        )
    return codes.view(-1)[start:stop], scales[start // BLOCK : num_scales(stop)]
