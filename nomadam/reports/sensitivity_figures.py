"""The figure of learning-rate sensitivity: lines with bands, and points where trials scatter."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from nomadam.reports.arms import Arm, Comparison, best, short_value
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
from nomadam.reports.grids import rate_decay_grids
from nomadam.reports.tables import fixed, mean_and_sd

COLUMNS, MOST_PANELS = 3, 30


@dataclass(frozen=True, kw_only=True)
class Series:
    """What has one colour.

    Args:
        label: in the legend, or above a panel of its own.
        panel: title of the panel that it is in, empty where there is only one.
        lines: arms that differ in the learning rate only, ascending; the one with the best arm
            first.
        points: arms that stand alone, as trials do whose other values differ too.
    """

    label: str
    panel: str
    lines: tuple[list[Arm], ...]
    points: tuple[Arm, ...]

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
    panels = list(dict.fromkeys(one.panel for one in series))[:MOST_PANELS]
    series = [one for one in series if one.panel in panels]
    losses = [loss for one in series for arm in one.arms if (loss := arm.loss()) is not None]
    if not losses:
        return None
    names = list(dict.fromkeys(one.label for one in series))
    colored = len(names) <= MOST_ARMS
    lost = any(arm.with_status("diverged") for one in series for arm in one.arms)
    labels = [*(names if colored else []), *(["diverged"] if lost else [])]
    columns = min(COLUMNS, len(panels))
    rows = -(-len(panels) // columns)

    def draw(figure: Any) -> None:
        from matplotlib.lines import Line2D

        grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel()
        _limit(grid[0], losses, lost)
        for axes, panel in zip(grid, panels, strict=False):
            own = [one for one in series if one.panel == panel]
            for one in own:
                index = names.index(one.label) if colored else 0
                _draw_series(axes, one, index, height=own.index(one))
            if not colored and comparison.reference is not None:
                level = comparison.reference.loss()
                axes.axhline(np.nan if level is None else level, color=INK, linewidth=1, zorder=1)
            if panel:
                axes.set_title(shown(panel, 22), fontsize=8.5, fontweight="normal")
        _finish(figure, grid, len(panels), columns, comparison.loss_unit)
        joined = {one.label for one in series if one.lines}
        handles = [
            Line2D([], [], color=_color(i), marker=_marker(i), linestyle=_line(i, name in joined))
            for i, name in enumerate(names if colored else [])
        ]
        if lost:
            handles.append(Line2D([], [], color=QUIET, **CROSS))
        if labels:
            legend_above(figure, handles, labels)

    found = "; ".join(_best_in_words(one) for one in series)
    return save(
        draw,
        folder,
        "learning_rate_sensitivity",
        height=(3.6 if rows == 1 and columns == 1 else 0.7 + 1.5 * rows) + legend_height(labels),
        section="sensitivity",
        title="Learning-rate sensitivity",
        caption=_caption(series, comparison, losses, colored=colored),
        alt=f"Final validation loss against learning rate. Best: {found}.",
    )


def _series(comparison: Comparison) -> list[Series]:
    families = [(label, arms) for label, arms in comparison.families() if len(arms) > 1]
    models = [key for key in comparison.differing_fields() if key.startswith("model.")]
    groups = [(label, _with_rate(arms)) for label, arms in comparison.tuned()]
    found = [
        _of_group(label, arms, [own for _, own in families], _model(arms[0], models))
        for label, arms in groups
        if len({arm.lr for arm in arms}) > 1
    ]
    scattered = any(one.points for one in found) or rate_decay_grids(comparison)
    if 0 < len(families) <= MOST_ARMS and not models and not scattered:
        # Few enough for a colour each, whatever they differ in.
        return [Series(label=label, panel="", lines=(arms,), points=()) for label, arms in families]
    if len({one.label for one in found}) > MOST_ARMS:
        return [replace(one, panel=f"{one.label} {one.panel}".strip()) for one in found]
    return found


def _with_rate(arms: Sequence[Arm]) -> list[Arm]:
    return [arm for arm in arms if arm.lr is not None and arm.lr > 0]


def _of_group(label: str, arms: list[Arm], families: list[list[Arm]], model: str) -> Series:
    members = {arm.label for arm in arms}
    winner = best(arms).label
    lines = [family for family in families if family[0].label in members]
    if len(members) > sum(map(len, lines)):
        # Among scattered trials two may share all but the rate by chance.
        lines = [line for line in lines if len(line) > 2]
    lines.sort(key=lambda line: all(arm.label != winner for arm in line))
    in_lines = {arm.label for line in lines for arm in line}
    return Series(
        label=arms[0].optimizer if model else label,
        panel=model,
        lines=tuple(lines),
        points=tuple(arm for arm in arms if arm.label not in in_lines),
    )


def _model(arm: Arm, fields: Sequence[str]) -> str:
    """What tells the arm's model from those of others; empty where there is nothing."""
    values = {key.partition(".")[2]: short_value(arm.configuration.get(key)) for key in fields}
    if list(values) == ["family"]:
        return values["family"]
    return " ".join(f"{key}={value}" for key, value in values.items())


def _color(index: int) -> str:
    return COLORS[index % len(COLORS)]


def _marker(index: int) -> str:
    return MARKERS[index % len(MARKERS)]


def _line(index: int, joined: bool) -> Any:
    return LINES[index % len(LINES)] if joined else "none"


