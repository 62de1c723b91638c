"""Grids among the arms of a comparison, told from scattered trials by their values."""

import math
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from nomadam.reports.arms import DECAY, RATE, Arm, Comparison, short_value
from nomadam.reports.reading import number
from nomadam.reports.tables import DASH, fixed, mean_and_sd, with_sd

FAMILY = "model.family"
FEWEST_CELLS = 6
Place = tuple[float, float, str]


@dataclass(frozen=True, kw_only=True)
class Measure:
    """What a cell of a grid shows.

    Args:
        key: of the number in result.json.
        name: with its unit.
        factor: from the number to the unit.
        digits: decimals.
        rises: whether more is better.
    """

    key: str
    name: str
    factor: float
    digits: int
    rises: bool

    def of(self, arm: Arm) -> tuple[float | None, float | None]:
        """Mean and standard deviation over the finished seeds of an arm."""
        return mean_and_sd([self.factor * value for value in arm.finals(self.key).values()])

    def ranked(self, arms: Iterable[Arm]) -> list[Arm]:
        """The arms that have a value, the best first."""
        known = [(value, arm) for arm in arms if (value := self.of(arm)[0]) is not None]
        known.sort(key=lambda each: each[0], reverse=self.rises)
        return [arm for _, arm in known]


def measure_of(comparison: Comparison) -> Measure:
    """The final accuracy where some arm has one, else the final loss."""
    if any(arm.finals("validation_accuracy") for arm in comparison.arms):
        name = "final accuracy, %"
        return Measure(key="validation_accuracy", name=name, factor=100.0, digits=1, rises=True)
    name = f"final validation loss, {comparison.loss_unit}"
    return Measure(key="validation_loss", name=name, factor=1.0, digits=2, rises=False)


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Arms of one optimizer that fill a product of learning rates, decays and families of models.

    Args:
        label: the optimizer, and what else tells this grid from others.
        cells: (learning rate, decay, family of models, empty where all have one) to arm.
    """

    label: str
    cells: dict[Place, Arm]

    @property
    def rates(self) -> list[float]:
        """The learning rates, ascending."""
        return sorted({rate for rate, _, _ in self.cells})

    @property
    def decays(self) -> list[float]:
        """The decays, ascending."""
        return sorted({decay for _, decay, _ in self.cells})

    @property
    def families(self) -> list[str]:
        """The families of models in the order of their runs."""
        return list(dict.fromkeys(family for _, _, family in self.cells))

    def of_family(self, family: str) -> list[Arm]:
        """The arms of one family."""
        return [arm for (_, _, own), arm in self.cells.items() if own == family]


def rate_decay_grids(comparison: Comparison) -> list[Grid]:
    """Find the grids of learning rate and decay, one for each optimizer and model."""
    return _grids(comparison, RATE, DECAY)


def spread_grids(comparison: Comparison) -> list[Grid]:
    """Find the grids over rates, decays and families of models, one for each optimizer."""
    return _grids(comparison, RATE, DECAY, FAMILY)


def _grids(comparison: Comparison, *fields: str) -> list[Grid]:
    found = []
    for label, arms in comparison.groups(*fields):
        cells: dict[Place, Arm] = {}
        for arm in arms:
            decay = number(arm.configuration.get(DECAY))
            family = short_value(arm.configuration.get(FAMILY)) if FAMILY in fields else ""
            if arm.lr is not None and decay is not None:
                # Of two arms in one place, as a run and its repetition, the first counts.
                cells.setdefault((arm.lr, decay, family), arm)
        kept = product_within(cells)
        if kept:
            found.append(
                Grid(label=label, cells={place: cells[place] for place in cells if place in kept})
            )
    return found


def product_within(places: Collection[Place]) -> set[Place]:
    """Return the places that fill a product of values, nothing where they are scattered.

    Places that share no value with others on an axis go, one after the other; with a single axis
    that is all of them. What is left is a grid where at least six cells, and half of the product,
    are there: a grid may be unfinished.

    Example:
        >>> grid = {(lr, decay, "") for lr in (0.1, 0.2, 0.4) for decay in (0.0, 0.5)}
        >>> product_within(grid | {(0.3, 0.7, "")}) == grid
        True
        >>> product_within({(0.1 * k, 1.0 / k, "") for k in range(1, 11)})
        set()
    """
    kept = set(places)
    while True:
        counts = [Counter(values) for values in zip(*kept, strict=True)]
        varied = [axis for axis, values in enumerate(counts) if len(values) > 1]
        held = {place for place in kept if all(counts[axis][place[axis]] > 1 for axis in varied)}
        if held == kept:
            break
        kept = held
    whole = math.prod(len(values) for values in counts)
    filled = len(kept) >= FEWEST_CELLS and 2 * len(kept) >= whole
    return kept if filled else set()


def grid_cells(
    grids: Sequence[Grid], measure: Measure, *, by_family: bool
) -> tuple[list[str], list[list[str]]]:
    """Return heads and texts of the table of grids: the best cell, and the mean over the cells."""
    digits = measure.digits + 1
    heads = [
        "optimizer",
        *(["family"] if by_family else []),
        "cells",
        f"best: {measure.name}",
        "at learning rate",
        "decay",
        "mean over the cells",
        "worst",
        "diverged cells",
    ]
    cells = []
    for grid in grids:
        for family in grid.families:
            arms = grid.of_family(family)
            ranked = measure.ranked(arms)
            values = [value for arm in ranked if (value := measure.of(arm)[0]) is not None]
            first = ranked[0] if ranked else None
            cells.append(
                [
                    grid.label,
                    *([family] if by_family else []),
                    str(len(arms)),
                    with_sd(*measure.of(first), digits=digits) if first else DASH,
                    short_value(first.lr if first else None),
                    short_value(first.configuration.get(DECAY) if first else None),
                    with_sd(*mean_and_sd(values), digits=digits),
                    fixed(values[-1] if values else None, digits),
                    str(sum(is_lost(arm) for arm in arms) or DASH),
                ]
            )
    return heads, cells


def is_lost(arm: Arm) -> bool:
    """Whether all that has become of an arm is that it diverged."""
    return bool(arm.with_status("diverged")) and not arm.with_status("finished")


def grid_explanation(measure: Measure) -> str:
    """Return what the columns of the table of grids mean, in plain text."""
    return (
        f"A cell is a learning rate with a decay, its value the {measure.name.partition(',')[0]}, "
        "mean over the finished seeds; ± beside the best: one standard deviation over them. "
        "Mean over the cells: ± one standard deviation over the cells. Cells of which every seed "
        "diverged are in no mean, and counted; the edges of a grid decide its mean."
    )
