"""What is searched for an optimizer: ranges or a grid, the values of each trial, and its edges."""

import functools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from nomadam.experiments.configuration import Run, differing_fields, override, to_json
from nomadam.experiments.fields import Scalar, require

Values = dict[str, Any]
Edge = Literal["lower", "upper"]
Sampler = Literal["qmc", "zoom", "tpe", "grid"]
# Of a range, on the logarithmic scale: nearer than this to an end counts as being there.
EDGE_FRACTION = 0.05
DIGITS = 4
PRIMES = (2, 3, 5, 7, 11, 13, 17, 19)
# As many trials at most come before the first one that TPE places.
MOST_STARTING = 10
# Of a zoom: this part of the trials looks where the best of the others was, in ranges so much
# smaller on the logarithmic scale.
ZOOM_TRIALS = 0.3
ZOOM = 4


@dataclass(frozen=True, kw_only=True)
class Search:
    """What is searched for one optimizer: ranges of some fields of a Run, or a grid of Runs.

    Args:
        label: what the optimizer is called in tables.
        runs: of a grid all its cells, else the one Run whose fields are searched.
        bounds: dotted field to the lowest and the highest value of a log-uniform search; empty for
            a grid.

    Raises:
        ValueError: for a range whose ends are not 0 < low < high, and for a grid whose Runs differ
            in their seed or in nothing.

    Example:
        >>> from nomadam.experiments.gpt2_pretraining import demo
        >>> search = Search(label="a", runs=(demo(),), bounds={"optimizer.lr": (1e-3, 1e-1)})
        >>> search.values(0), search.run({"optimizer.lr": 0.5}).optimizer.lr
        ({'optimizer.lr': 0.01}, 0.5)
    """

    label: str
    runs: tuple[Run, ...]
    bounds: Mapping[str, tuple[float, float]]

    def __post_init__(self) -> None:
        """Check the ranges and the grid."""
        for field, (low, high) in self.bounds.items():
            fits = 0 < low < high < math.inf
            require(fits, f"the range of {field}", (low, high), "two numbers, 0 < low < high")
        if not self.bounds:
            field, differing = f"the grid of {self.label}", list(self.cells[0])
            require(bool(differing), field, "equal Runs", "of Runs that differ")
            require("seed" not in differing, field, "several seeds", "of one seed")

    @functools.cached_property
    def cells(self) -> list[Values]:
        """The values of the fields in which the Runs of a grid differ, a mapping a Run."""
        pairs = [differing_fields(self.runs[0], run) for run in self.runs]
        first = {field: pair[0] for each in pairs for field, pair in each.items()}
        return [
            {
                field: _scalar(each[field][1] if field in each else held)
                for field, held in first.items()
            }
            for each in pairs
        ]

    @property
    def space(self) -> dict[str, list[Any]]:
        """Field to the ends of its range, or to its values in the grid, in their order."""
        if self.bounds:
            return {field: [float(end) for end in ends] for field, ends in self.bounds.items()}
        return {
            field: list(dict.fromkeys(cell[field] for cell in self.cells))
            for field in self.cells[0]
        }

    @property
    def plan(self) -> dict[str, Any]:
        """All that makes this search what it is, as JSON; equal plans have equal trials."""
        if not self.bounds:
            return {"run": to_json(self.runs[0]), "cells": self.cells}
        # What the searched fields are before the search is no part of it.
        lowest = {field: low for field, (low, _) in self.bounds.items()}
        return {"run": to_json(self.run(lowest)), "space": self.space}

    def values(self, index: int) -> Values:
        """The values of a trial that do not depend on other trials: quasi-random, or the grid's."""
        if not self.bounds:
            return self.cells[index]
        return placed(self.bounds, quasi_random(index, len(self.bounds)))

    def run(self, values: Mapping[str, Any]) -> Run:
        """The Run with these values.

        Raises:
            ValueError: the grid has no such Run.
        """
        if not self.bounds:
            if dict(values) not in self.cells:
                raise ValueError(f"the grid of {self.label} has no Run with {shown(values)}")
            return self.runs[self.cells.index(dict(values))]
        return override(self.runs[0], values)

    def distributions(self) -> dict[str, Any]:
        """Optuna's distribution of each field."""
        from optuna.distributions import CategoricalDistribution, FloatDistribution

        if self.bounds:
            return {
                field: FloatDistribution(low, high, log=True)
                for field, (low, high) in self.bounds.items()
            }
        return {field: CategoricalDistribution(choices) for field, choices in self.space.items()}

    def edges(self, best: Mapping[str, Any], tried: Iterable[Mapping[str, Any]]) -> dict[str, Edge]:
        """The fields whose best value lies at an edge of what was searched, and at which.

        It does where it is in the outer 5 % of its range on the logarithmic scale (`outer_edge`),
        which is then too narrow, or where no value beyond it was tried, which in a small search
        can happen anywhere. Fields that are no numbers, or had one value, have no edges.

        Args:
            best: values of the best trial.
            tried: values of all trials, the diverged ones among them.

        Example:
            >>> from nomadam.experiments.gpt2_pretraining import demo
            >>> search = Search(label="a", runs=(demo(),), bounds={"optimizer.lr": (1e-3, 1e-1)})
            >>> rates = [{"optimizer.lr": lr} for lr in (2e-3, 1e-2, 9e-2)]
            >>> [search.edges(best, rates) for best in rates]
            [{'optimizer.lr': 'lower'}, {}, {'optimizer.lr': 'upper'}]
        """
        tried = list(tried)
        found: dict[str, Edge] = {}
        for field, value in best.items():
            others = {each[field] for each in tried}
            if len(others) < 2 or not all(_is_number(other) for other in others):
                continue
            edge = outer_edge(value, *self.bounds[field]) if self.bounds else None
            if edge is not None:
                found[field] = edge
            elif value <= min(others):
                found[field] = "lower"
            elif value >= max(others):
                found[field] = "upper"
        return found