def _limit(axes: Any, losses: Sequence[float], lost: bool) -> None:
    """Set the axis of the loss so that no outlier presses the others."""
    low, high = min(losses), loss_limit(losses)
    margin = 0.08 * (high - low) or 0.1
    axes.set_ylim(low - margin, high + (2.2 if lost else 1) * margin)


def loss_limit(losses: Sequence[float]) -> float:
    """Return the largest loss that a figure needs room for; above it lie outliers alone.

    Example:
        >>> loss_limit([1.0, 1.1, 1.2, 1.3]), round(loss_limit([1.0, 1.1, 1.2, 1.4, 90.0]), 2)
        (1.3, 2.0)
    """
    low, high = float(np.min(losses)), float(np.max(losses))
    reach = float(np.quantile(losses, 0.75)) - low
    # Not for a little more than what is cut off: a line that leaves the axes costs a look as well.
    return low + 2.5 * reach if reach > 0 and high > low + 4 * reach else high


def _draw_series(axes: Any, one: Series, index: int, *, height: int) -> None:
    color = _color(index)
    for place, arms in enumerate(one.lines):
        done = [arm for arm in arms if arm.loss() is not None]
        rates = [arm.lr for arm in done]
        stats = [mean_and_sd(arm.losses().values()) for arm in done]
        means = np.array([mean for mean, _ in stats], dtype=float)
        spreads = np.array([np.nan if sd is None else sd for _, sd in stats], dtype=float)
        faint: dict[str, Any] = {"alpha": 0.35, "linewidth": 1.0} if place else {}
        axes.plot(rates, means, color=color, linestyle=_line(index, True), **faint)
        if place:
            continue
        axes.plot(rates, means, color=color, marker=_marker(index), linestyle="none", markersize=5)
        low, high = means - spreads, means + spreads
        if len(done) > 1 and np.isfinite(spreads).all():
            axes.fill_between(rates, low, high, color=color, alpha=0.18, linewidth=0)
        else:
            # A band has no width at a rate with one seed: the others have whiskers.
            axes.vlines(rates, low, high, color=color, linewidth=1.2)
    dots: dict[str, Any] = {"color": color, "marker": _marker(index), "linestyle": "none"}
    for arm in one.points:
        mean, sd = mean_and_sd(arm.losses().values())
        if mean is not None:
            axes.plot(arm.lr, mean, markersize=4.5, alpha=0.7, **dots)
            axes.vlines(arm.lr, mean - (sd or 0.0), mean + (sd or 0.0), color=color, linewidth=1.2)
    top = axes.get_ylim()[1]
    rates = [arm.lr for arm in one.arms if (loss := arm.loss()) is not None and loss > top]
    up = {**dots, "marker": "^", "markerfacecolor": "none", "transform": axes.get_xaxis_transform()}
    axes.plot(rates, [0.95] * len(rates), markersize=6, **up)
    lost = [arm.lr for arm in one.arms if arm.with_status("diverged")]
    # At the top of the axes whatever the losses are: the loss of a diverged run is no number.
    places = [(0.9 if one.panel else 0.97) - 0.035 * (height % 4)] * len(lost)
    cross = {**CROSS, "markersize": 6} if one.panel else CROSS
    axes.plot(lost, places, transform=axes.get_xaxis_transform(), color=color, **cross)


def _finish(figure: Any, grid: Any, num_panels: int, columns: int, unit: str) -> None:
    first = grid[0]
    first.set_xscale("log")
    first.margins(x=0.06)
    plain_ticks(first.xaxis)
    if num_panels == 1:
        first.set_xlabel("learning rate")
        first.set_ylabel(f"final validation loss, {unit}")
        return
    from matplotlib.ticker import LogLocator

    first.xaxis.set_major_locator(LogLocator(numticks=4))
    for unused in grid[num_panels:]:
        unused.set_visible(False)
    for axes in grid:
        axes.tick_params(labelsize=7.5)
    # The last row may have gaps: the axes above them bear the rates.
    for above in grid[max(0, num_panels - columns) : num_panels]:
        above.tick_params(labelbottom=True)
    figure.supxlabel("learning rate", fontsize=9.5)
    figure.supylabel("final validation loss", fontsize=9.5)


def _best_in_words(one: Series) -> str:
    arm = best(one.arms)
    label = one.label if one.panel in ("", one.label) else f"{one.label} {one.panel}"
    return f"{label} lr={short_value(arm.lr)} {fixed(arm.loss(), 3)}"


def _caption(
    series: Sequence[Series], comparison: Comparison, losses: Sequence[float], *, colored: bool
) -> str:
    text = "Final validation loss against the learning rate"
    text += ", a color for each optimizer" if colored else ", a panel for each optimizer"
    text += "; mean over the finished seeds"
    if any(len(arm.losses()) > 1 for one in series for arm in one.arms):
        text += ", bands or whiskers ± one standard deviation over them"
    text += "."
    if any(len(one.lines) > 1 for one in series):
        text += " Strong is the line with the best arm of its color, faint are those that differ"
        text += " in the decay or another value."
    if any(one.points for one in series):
        text += " Points without a line are trials that differ in more than the rate."
    if not colored and comparison.reference is not None:
        text += f" The black line: the loss of {comparison.reference.label}."
    if max(losses) > loss_limit(losses):
        text += " A hollow triangle at the top marks a loss above the axes."
    if any(arm.with_status("diverged") for one in series for arm in one.arms):
        text += " A cross at the top marks a learning rate at which a run diverged."
    return text
