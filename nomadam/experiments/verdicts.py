"""The rule by which a claim is held, not held or undecided, fixed before anything was measured.

All is decided by an interval: the 95 % interval of the mean of at least five differences, paired by
seed, of which less is better for the claim. A claim with a margin

- is *held* where the whole interval is at or below the margin, below it where that is 0,
- is *not held* where the whole interval is above it,
- and is *undecided* otherwise, and with fewer than five pairs.

So *matches AdamW* has a margin of half a per cent of AdamW's loss (one point of accuracy), and
*beats AdamW* has none. A training of ours that diverges at a seed at which AdamW's does not is
worse than any margin: the claim is not held, once five seeds have ended.
"""

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from nomadam.intervals import mean_half_width

Verdict = Literal["held", "not held", "undecided"]

SMALLEST_PAIRS = 5
MATCH_PERCENT = 0.5
MATCH_POINTS = 1.0

# A seed to the number that is compared; None where the training diverged.
Finals = Mapping[int, float | None]


@dataclass(frozen=True, kw_only=True)
class Interval:
    """The mean of some values and its 95 % interval.

    Args:
        values: at least one.

    Example:
        >>> found = Interval(values=(1.0, 2.0, 3.0))
        >>> round(found.low, 2), found.mean, round(found.high, 2)
        (-0.48, 2.0, 4.48)
    """

    values: tuple[float, ...]

    @property
    def n(self) -> int:
        """How many values."""
        return len(self.values)

    @property
    def mean(self) -> float:
        """Of the values."""
        return statistics.fmean(self.values)

    @property
    def low(self) -> float:
        """Lower end; −inf with one value."""
        half = mean_half_width(self.values)
        return -math.inf if half is None else self.mean - half

    @property
    def high(self) -> float:
        """Upper end; inf with one value."""
        half = mean_half_width(self.values)
        return math.inf if half is None else self.mean + half

    def scaled(self, factor: float) -> "Interval":
        """Of the values times a number, as for another unit."""
        return Interval(values=tuple(factor * value for value in self.values))


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Two arms set against each other seed by seed.

    Args:
        differences: ours − theirs at the seeds that both have finished.
        reference: mean of theirs at the same seeds, nan without any.
        failed: seeds at which ours diverged and theirs did not.
        theirs_failed: seeds at which theirs diverged and ours did not.
        left_out: seeds that are in no mean: either diverged, or has not ended.
    """

    differences: dict[int, float]
    reference: float
    failed: tuple[int, ...]
    theirs_failed: tuple[int, ...]
    left_out: tuple[int, ...]

    @property
    def ended(self) -> int:
        """Seeds at which one has finished and the other has finished or diverged."""
        return len(self.differences) + len(self.failed) + len(self.theirs_failed)

    @property
    def interval(self) -> Interval | None:
        """Of the mean difference, None without a pair."""
        values = tuple(self.differences.values())
        return Interval(values=values) if values else None


def paired(ours: Finals, theirs: Finals) -> Pairs:
    """Sets the final numbers of two arms against each other.

    Args:
        ours: seed to number, None where it diverged; a seed that has not ended is missing.
        theirs: of the arm that ours is compared with.

    Example:
        >>> paired({1: 2.0, 2: None, 3: 1.0}, {1: 1.5, 2: 1.5, 3: None})
        Pairs(differences={1: 0.5}, reference=1.5, failed=(2,), theirs_failed=(3,), left_out=(2, 3))
    """
    seeds = sorted(set(ours) | set(theirs))
    both = [s for s in seeds if ours.get(s) is not None and theirs.get(s) is not None]
    differences = {seed: _number(ours[seed]) - _number(theirs[seed]) for seed in both}
    failed = [s for s in seeds if s in ours and ours[s] is None and theirs.get(s) is not None]
    lost = [s for s in seeds if s in theirs and theirs[s] is None and ours.get(s) is not None]
    return Pairs(
        differences=differences,
        reference=statistics.fmean(_number(theirs[s]) for s in both) if both else math.nan,
        failed=tuple(failed),
        theirs_failed=tuple(lost),
        left_out=tuple(seed for seed in seeds if seed not in both),
    )


def _number(value: float | None) -> float:
    assert value is not None
    return value


def decide(interval: Interval | None, margin: float = 0.0) -> Verdict:
    """The verdict on "at most ``margin``"; with a margin of 0, on "below 0".

    Args:
        interval: of differences of which less is better for the claim; None without any.
        margin: in their unit.

    Example:
        >>> decide(Interval(values=(-2.0, -1.9, -2.1, -2.0, -1.8)))
        'held'
        >>> decide(Interval(values=(-2.0, 1.9, -2.1, 2.0)))
        'undecided'
    """
    if interval is None or interval.n < SMALLEST_PAIRS:
        return "undecided"
    if interval.high < margin or interval.high == margin != 0.0:
        return "held"
    return "not held" if interval.low > margin else "undecided"


def decide_pairs(pairs: Pairs, margin: float = 0.0) -> Verdict:
    """The same for pairs; divergences count, once enough seeds have ended.

    Example:
        >>> theirs = {seed: 2.0 for seed in range(5)}
        >>> decide_pairs(paired({**theirs, 0: None}, theirs))
        'not held'
    """
    if pairs.failed and pairs.ended >= SMALLEST_PAIRS:
        return "not held"
    return decide(pairs.interval, margin)


def matches(loss: Pairs) -> Verdict:
    """Whether our loss is at most half a per cent above theirs.

    Example:
        >>> theirs = {seed: 2.0 for seed in range(5)}
        >>> matches(paired({seed: 2.009 for seed in range(5)}, theirs))
        'held'
        >>> matches(paired({seed: 2.011 for seed in range(5)}, theirs))
        'not held'
    """
    return decide_pairs(loss, MATCH_PERCENT / 100 * abs(loss.reference))


def matches_accuracy(shortfall: Pairs) -> Verdict:
    """Whether our accuracy is at most one point below theirs.

    Args:
        shortfall: of `paired` with errors, 1 − accuracy, in place of losses.

    Example:
        >>> ours, theirs = ({seed: error for seed in range(5)} for error in (0.059, 0.05))
        >>> matches_accuracy(paired(ours, theirs))
        'held'
    """
    return decide_pairs(shortfall, MATCH_POINTS / 100)


def all_of(*verdicts: Verdict) -> Verdict:
    """Held where all are, not held where any is not, else undecided.

    Example:
        >>> all_of("held", "undecided"), all_of("undecided", "not held")
        ('undecided', 'not held')
    """
    if "not held" in verdicts:
        return "not held"
    return "held" if all(verdict == "held" for verdict in verdicts) else "undecided"


def equivalent(pairs: Pairs) -> Verdict:
    """Whether two arms can be told apart by less than half a per cent of the loss, either way.

    Held where the whole interval lies within ± that, not held where all of it lies outside.

    Example:
        >>> theirs = {seed: 2.0 for seed in range(5)}
        >>> equivalent(paired({seed: 1.98 for seed in range(5)}, theirs))
        'not held'
    """
    margin = MATCH_PERCENT / 100 * abs(pairs.reference)
    if (pairs.failed or pairs.theirs_failed) and pairs.ended >= SMALLEST_PAIRS:
        return "not held"
    if pairs.interval is None:
        return "undecided"
    return all_of(decide(pairs.interval, margin), decide(pairs.interval.scaled(-1.0), margin))


def decades_near_best(losses: Mapping[float, float | None], percent: float = 2.0) -> float:
    """How wide the learning rates are whose loss is near the best, in decades.

    The grid is taken as steps: each rate stands for the geometric half-way to its neighbours, a
    rate at an end for as much to the other side; of the rates within ``percent`` of the best loss,
    the widths are added up.

    Args:
        losses: learning rate to final loss, None where it diverged; at least two rates. 0 decades
            where all diverged.
        percent: of the best loss.

    Example:
        >>> decades_near_best({0.01: 5.0, 0.1: 1.0, 1.0: 1.01, 10.0: None})
        2.0
    """
    rates = sorted(losses)
    logs = [math.log10(rate) for rate in rates]
    best = min((loss for loss in losses.values() if loss is not None), default=None)
    if best is None:
        return 0.0
    gaps = [after - before for before, after in zip(logs, logs[1:], strict=False)]
    widths = [
        (before + after) / 2
        for before, after in zip([gaps[0], *gaps], [*gaps, gaps[-1]], strict=True)
    ]
    near = best + percent / 100 * abs(best)
    return sum(
        width
        for rate, width in zip(rates, widths, strict=True)
        if (loss := losses[rate]) is not None and loss <= near
    )