def outer_edge(value: float, low: float, high: float) -> Edge | None:
    """The end of a range in whose outer 5 % a value lies on the logarithmic scale, if in any.

    Example:
        >>> [outer_edge(value, 1e-3, 1e-1) for value in (1.2e-3, 2e-3, 9e-2)]
        ['lower', None, 'upper']
    """
    near = (high / low) ** EDGE_FRACTION
    if value <= low * near:
        return "lower"
    return "upper" if value >= high / near else None


def quasi_random(index: int, dimensions: int) -> list[float]:
    """A point of Halton's sequence, which fills the unit cube evenly however far it is taken.

    Coordinate j of point i is the number i + 1 written in the j-th prime as base, its digits
    mirrored at the point. It is a pure function of its arguments, so that processes which share
    nothing else draw the same points; the first coordinate is the most even.

    Args:
        index: which point, from 0.
        dimensions: of the cube, 1 to 8.

    Returns:
        Numbers above 0 and below 1.

    Raises:
        ValueError: for more dimensions.

    Example:
        >>> [quasi_random(index, 1)[0] for index in range(4)]
        [0.5, 0.25, 0.75, 0.125]
    """
    if dimensions > len(PRIMES):
        raise ValueError(f"{dimensions} fields are searched: must be at most {len(PRIMES)}")
    return [_mirrored(index + 1, base) for base in PRIMES[:dimensions]]


def _mirrored(number: int, base: int) -> float:
    """The digits of a whole number behind the point, the last one first."""
    value, place = 0.0, 1.0
    while number:
        number, digit = divmod(number, base)
        place /= base
        value += digit * place
    return value


def placed(bounds: Mapping[str, tuple[float, float]], point: Sequence[float]) -> Values:
    """A point of the unit cube as values of the fields, log-uniform, to four digits.

    Example:
        >>> placed({"lr": (1e-4, 1.0)}, [0.25])
        {'lr': 0.001}
    """
    return {
        field: rounded(low * (high / low) ** coordinate, low, high)
        for (field, (low, high)), coordinate in zip(bounds.items(), point, strict=True)
    }


def rounded(value: float, low: float, high: float) -> float:
    """A value to four digits, within its range, so that it can be read and typed."""
    return min(max(float(f"{value:.{DIGITS}g}"), low), high)


