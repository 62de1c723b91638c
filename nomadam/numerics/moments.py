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

    Examples:
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

    Examples:
        >>> moments([torch.tensor([2.0, -2.0])])
        [Moments(count=2, largest=2.0, norm=1.41421..., std=1.41421...)]
    """
    sizes: list[list[int]] = []
    measured: list[Tensor] = []
    for tensor in tensors:
        wide = torch.promote_types(tensor.dtype, torch.float32)
        views = [view for (view,) in slices([tensor], limit)]
        # All numbers of a tensor share one allocation: small tensors that are made between large
        # temporaries, and outlive them, would leave the heap in pieces as large as the tensor.
        found = torch.empty(1 + 2 * len(views), dtype=wide, device=tensor.device)
        found[0] = torch.linalg.vector_norm(tensor, math.inf)  # with dtype=, CPUs copy it whole
        for i, view in enumerate(views):
            variance, mean = torch.var_mean(view.to(wide) / found[0], correction=0)
            found[2 * i + 1], found[2 * i + 2] = variance, mean
        measured.append(found)
        sizes.append([view.numel() for view in views])
    return [
        _merge(largest, parts, list(zip(rest[::2], rest[1::2], strict=True)))
        for parts, (largest, *rest) in zip(sizes, to_host(measured), strict=True)
    ]


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


def to_host(vectors: Sequence[Tensor]) -> list[list[float]]:
    """Brings small one-dimensional tensors to the host, with one transfer for each device.

    Examples:
        >>> to_host([torch.tensor([1.0, 2.0]), torch.tensor([True])])
        [[1.0, 2.0], [1.0]]
    """
    by_device: dict[torch.device, list[int]] = {}
    for i, vector in enumerate(vectors):
        by_device.setdefault(vector.device, []).append(i)
    numbers: list[list[float]] = [[] for _ in vectors]
    for indices in by_device.values():
        wide = torch.float32
        for i in indices:
            wide = torch.promote_types(wide, vectors[i].dtype)
        together = iter(torch.cat([vectors[i].to(wide) for i in indices]).tolist())
        for i in indices:
            numbers[i] = [next(together) for _ in range(vectors[i].numel())]
    return numbers
