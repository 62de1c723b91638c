"""Size, norm and spread of many tensors in one transfer to the host, and the g-SNR from them."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nomadam.numerics.moments_cpu import PLAIN, cpu_measures, raw_moments_cpu
from nomadam.numerics.slices import slices

# Elements together from which the compiled loop is taken: with fewer, what it saves is far less
# than a second, which is what compiling takes. Of the tensors alone, and not of whether the loop
# is there by now, so that the same gradients have the same moments at any time in a process.
SMALLEST_COMPILED = 10_000_000
# Largest magnitudes whose squares, and sums of very many of them, float32 holds in full precision.
SMALLEST_SQUARED, LARGEST_SQUARED = 1e-15, 1e14


class Share(NamedTuple):
    """What is known of a tensor, or of the part of it that lies here; all of it host numbers.

    Attributes:
        count: number of real elements.
        largest: largest magnitude, max |x|; NaN or inf where an element is not finite.
        mean: of the elements, in units of ``largest``; NaN where that is 0 or not finite.
        deviations: sum of their squared deviations from it, in units of the square of ``largest``.
    """

    count: int
    largest: float
    mean: float
    deviations: float


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


def moments(
    tensors: Sequence[Tensor], limit: int = 2**20, total: int | None = None
) -> list[Moments]:
    """Measures every tensor; for the arguments see `shares`.

    Examples:
        >>> moments([torch.tensor([2.0, -2.0])])
        [Moments(count=2, largest=2.0, norm=1.41421..., std=1.41421...)]
    """
    return [moments_of(share) for share in shares(tensors, limit, total)]


def moments_of(share: Share) -> Moments:
    """The moments of a whole tensor of which all is known."""
    count, largest, mean, deviations = share
    if not 0.0 < largest < math.inf:
        return Moments(count, largest, math.nan, math.nan)
    std = math.sqrt(deviations / (count - 1)) if count > 1 else 0.0
    return Moments(count, largest, math.sqrt(deviations + count * mean**2), std)


def merged(parts: Sequence[Share]) -> Share:
    """What is known of a tensor from what is known of its parts, in an order that is given.

    Means and deviations are brought to the unit of the largest part and summed without rounding in
    between (Chan, Golub and LeVeque's update of the deviations), so that parts of any scale and
    mean do not lose each other's digits.

    Args:
        parts: of a tensor, empty ones among them; one that is not finite makes the whole so.

    Examples:
        >>> merged(shares([torch.tensor([1.0, 3.0]).double(), torch.tensor([6.0, 8.0]).double()]))
        Share(count=4, largest=8.0, mean=0.5625, deviations=0.453125)
    """
    count = sum(part.count for part in parts)
    filled = [part for part in parts if part.count]
    largest = max((part.largest for part in filled), default=0.0)
    if any(math.isnan(part.largest) for part in filled):
        largest = math.nan
    if not 0.0 < largest < math.inf:
        return Share(count, largest, math.nan, math.nan)
    known = [
        # A part that is all zero has no unit of its own.
        (n, mean * own / largest, deviations * (own / largest) ** 2) if own else (n, 0.0, 0.0)
        for n, own, mean, deviations in filled
    ]
    mean = math.fsum(n * part_mean for n, part_mean, _ in known) / count
    deviations = math.fsum(part + n * (own - mean) ** 2 for n, own, part in known)
    return Share(count, largest, mean, deviations)


def shares(tensors: Sequence[Tensor], limit: int = 2**20, total: int | None = None) -> list[Share]:
    """Measures every tensor, with one host synchronisation for each device, or two.

    Tensors on the CPU that together are large are read once by a compiled loop in float64, where a
    C++ compiler is found. On CUDA norms and sums do, except for a tensor in float64, of extreme
    scale, or whose deviation would be lost in the difference: that takes the second
    synchronisation. It and all others are divided by their largest magnitude before anything is
    squared, so that no scale over- or underflows, and are taken in slices, so that little memory is
    needed.

    Args:
        tensors: real tensors of any floating dtype, shape and stride, none of them empty.
        limit: elements of a slice; the temporaries are one slice in float32 (or float64).
        total: elements of all tensors that are measured alike, in this call or in others: it
            decides whether the CPU's compiled loop pays; default those of this call.

    Returns:
        one record for each tensor, computed in float32 or wider and merged in float64.

    Examples:
        >>> shares([torch.tensor([2.0, -2.0])])
        [Share(count=2, largest=2.0, mean=0.0, deviations=2.0)]
    """
    found: dict[int, Share] = {}
    on_cpu = [i for i, tensor in enumerate(tensors) if cpu_measures(tensor)]
    here = sum(tensors[i].numel() for i in on_cpu)
    if on_cpu and (here if total is None else total) >= SMALLEST_COMPILED:
        found |= zip(on_cpu, shares_in_one_read([tensors[i] for i in on_cpu]), strict=False)
    on_cuda = [i for i, tensor in enumerate(tensors) if _is_cuda(tensor)]
    by_norms = shares_by_norms([tensors[i] for i in on_cuda])
    found |= {i: known for i, known in zip(on_cuda, by_norms, strict=True) if known is not None}
    rest = [i for i in range(len(tensors)) if i not in found]
    found |= zip(rest, shares_in_slices([tensors[i] for i in rest], limit), strict=True)
    return [found[i] for i in range(len(tensors))]


def _is_cuda(tensor: Tensor) -> bool:
    return tensor.is_cuda


def shares_in_one_read(tensors: Sequence[Tensor]) -> list[Share]:
    """Moments by the compiled loop, of tensors each of which `cpu_measures`.

    Returns:
        one record for each tensor; none at all without a working C++ compiler.
    """
    raw = raw_moments_cpu(tensors) or []
    return [_scaled(tensor.numel(), *each) for tensor, each in zip(tensors, raw, strict=False)]


def shares_by_norms(tensors: Sequence[Tensor]) -> list[Share | None]:
    """Moments by Σ(x - mean)² = ‖x‖² - n·mean², with few kernels and without temporaries.

    One host synchronisation for each device. As good as the reductions in float32, whose error is
    a few roundings where many threads share the elements, as on CUDA, and grows with their number
    on the CPU.

    Returns:
        one record for each tensor; None where float32 may not hold its square or n·mean² is above
        half of ‖x‖²: elsewhere the difference has a few times the relative error of its terms.
    """
    alike: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, tensor in enumerate(tensors):
        if type(tensor) in PLAIN and tensor.dtype != torch.float64:
            alike.setdefault((tensor.device, tensor.dtype), []).append(i)
    measured: list[Tensor] = []
    for indices in alike.values():
        group = [tensors[i] for i in indices]
        measured.append(torch.stack(torch._foreach_norm(group, math.inf)))
        measured.append(torch.stack(torch._foreach_norm(group, 2, dtype=torch.float32)))
        measured.append(torch.stack([tensor.sum(dtype=torch.float32) for tensor in group]))
    numbers = iter(to_host(measured))
    found: list[Share | None] = [None] * len(tensors)
    for indices in alike.values():
        for i, *each in zip(indices, next(numbers), next(numbers), next(numbers), strict=True):
            found[i] = _from_norms(tensors[i].numel(), *each)
    return found


def _from_norms(count: int, largest: float, norm: float, total: float) -> Share | None:
    if count == 1 or not 0.0 < largest < math.inf:
        return _scaled(count, largest, total, 0.0)
    of_mean = total**2 / count
    safe = SMALLEST_SQUARED <= largest <= LARGEST_SQUARED and of_mean <= 0.5 * norm**2 < math.inf
    return _scaled(count, largest, total / count, norm**2 - of_mean) if safe else None


def _scaled(count: int, largest: float, mean: float, deviations: float) -> Share:
    """The record of a tensor whose mean and squared deviations are in its own units."""
    if not 0.0 < largest < math.inf:
        return Share(count, largest, math.nan, math.nan)
    return Share(count, largest, mean / largest, deviations / largest**2)


def shares_in_slices(tensors: Sequence[Tensor], limit: int) -> list[Share]:
    """The records of any tensors, on any device; for the arguments see `shares`."""
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


def _merge(largest: float, sizes: list[int], parts: list[tuple[float, float]]) -> Share:
    """Merges the (variance, mean) of the slices of one tensor, in units of its largest."""
    count = sum(sizes)
    mean = math.fsum(n * part_mean for n, (_, part_mean) in zip(sizes, parts, strict=True)) / count
    deviations = math.fsum(
        n * (variance + (part_mean - mean) ** 2)
        for n, (variance, part_mean) in zip(sizes, parts, strict=True)
    )
    return Share(count, largest, mean, deviations)


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
