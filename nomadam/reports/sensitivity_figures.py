"""The figure of learning-rate sensitivity: lines with bands, or points where trials are scattered."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nomadam.reports.arms import RATE, Arm, Comparison, best
from nomadam.reports.drawing import (
    COLORS,
    CROSS,
    INK,
    LINES,
    MARKERS,
    MOST_ARMS,
    QUIET,
    Picture,
    legend_above,
    legend_height,
    plain_ticks,
    save,
    shown,
)
from nomadam.reports.tables import fixed

COLUMNS = 3


@dataclass(frozen=True, kw_only=True)
class Series:
    """What is drawn in one colour.

    Args:
        label: in the legend, or above a panel of its own.
        panel: title of the panel that it is in.
        lines: arms that differ in the learning rate only, ascending; the best such family first.
        points: arms that stand alone, as trials do whose other values differ too.
        index: of its colour.
    """

    label: str
    panel: str
    lines: tuple[list[Arm], ...]
    points: tuple[Arm, ...]
    index: int

    @property
    def arms(self) -> list[Arm]:
        """All of them."""
        return [*(arm for line in self.lines for arm in line), *self.points]


def draw_sensitivity(comparison: Comparison, folder: Path) -> Picture | None:
    """Draw the final loss against the learning rate; None where no optimizer has several.

    Models that differ have a panel each, and so has every optimizer where there are many of them.

    Args:
        comparison: the arms.
        folder: exists already.
    """
    series = _series(comparison)
    losses = [loss for one in series for arm in one.arms if (loss := arm.loss()) is not None]
    if not losses:
        return None
    panels: dict[str, list[Series]] = {}
    for one in series:
        panels.setdefault(one.panel, []).append(one)
    overlaid = len(series) > len(panels) or len(panels) == 1
    lost = any(arm.with_status("diverged") for one in series for arm in one.arms)
    labels = list(dict.fromkeys(one.label for one in series)) if overlaid else []
    if lost:
        labels.append("diverged")
    columns = 1 if len(panels) == 1 else COLUMNS
    rows = -(-len(panels) // columns)

    def draw(figure: Any) -> None:
        from matplotlib.lines import Line2D

        axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel()
        top = _limits(axes[0], losses, lost)
        for own, one in zip(axes, panels.values(), strict=False):
            _draw_panel(own, one, top, single=len(panels) == 1)
            own.set_title(
                shown(one[0].panel, 24), fontsize=9 if len(panels) > 1 else None
            )
        if not overlaid and comparison.reference is not None:
            for own in axes[: len(panels)]:
                loss = comparison.reference.loss() or np.nan
                own.axhline(loss, color=INK, linewidth=1, linestyle=LINES[3], zorder=1)
        _finish(figure, axes, len(panels), columns, comparison.unit)
        handles = [_handle(one) for one in {s.label: s for s in reversed(series)}.values()][::-1]
        handles = handles if overlaid else []
        if lost:
            handles.append(Line2D([], [], color=QUIET, **CROSS))
        if labels:
            legend_above(figure, handles, labels)

    found = "; ".join(f"{one.label} {fixed(best(one.arms).loss(), 3)}" for one in series)
    return save(
        draw,
        folder,
        "learning_rate_sensitivity",
        height=(3.6 if len(panels) == 1 else 0.7 + 1.45 * rows) + legend_height(labels),
        section="sensitivity",
        title="Learning-rate sensitivity",
        caption=_caption(series, comparison, overlaid=overlaid),
        alt=f"Final validation loss against learning rate. Best: {found}.",
    )


def _series(comparison: Comparison) -> list[Series]:
    families = [(label, arms) for label, arms in comparison.families() if len(arms) > 1]
    if 0 < len(families) <= MOST_ARMS and not _models(comparison):
        # Few enough for a colour each, whatever they differ in.
        return [
            Series(label=label, panel="", lines=(arms,), points=(), index=index)
            for index, (label, arms) in enumerate(families)
        ]
    in_family = {arm.label: place for place, (_, arms) in enumerate(families) for arm in arms}
    found: list[Series] = []
    names: dict[str, int] = {}
    for label, arms in comparison.tuned():
        known = [arm for arm in arms if arm.lr is not None and arm.lr > 0]
        if len({arm.lr for arm in known}) < 2:
            continue
        lines: dict[int, list[Arm]] = {}
        for arm in sorted(known, key=lambda arm: arm.lr or 0.0):
            lines.setdefault(in_family.get(arm.label, -1), []).append(arm)
        points = lines.pop(-1, [])
        winner = in_family.get(best(known).label, -1)
        ordered = sorted(lines, key=lambda place: (place != winner, place))
        model = _model(comparison, arms[0])
        name = arms[0].optimizer if model else label
        found.append(
            Series(
                label=name,
                panel=model,
                lines=tuple(lines[place] for place in ordered),
                points=tuple(points),
                index=names.setdefault(name, len(names)),
            )
        )
    if len(names) <= MOST_ARMS:
        return found
    return [
        Series(
            label=one.label,
            panel=f"{one.label} {one.panel}".strip(),
            lines=one.lines,
            points=one.points,
            index=one.index,
        )
        for one in found
    ]


def _models(comparison: Comparison) -> list[str]:
    """The fields of the model that differ."""
    return [key for key in comparison.differing_fields() if key.startswith("model.")]


def _model(comparison: Comparison, arm: Arm) -> str:
    """What tells the arm's model from those of others; empty where all have one."""
    return " ".join(str(arm.configuration.get(key, "")) for key in _models(comparison))
