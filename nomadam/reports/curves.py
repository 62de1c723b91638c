"""Learning curves as arrays: smoothed, averaged over seeds, thinned out for drawing."""

from dataclasses import dataclass

import numpy as np

from nomadam.reports.arms import Arm
from nomadam.reports.reading import RunRecord, number

AXES = ("step", "tokens", "seconds")
SMOOTHING_PARTS = 40
MOST_POINTS = 800


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A line to draw.

    Args:
        x: position on each of `AXES`, by its name; mean over the seeds.
        mean: mean over the seeds.
        sd: unbiased standard deviation over the seeds, None for one seed.
        end: for a run that diverged, its last position on each axis; else None.
    """

    x: dict[str, np.ndarray]
    mean: np.ndarray
    sd: np.ndarray | None = None
    end: dict[str, float] | None = None

    @property
    def diverged(self) -> bool:
        """Whether it is the line of a run that diverged."""
        return self.end is not None


def smoothing_window(num_steps: int) -> int:
    """Return how many steps the training loss is averaged over: a fortieth, at least one."""
    return max(1, num_steps // SMOOTHING_PARTS)


def trailing_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Return the mean of each value and the `window - 1` before it (fewer at the start).

    Example:
        >>> trailing_mean(np.array([4.0, 2.0, 0.0]), 2).tolist()
        [4.0, 3.0, 1.0]
    """
    total = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return (total[ends] - total[starts]) / (ends - starts)


def _points(run: RunRecord, key: str) -> dict[int, list[float]]:
    points = {}
    for row in run.metrics:
        values = [number(row.get(name)) for name in (*AXES, key)]
        if values[0] is not None and values[3] is not None:
            points[row["step"]] = [np.nan if value is None else value for value in values]
    return points


def _thinned(curve: Curve) -> Curve:
    size = len(curve.mean)
    if size <= MOST_POINTS:
        return curve
    kept = np.unique(np.linspace(0, size - 1, MOST_POINTS).round().astype(int))
    return Curve(
        x={name: values[kept] for name, values in curve.x.items()},
        mean=curve.mean[kept],
        sd=None if curve.sd is None else curve.sd[kept],
        end=curve.end,
    )


def _curve(runs: list[RunRecord], key: str, end: dict[str, float] | None = None) -> Curve | None:
    tables = [points for run in runs if (points := _points(run, key))]
    if not tables:
        return None
    steps = [step for step in tables[0] if all(step in table for table in tables)]
    if not steps:
        return None
    values = np.array([[table[step] for step in steps] for table in tables])
    losses = values[:, :, 3]
    if key == "train_loss":
        window = smoothing_window(len(steps))
        losses = np.stack([trailing_mean(row, window) for row in losses])
    return _thinned(
        Curve(
            x={name: values[:, :, i].mean(0) for i, name in enumerate(AXES)},
            mean=losses.mean(0),
            sd=losses.std(0, ddof=1) if len(tables) > 1 else None,
            end=end,
        )
    )


def _end(run: RunRecord) -> dict[str, float]:
    last = run.metrics[-1] if run.metrics else {}
    positions = {name: number(last.get(name)) for name in AXES}
    return {name: np.nan if value is None else value for name, value in positions.items()}


def curves(arm: Arm, key: str) -> list[Curve]:
    """Return the lines of an arm: one for its healthy seeds together, one for each diverged one.

    Args:
        arm: its runs may be unfinished; the mean ends where the shortest healthy seed ends.
        key: `train_loss` (smoothed) or `validation_loss` (as measured).
    """
    healthy = _curve([run for run in arm.runs if run.status != "diverged"], key)
    lost = [_curve([run], key, _end(run)) for run in arm.with_status("diverged")]
    return [curve for curve in (healthy, *lost) if curve is not None]
