"""Arms set against the reference seed by seed: mean difference, interval, what was left out."""

import math
import statistics
from dataclasses import dataclass
from typing import Any

from nomadam.reports.arms import Arm, Comparison, short_value
from nomadam.reports.tables import DASH, fixed

LEVEL = 0.95
# The bar of a match in this project's studies: within so many per cent of the reference's loss.
BAR_PERCENT = 0.5
# Columns of the table that hold text.
PAIRED_TEXT = (0, 6, 7)


@dataclass(frozen=True, kw_only=True)
class PairedDifference:
    """An arm against the reference, over the seeds that both have finished.

    Args:
        label: of the arm.
        differences: seed -> final validation loss of the arm − that of the reference.
        reference_loss: mean of the reference over the same seeds, None without any.
        left_out: seed -> why it is in no mean.
    """

    label: str
    differences: dict[Any, float]
    reference_loss: float | None
    left_out: dict[Any, str]

    @property
    def mean(self) -> float | None:
        """Mean difference, None without a pair."""
        return statistics.fmean(self.differences.values()) if self.differences else None

    @property
    def half_width(self) -> float | None:
        """Half of the 95 % interval of the mean, None for less than two pairs.

        It is t · s / √n, with Student's t of n − 1 degrees of freedom.
        """
        n = len(self.differences)
        if n < 2:
            return None
        spread = statistics.stdev(self.differences.values())
        return student_t(LEVEL, n - 1) * spread / math.sqrt(n)

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval of the mean difference, None for less than two pairs."""
        mean, half = self.mean, self.half_width
        return None if mean is None or half is None else (mean - half, mean + half)

    def percent(self, difference: float) -> float | None:
        """A difference in per cent of the reference's mean loss, None where that is not above 0."""
        if self.reference_loss is None or self.reference_loss <= 0:
            return None
        return 100 * difference / self.reference_loss

    @property
    def within_bar(self) -> bool | None:
        """Whether the interval lies within the bar; None where it lies across an edge of it."""
        ends = [self.percent(end) for end in self.interval or ()]
        low, high = ends if len(ends) == 2 else (None, None)
        if low is None or high is None:
            return None
        if -BAR_PERCENT <= low and high <= BAR_PERCENT:
            return True
        return False if low > BAR_PERCENT or high < -BAR_PERCENT else None


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


def paired_differences(comparison: Comparison) -> list[PairedDifference]:
    """Set each arm but the reference against it; empty unless some arm has several seeds.

    A seed that diverged, has not finished or was not run, in the arm or in the reference, is in no
    mean, and named.
    """
    reference = comparison.reference
    if reference is None or all(len(arm.runs) < 2 for arm in comparison.arms):
        return []
    return [_paired(arm, reference) for arm in comparison.arms if arm is not reference]


def _paired(arm: Arm, reference: Arm) -> PairedDifference:
    ours, theirs = arm.losses(), reference.losses()
    seeds = dict.fromkeys(run.seed for each in (arm, reference) for run in each.runs)
    pairs = [seed for seed in seeds if seed in ours and seed in theirs]
    left_out = {
        seed: "; ".join(
            f"{prefix}{why}"
            for each, prefix in ((arm, ""), (reference, "the reference "))
            if (why := _why_without_loss(each, seed)) is not None
        )
        for seed in seeds
        if seed not in pairs
    }
    return PairedDifference(
        label=arm.label,
        differences={seed: ours[seed] - theirs[seed] for seed in pairs},
        reference_loss=statistics.fmean(theirs[seed] for seed in pairs) if pairs else None,
        left_out=left_out,
    )


def _why_without_loss(arm: Arm, seed: Any) -> str | None:
    """Why an arm has no final loss at a seed, None where it has."""
    if seed in arm.losses():
        return None
    status = next((run.status for run in arm.runs if run.seed == seed), "not run")
    # One that finished, and whose result.json lacks the loss, is damaged.
    return "without a loss" if status == "finished" else status


def paired_cells(pairs: list[PairedDifference]) -> tuple[list[str], list[list[str]]]:
    """Return heads and texts of the table of paired differences, not escaped."""
    heads = [
        "arm",
        "pairs",
        "mean difference",
        "95 % interval",
        "mean difference, %",
        "95 % interval, %",
        f"within ±{BAR_PERCENT:g} %",
        "left out",
    ]
    return heads, [_cells(pair) for pair in pairs]


def _cells(pair: PairedDifference) -> list[str]:
    mean, interval = pair.mean, pair.interval
    ends = [None if interval is None else pair.percent(end) for end in interval or (0.0, 0.0)]
    few = f"none: {len(pair.differences)} pair{'s' * (len(pair.differences) != 1)}"
    verdict = {True: "yes", False: "no", None: "undecided" if interval else DASH}
    return [
        pair.label,
        str(len(pair.differences)),
        fixed(mean, 4, signed=True),
        _range(interval, 4) if interval else few,
        fixed(None if mean is None else pair.percent(mean), 2, signed=True),
        _range(ends, 2) if interval and None not in ends else DASH,
        verdict[pair.within_bar],
        "; ".join(f"seed {short_value(seed)}: {why}" for seed, why in pair.left_out.items())
        or DASH,
    ]


def _range(ends: Any, digits: int) -> str:
    return " to ".join(fixed(end, digits, signed=True) for end in ends)


def paired_explanation(comparison: Comparison) -> str:
    """Return what the columns of the table of paired differences mean, in plain text."""
    reference = comparison.reference.label if comparison.reference else DASH
    return (
        f"Final validation loss of the arm − that of {reference}, seed by seed: both see the same "
        "batches. Interval: of the mean, by Student's t with one degree of "
        "freedom less than pairs. Per cent: of the reference's mean loss over the same seeds. "
        f"Within ±{BAR_PERCENT:g} %: yes where the whole interval is, no where all of it is "
        "outside, else undecided. Left out: seeds that one of the two has not finished."
    )