def suggested(search: Search, index: int, budget: int, trials: Sequence[Any]) -> Values:
    """The values that optuna's TPE proposes for the next trial.

    The first half of the budget, at most 10 trials, is quasi-random. Diverged trials have an
    infinite value, and TPE ranks values only; those in training count as bad, so that several
    processes do not crowd at one place.

    Args:
        search: ranges; a grid is not sampled.
        index: of the trial.
        budget: of the whole search, in trials.
        trials: optuna's frozen trials, finished and running ones.
    """
    import optuna

    starting = min(MOST_STARTING, math.ceil(budget / 2))
    if index < starting:
        return search.values(index)
    # A study in memory: what is written to the shared one is written in one piece, by its owner.
    sampler = optuna.samplers.TPESampler(
        seed=index, n_startup_trials=1, multivariate=True, constant_liar=True
    )
    study = optuna.create_study(sampler=sampler)
    study.add_trials(trials)
    drawn = study.ask(search.distributions()).params
    return {field: rounded(drawn[field], *ends) for field, ends in search.bounds.items()}


def zoomed(
    search: Search, index: int, budget: int, trials: Sequence[tuple[Values, float]]
) -> Values:
    """The values of a trial where the last third or so looks around the best one before.

    The first trials are quasi-random in the whole ranges. The others are quasi-random in a box
    around the best one so far, a fourth as long in each field on the logarithmic scale and moved to
    lie in the ranges: at ten trials of a learning rate the steps shrink from a factor of 2.4 to one
    of 1.5.

    Args:
        search: ranges; a grid is not sampled.
        index: of the trial.
        budget: of the whole search, in trials.
        trials: values and loss of those that have finished, inf where they diverged.

    Example:
        >>> from nomadam.experiments.gpt2_pretraining import demo
        >>> search = Search(label="a", runs=(demo(),), bounds={"optimizer.lr": (1e-4, 1.0)})
        >>> zoomed(search, 7, 10, [({"optimizer.lr": 1e-2}, 3.0), ({"optimizer.lr": 1e-1}, 4.0)])
        {'optimizer.lr': 0.005623}
    """
    first = budget - int(ZOOM_TRIALS * budget)
    finished = [each for each in trials if math.isfinite(each[1])]
    if index < first or not finished:
        return search.values(index)
    best = min(finished, key=lambda each: each[1])[0]
    box = {field: _box(best[field], low, high) for field, (low, high) in search.bounds.items()}
    # The sequence's first point is the middle of the first field, where the best one was.
    start, tried = index - first + 1, [values for values, _ in trials]
    points = (placed(box, quasi_random(start + n, len(box))) for n in range(len(tried) + 1))
    # Around one that lies a step of the sequence off, the box of a single field has that again.
    return next((values for values in points if values not in tried), search.values(index))


def _box(value: float, low: float, high: float) -> tuple[float, float]:
    length = (high / low) ** (1 / ZOOM)
    start = min(max(value / math.sqrt(length), low), high / length)
    return start, start * length


def searched_fields(space: Mapping[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
    """The search space of a row of the baselines, by the dotted fields of a Run.

    Example:
        >>> searched_fields({"lr": (1e-4, 1e-2), "d_coef": (0.1, 10.0)})
        {'optimizer.lr': (0.0001, 0.01), 'optimizer.arguments.d_coef': (0.1, 10.0)}
    """
    return {dotted(name): ends for name, ends in space.items()}


def dotted(name: str) -> str:
    """The dotted field of ``lr``, ``weight_decay`` or one of the optimizer's arguments."""
    own = name in ("lr", "weight_decay")
    return f"optimizer.{name}" if own else f"optimizer.arguments.{name}"


def short(field: str) -> str:
    """The last part of a dotted field, which is enough to tell it."""
    return field.rpartition(".")[2]


def shown(values: Mapping[str, Any]) -> str:
    """Put the values of a trial into a few words.

    Example:
        >>> shown({"optimizer.lr": 0.00123, "optimizer.arguments.gain": "gsnr"})
        'lr=0.00123 gain=gsnr'
    """
    texts = [
        f"{short(field)}={value:g}" if isinstance(value, float) else f"{short(field)}={value}"
        for field, value in values.items()
    ]
    return " ".join(texts)


def _scalar(value: Any) -> Scalar:
    return value if isinstance(value, Scalar) else json.dumps(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
