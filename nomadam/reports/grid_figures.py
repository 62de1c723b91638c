"""Figures of grids of learning rate and decay: heat maps that can be read, and surfaces."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nomadam.reports.arms import Comparison, short_value
from nomadam.reports.drawing import CROSS, INK, QUIET, Picture, save, shown
from nomadam.reports.grids import Grid, Measure, is_lost, measure_of, rate_decay_grids
from nomadam.reports.published import GRIDS
from nomadam.reports.sensitivity_figures import loss_limit
from nomadam.reports.tables import fixed

MOST_MAPS = 9
SHADES = 40
SURFACES_A_ROW = 3
MISSING, LOST = "#eef0f2", "#ffffff"


@dataclass(frozen=True, kw_only=True)
class Map:
    """The values of a grid, ready to be drawn.

    Args:
        title: of its panel.
        rates: texts of the columns.
        decays: texts of the rows, the smallest first.
        values: [decays, rates], NaN where there is none.
        lost: [decays, rates], seeds that diverged.
    """

    title: str
    rates: list[str]
    decays: list[str]
    values: np.ndarray
    lost: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Scale:
    """One scale of colors for all maps of a figure; bright is good.

    Args:
        low: value at one end.
        high: value at the other end.
        worst: of all values; beyond an end where the color of outliers is cut off.
        measure: of the values.
    """

    low: float
    high: float
    worst: float
    measure: Measure

    @property
    def floor(self) -> float:
        """The end where the bad values are."""
        return self.low if self.measure.rises else self.high

    def goodness(self, value: Any) -> Any:
        """0 at the floor or beyond it, 1 at the best value."""
        part = (np.asarray(value) - self.low) / ((self.high - self.low) or 1.0)
        return np.clip(part if self.measure.rises else 1 - part, 0, 1)


def draw_grids(comparison: Comparison, folder: Path) -> list[Picture]:
    """Draw the grids of learning rate and decay, and the paper's of the same study.

    Args:
        comparison: without such a grid there is no figure.
        folder: exists already.
    """
    measure = measure_of(comparison)
    grids = rate_decay_grids(comparison)
    maps = [_map(grid, measure) for grid in grids[:MOST_MAPS]]
    scale = _scale(maps, measure)
    if scale is None:
        return []
    left_out = f" {MOST_MAPS} of {len(grids)} grids are drawn." if len(grids) > MOST_MAPS else ""
    return [
        _heat_maps(
            folder, "grid_of_rates_and_decays", "Learning rate × decay", maps, scale, left_out
        ),
        _surfaces(folder, maps, scale, left_out),
        *_of_the_paper(comparison, folder),
    ]


def _of_the_paper(comparison: Comparison, folder: Path) -> list[Picture]:
    names = {str(run.configuration.get("name")) for run in comparison.runs}
    published = next(
        (GRIDS[study] for study in GRIDS if any(name.startswith(study) for name in names)), None
    )
    if published is None:
        return []
    maps = [
        Map(
            title=optimizer,
            rates=[short_value(rate) for rate in published.rates],
            decays=[short_value(decay) for decay in published.decays],
            values=np.array(cells),
            lost=np.zeros((len(published.decays), len(published.rates))),
        )
        for optimizer, cells in published.cells.items()
    ]
    measure = Measure(key="", name="top-1, %", factor=1.0, digits=2, rises=True)
    scale = _scale(maps, measure)
    assert scale is not None
    words = f" {published.setting} {published.source}"
    return [_heat_maps(folder, "grid_in_the_paper", "The grid in the paper", maps, scale, words)]


def _map(grid: Grid, measure: Measure) -> Map:
    rates, decays = grid.rates, grid.decays
    values = np.full((len(decays), len(rates)), np.nan)
    lost = np.zeros(values.shape)
    for (rate, decay, _), arm in grid.cells.items():
        place = decays.index(decay), rates.index(rate)
        value, _ = measure.of(arm)
        values[place] = np.nan if value is None else value
        lost[place] = len(arm.with_status("diverged"))
        assert not is_lost(arm) or value is None
    return Map(
        title=grid.label,
        rates=[short_value(rate) for rate in rates],
        decays=[short_value(decay) for decay in decays],
        values=values,
        lost=lost,
    )


def _scale(maps: Sequence[Map], measure: Measure) -> Scale | None:
    known = [float(v) for one in maps for v in one.values.ravel() if np.isfinite(v)]
    if not known:
        return None
    low, high = min(known), max(known)
    if measure.rises:
        end = -loss_limit([-value for value in known])
        return Scale(low=end, high=high, worst=low, measure=measure)
    return Scale(low=low, high=loss_limit(known), worst=high, measure=measure)


def _colors() -> Any:
    from matplotlib import colormaps

    return colormaps["viridis"].resampled(SHADES)


def _heat_maps(
    folder: Path, name: str, title: str, maps: Sequence[Map], scale: Scale, words: str
) -> Picture:
    heights = [len(one.decays) for one in maps]

    def draw(figure: Any) -> None:
        all_axes = figure.subplots(
            len(maps), 1, squeeze=False, gridspec_kw={"height_ratios": heights}
        ).ravel()
        for axes, one in zip(all_axes, maps, strict=True):
            _draw_map(axes, one, scale)
        all_axes[-1].set_xlabel("learning rate")
        _color_bar(figure, list(all_axes), scale)

    text = f"{scale.measure.name.capitalize()} in each cell, mean over the finished seeds."
    if name == "grid_in_the_paper":
        text = "Top-1 in each cell, in %."
    text += " One scale of colors for all optimizers, bright is good; framed: the best cell."
    if any(one.lost.any() for one in maps):
        text += " A cross: all seeds diverged; a small one: some did, the value is of the others."
    if any((np.isnan(one.values) & (one.lost == 0)).any() for one in maps):
        text += " Grey: not there yet."
    return save(
        draw,
        folder,
        name,
        height=1.25 + sum(0.62 + 0.31 * rows for rows in heights),
        section="grid",
        title=title,
        caption=f"{text}{_cut(scale)}{words}",
        alt=f"{scale.measure.name.capitalize()} over learning rate and decay. Best: "
        + "; ".join(_best_in_words(one, scale.measure) for one in maps)
        + ".",
    )


def _draw_map(axes: Any, one: Map, scale: Scale) -> None:
    rows, columns = one.values.shape
    shades = np.ma.masked_invalid(scale.goodness(one.values))
    axes.set_facecolor(MISSING)
    # Cells as vectors: a picture inside an SVG would be smeared where it is enlarged.
    axes.pcolormesh(shades, cmap=_colors(), vmin=0, vmax=1, edgecolors="white", linewidth=1.5)
    best = _best_place(one, scale.measure)
    longest = max(len(_text(value, scale)) for value in one.values.ravel())
    size = min(9.5, 4.3 * 72 / columns / longest / 0.68)
    for (row, column), value in np.ndenumerate(one.values):
        middle = column + 0.5, row + 0.5
        lost = one.lost[row, column]
        if np.isfinite(value):
            color = "white" if scale.goodness(value) < 0.6 else INK
            weight = "bold" if (row, column) == best else "normal"
            axes.text(
                *middle, _text(value, scale), ha="center", va="center", color=color, fontsize=size,
                fontweight=weight,
            )  # fmt: skip
            if lost:
                axes.plot(column + 0.9, row + 0.78, color=color, **{**CROSS, "markersize": 4})
        elif lost:
            axes.plot(*middle, color=QUIET, **CROSS)
    if best is not None:
        corner = (best[1], best[0])
        from matplotlib.patches import Rectangle

        frame = Rectangle(corner, 1, 1, fill=False, edgecolor=INK, linewidth=2, zorder=4)
        # The half of it that lies outside of the axes is to be seen, too.
        axes.add_patch(frame)
        frame.set_clip_on(False)
    axes.set_xticks(np.arange(columns) + 0.5, one.rates, fontsize=min(9.5, 60 / columns))
    axes.set_yticks(np.arange(rows) + 0.5, one.decays, fontsize=9.5)
    axes.set_ylabel("decay")
    axes.set_title(shown(one.title, 44))
    axes.grid(visible=False)
    axes.tick_params(length=0)
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)


def _text(value: float, scale: Scale) -> str:
    if not np.isfinite(value):
        return ""
    # Beyond the scale decimals say nothing.
    text = fixed(float(value), scale.measure.digits)
    return text if len(text) <= 6 else f"{value:.2g}"


def _best_place(one: Map, measure: Measure) -> tuple[int, int] | None:
    if not np.isfinite(one.values).any():
        return None
    index = np.nanargmax(one.values) if measure.rises else np.nanargmin(one.values)
    row, column = np.unravel_index(index, one.values.shape)
    return int(row), int(column)


def _best_in_words(one: Map, measure: Measure) -> str:
    place = _best_place(one, measure)
    if place is None:
        return f"{one.title} none"
    value = fixed(float(one.values[place]), measure.digits + 1)
    return f"{one.title} {value} at {one.rates[place[1]]} and {one.decays[place[0]]}"


def _cut(scale: Scale) -> str:
    if scale.worst == scale.floor:
        return ""
    return f" The colors end at {fixed(scale.floor, scale.measure.digits)}: worse is as dark."


def _color_bar(figure: Any, axes: list[Any], scale: Scale, **options: Any) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    colors = _colors() if scale.measure.rises else _colors().reversed()
    norm = Normalize(scale.low, scale.high if scale.high > scale.low else scale.low + 1)
    bar = figure.colorbar(
        ScalarMappable(norm, colors), ax=axes, orientation="horizontal", aspect=40, **options
    )
    bar.set_label(scale.measure.name, fontsize=9.5)
    bar.ax.tick_params(labelsize=9)
    bar.outline.set_visible(False)


def _surfaces(folder: Path, maps: Sequence[Map], scale: Scale, words: str) -> Picture:
    columns = min(SURFACES_A_ROW, len(maps))
    rows = -(-len(maps) // columns)

    def draw(figure: Any) -> None:
        drawn = []
        for index, one in enumerate(maps):
            axes = figure.add_subplot(rows, columns, index + 1, projection="3d")
            _draw_surface(axes, one, scale)
            drawn.append(axes)
        _color_bar(figure, drawn, scale, shrink=0.5, pad=0.06)

    return save(
        draw,
        folder,
        "surfaces_of_rates_and_decays",
        height=0.9 + 3.5 * rows,
        wide=columns > 1,
        section="grid",
        title="Learning rate × decay as surfaces",
        caption="The same values as heights, cells set apart evenly; dots are cells, what lies "
        "between them is drawn straight. A cross at the worst height: all seeds diverged."
        f"{_cut(scale)}{words}",
        alt=f"Surfaces of {scale.measure.name} over learning rate and decay, a panel each for "
        + ", ".join(one.title for one in maps)
        + ". The heat maps have the numbers.",
    )


def _draw_surface(axes: Any, one: Map, scale: Scale) -> None:
    rows, columns = one.values.shape
    # An accuracy has its limits; a loss is cut off where its colors end.
    ends = (scale.worst, scale.high) if scale.measure.rises else (scale.low, scale.high)
    cut = np.clip(one.values, *ends)
    # What diverged stands at the worst height, so that there is a cliff and no hole.
    heights = np.where(np.isnan(cut) & (one.lost > 0), ends[not scale.measure.rises], cut)
    x, y = np.meshgrid(np.arange(columns), np.arange(rows))
    fine_x, fine_y, fine = _between(heights)
    middles = (fine[1:, 1:] + fine[:-1, 1:] + fine[1:, :-1] + fine[:-1, :-1]) / 4
    axes.plot_surface(
        fine_x, fine_y, fine, facecolors=_colors()(scale.goodness(np.nan_to_num(middles))),
        rstride=1, cstride=1, linewidth=0, antialiased=False, shade=False,
    )  # fmt: skip
    there = np.isfinite(cut)
    axes.plot(x[there], y[there], cut[there], linestyle="none", marker="o", ms=3, color=INK)
    gone = ~there & (one.lost > 0)
    axes.plot(x[gone], y[gone], heights[gone], color=QUIET, **{**CROSS, "markersize": 6})
    axes.set_xticks(range(columns), one.rates, fontsize=7.5, rotation=20)
    axes.set_yticks(range(rows), one.decays, fontsize=7.5)
    axes.tick_params(axis="z", labelsize=7.5, pad=1)
    axes.locator_params(axis="z", nbins=6)
    axes.set_zlim(ends[0], ends[1] if ends[1] > ends[0] else ends[0] + 1)
    axes.set_xlabel("learning rate", fontsize=8.5, labelpad=8)
    axes.set_ylabel("decay", fontsize=8.5, labelpad=6)
    axes.text2D(0.04, 0.93, shown(one.title, 30), transform=axes.transAxes, fontweight="bold")
    axes.view_init(elev=28, azim=-58)


def _between(heights: np.ndarray, parts: int = 6) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Divide each square between four cells into small ones, straight in both directions."""
    fine = heights
    for axis in (0, 1):
        places = np.linspace(0, fine.shape[axis] - 1, (fine.shape[axis] - 1) * parts + 1)
        before = np.minimum(places.astype(int), fine.shape[axis] - 2)
        share = (places - before).reshape(-1, 1) if axis == 0 else places - before
        fine = fine.take(before, axis) * (1 - share) + fine.take(before + 1, axis) * share
    rows, columns = heights.shape
    x, y = np.linspace(0, columns - 1, fine.shape[1]), np.linspace(0, rows - 1, fine.shape[0])
    return (*np.meshgrid(x, y), fine)
