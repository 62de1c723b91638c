"""Arms set against the reference seed by seed: mean difference, interval, what was left out."""

import statistics
from dataclasses import dataclass, field
from typing import Any

from nomadam.intervals import mean_half_width
from nomadam.reports.arms import Arm, Comparison, best, short_value
from nomadam.reports.reading import RunRecord, number
from nomadam.reports.tables import DASH, fixed

# The bar of a match in this project's studies: within so many per cent of the reference's loss.
BAR_PERCENT = 0.5
# Columns of the table that hold text.
PAIRED_TEXT = (0, 6, 8)
# Of more arms those that differ in what is tuned only have one row.
MOST_ARMS = 7


@dataclass(frozen=True, kw_only=True)
class PairedDifference:
    """An arm against the reference, over the seeds that both have finished.

    Args:
        label: of the arm.
        differences: seed -> final validation loss of the arm − that of the reference.
        reference_loss: mean of the reference over the same seeds, None without any.
        left_out: seed -> why it is in no mean.
        steps: seed -> the first step at which the arm was evaluated and its validation loss was not
            above the reference's final one; None where there was no such step.
    """

    label: str
    differences: dict[Any, float]
    reference_loss: float | None
    left_out: dict[Any, str]
    steps: dict[Any, int | None] = field(default_factory=dict)

    @property
    def mean(self) -> float | None:
        """Mean difference, None without a pair."""
        return statistics.fmean(self.differences.values()) if self.differences else None

    @property
    def half_width(self) -> float | None:
        """Half of the 95 % interval of the mean, None for less than two pairs."""
        return mean_half_width(self.differences.values())

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


def paired_differences(comparison: Comparison) -> list[PairedDifference]:
    """Set each arm but the reference against it; empty unless some arm has several seeds.

    A seed that diverged, has not finished or was not run, in the arm or in the reference, is in no
    mean, and named. Of many arms those that differ in what is tuned only have the best one here.
    """
    reference = comparison.reference
    if reference is None or all(len(arm.runs) < 2 for arm in comparison.arms):
        return []
    return [_paired(arm, reference) for arm in _chosen(comparison) if arm is not reference]


def _chosen(comparison: Comparison) -> list[Arm]:
    if len(comparison.arms) <= MOST_ARMS:
        return list(comparison.arms)
    tuned = [arms for _, arms in comparison.tuned()]
    return [best(arms) for arms in tuned if comparison.reference not in arms]


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
        steps={
            run.seed: _first_step(run, theirs[run.seed]) for run in arm.runs if run.seed in pairs
        },
    )


def _first_step(run: RunRecord, loss: float) -> int | None:
    """The first step at which a run was evaluated with at most this loss."""
    evaluated = ((row["step"], number(row.get("validation_loss"))) for row in run.metrics)
    return next((step for step, held in evaluated if held is not None and held <= loss), None)


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
        "steps to its loss",
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
        _steps(pair),
        "; ".join(f"seed {short_value(seed)}: {why}" for seed, why in pair.left_out.items())
        or DASH,
    ]


def _steps(pair: PairedDifference) -> str:
    """The median of the steps, and how many seeds came so far."""
    reached = [step for step in pair.steps.values() if step is not None]
    if not pair.steps:
        return DASH
    median = fixed(statistics.median(reached), 0) if reached else "never"
    return (
        median
        if len(reached) == len(pair.steps)
        else f"{median} ({len(reached)} of {len(pair.steps)})"
    )


def _range(ends: Any, digits: int) -> str:
    return " to ".join(fixed(end, digits, signed=True) for end in ends)


def paired_explanation(comparison: Comparison) -> str:
    """Return what the columns of the table of paired differences mean, in plain text."""
    reference = comparison.reference.label if comparison.reference else DASH
    chosen = len(_chosen(comparison)) + 1 < len(comparison.arms)
    few = " Of arms that differ in what is tuned only, the best one is shown." if chosen else ""
    return (
        f"Final validation loss of the arm − that of {reference}, seed by seed: both see the same "
        "batches. Interval: of the mean, by Student's t with one degree of "
        "freedom less than pairs. Per cent: of the reference's mean loss over the same seeds. "
        f"Within ±{BAR_PERCENT:g} %: yes where the whole interval is, no where all of it is "
        "outside, else undecided. Steps to its loss: the first step at which the arm was "
        f"evaluated and not above {reference}'s final loss of the same seed; the median, and how "
        "many seeds came so far where it was not all of them. Left out: seeds that one of the two "
        "has not finished."
        f"{few}"
    )
