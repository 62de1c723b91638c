"""Intervals of a mean, by Student's distribution: standard library only."""

import math
import statistics
from collections.abc import Collection

LEVEL = 0.95


def mean_half_width(values: Collection[float], level: float = LEVEL) -> float | None:
    """Half of the interval of the mean of independent values, None for less than two.

    It is t · s / √n, with Student's t of n − 1 degrees of freedom.

    Args:
        values: n numbers.
        level: probability that the interval holds the true mean, above 0 and below 1.

    Example:
        >>> round(mean_half_width([1.0, 2.0, 3.0]), 3)
        2.484
    """
    n = len(values)
    if n < 2:
        return None
    return student_t(level, n - 1) * statistics.stdev(values) / math.sqrt(n)


def student_t(level: float, degrees: int) -> float:
    """The t with P(|T| ≤ t) = level, of Student's distribution with whole degrees of freedom.

    With θ = arctan(t / √ν) the probability is a finite sum of sines and cosines (Abramowitz and
    Stegun, 26.7.3 and 26.7.4), which is solved for θ by halving.

    Args:
        level: above 0 and below 1.
        degrees: ν, at least 1.

    Raises:
        ValueError: for a value outside its range.

    Example:
        >>> round(student_t(0.95, 4), 4), round(student_t(0.95, 9), 4)
        (2.7764, 2.2622)
    """
    if not 0 < level < 1 or degrees < 1:
        raise ValueError(
            f"level = {level!r}, degrees = {degrees!r}: must be above 0 and below 1, and at least 1"
        )
    low, high = 0.0, math.pi / 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, degrees) < level else (low, middle)
    return math.sqrt(degrees) * math.tan(low)


def _within(theta: float, degrees: int) -> float:
    """P(|T| ≤ √ν tan θ)."""
    odd, cosine = degrees % 2, math.cos(theta)
    term = cosine if odd else 1.0
    total = term if degrees > 1 else 0.0
    for k in range(2 + odd, degrees, 2):
        term *= cosine * cosine * (k - 1) / k
        total += term
    total *= math.sin(theta)
    return 2 / math.pi * (theta + total) if odd else total
