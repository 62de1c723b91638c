"""Size, norm and spread of many tensors in one transfer to the host, and the g-SNR from them."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nomadam.numerics.slices import slices


class Moments(NamedTuple):
    """What one tensor is measured by; all of it host numbers.

    Attributes:
        count: number of real elements.
        largest: largest magnitude, max |x|; NaN or inf where an element is not finite.
        norm: Euclidean norm in units of ``largest``.
        std: standard deviation over the elements in units of ``largest``, unbiased (count - 1).
    """

    count: int
    largest: float
    norm: float
    std: float

    @property
    def informative(self) -> bool:
        """True where the tensor is finite and not all zero."""
        return 0.0 < self.largest < math.inf


def gsnr(moments: Moments, eps: float = 0.0) -> float:
    """Gradient signal-to-noise ratio of one block: ‖g‖ / (std(g) + eps), between 0 and its size.

    1 for a single element, which has no spread; never above the number of elements, which a
    (nearly) constant gradient would exceed; elsewhere the formula of the released SGD-SaI code.
    With ``eps=0`` it does not depend on the scale of the gradient.

    Args:
        moments: of an informative gradient.
        eps: added to the standard deviation, in units of the gradient, >= 0.

    Source: arXiv 2412.11768, Algorithm 1; the released code has the unbiased deviation.

    Example:
        >>> gsnr(moments([torch.tensor([3.0, -4.0, 0.0, 0.0])])[0])  # 5 / 2.8723
        1.740776...
    """
    if moments.count == 1:
        return 1.0
    noise = moments.std + eps / moments.largest
    if moments.norm >= moments.count * noise:  # also where there is no spread at all
        return float(moments.count)
    return moments.norm / noise


def moments(tensors: Sequence[Tensor], limit: int = 2**20) -> list[Moments]:
    """Measures every tensor, with one host synchronisation for each device.

    Each tensor is divided by its largest magnitude before anything is squared, so that no scale
    over- or underflows, and is taken in slices, so that little memory is needed.

    Args:
        tensors: real tensors of any floating dtype, shape and stride, none of them empty.
        limit: elements of a slice; the temporaries are one slice in float32 (or float64).

    Returns:
        one record for each tensor, computed in float32 or wider and merged in float64.

    Example:
        >>> moments([torch.tensor([2.0, -2.0])])
        [Moments(count=2, largest=2.0, norm=1.41421..., std=1.41421...)]
    """
    sizes: list[list[int]] = []
    scalars: list[Tensor] = []
    for tensor in tensors:
        wide = torch.promote_types(tensor.dtype, torch.float32)
        largest = torch.linalg.vector_norm(tensor, math.inf, dtype=wide)
        scalars.append(largest)
        sizes.append([])
        for (view,) in slices([tensor], limit):
            scalars.extend(torch.var_mean(view.to(wide) / largest, correction=0))
            sizes[-1].append(view.numel())
    numbers = iter(to_host(scalars))
    return [_merge(next(numbers), parts, [(next(numbers), next(numbers)) for _ in parts])
            for parts in sizes]  # fmt: skip


def _merge(largest: float, sizes: list[int], parts: list[tuple[float, float]]) -> Moments:
    """Merges the (variance, mean) of the slices of one tensor into its norm and deviation."""
    count = sum(sizes)
    mean = math.fsum(n * part_mean for n, (_, part_mean) in zip(sizes, parts, strict=True)) / count
    deviations = math.fsum(
        n * (variance + (part_mean - mean) ** 2)
        for n, (variance, part_mean) in zip(sizes, parts, strict=True)
    )
    std = math.sqrt(deviations / (count - 1)) if count > 1 else 0.0
    return Moments(count, largest, math.sqrt(deviations + count * mean**2), std)


def to_host(scalars: Sequence[Tensor]) -> list[float]:
    """Brings one-element tensors to the host, with one transfer for each device.

    Example:
        >>> to_host([torch.tensor(1.0), torch.tensor([True])])
        [1.0, 1.0]
    """
    by_device: dict[torch.device, list[int]] = {}
    for i, scalar in enumerate(scalars):
        by_device.setdefault(scalar.device, []).append(i)
    numbers = [0.0] * len(scalars)
    for indices in by_device.values():
        wide = torch.float32
        for i in indices:
            wide = torch.promote_types(wide, scalars[i].dtype)
        together = torch.stack([scalars[i].reshape(()).to(wide) for i in indices])
        for i, number in zip(indices, together.tolist(), strict=True):
            numbers[i] = number
    return numbers
