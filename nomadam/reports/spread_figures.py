"""Histograms of a grid: how far the final accuracy, or loss, spreads over all of its cells."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nomadam.reports.arms import Comparison
from nomadam.reports.drawing import COLORS, INK, Picture, save, shown
from nomadam.reports.grids import Grid, Measure, is_lost, measure_of, spread_grids
from nomadam.reports.sensitivity_figures import loss_limit
from nomadam.reports.tables import mean_and_sd, with_sd

MOST_ROWS, MOST_COLUMNS, NUM_BINS = 9, 4, 12


def draw_spreads(comparison: Comparison, folder: Path) -> list[Picture]:
    """Draw a histogram for each optimizer, and for each family of models where these differ.

    Args:
        comparison: without a grid there is no figure.
        folder: exists already.
    """
    grids, measure = spread_grids(comparison)[:MOST_ROWS], measure_of(comparison)
    families = list(dict.fromkeys(family for grid in grids for family in grid.families))
    values = [value for grid in grids for value in _values(grid, None, measure)]
    if not values:
        return []
    drawn = [_histograms(folder, "spread_over_the_grid", grids, [None], values, measure)]
    if len(families) > 1:
        shown_families = families[:MOST_COLUMNS]
        name = "spread_by_family"
        drawn.append(_histograms(folder, name, grids, shown_families, values, measure))
    return drawn


def _values(grid: Grid, family: str | None, measure: Measure) -> list[float]:
    arms = list(grid.cells.values()) if family is None else grid.of_family(family)
    return [value for arm in arms if (value := measure.of(arm)[0]) is not None]


def _histograms(
    folder: Path,
    name: str,
    grids: Sequence[Grid],
    families: Sequence[str | None],
    values: Sequence[float],
    measure: Measure,
) -> Picture:
    top = max(values) if measure.rises else loss_limit(values)
    edges = np.linspace(min(values), top if top > min(values) else min(values) + 1, NUM_BINS + 1)

    def draw(figure: Any) -> None:
        all_axes = figure.subplots(
            len(grids), len(families), squeeze=False, sharex=True, sharey=True
        )
        for index, grid in enumerate(grids):
            for axes, family in zip(all_axes[index], families, strict=True):
                _draw_one(axes, grid, family, measure, edges, index)
            if families != [None]:
                all_axes[index, 0].set_ylabel(shown(grid.label, 16), fontsize=8.5)
        for axes in all_axes[-1]:
            axes.tick_params(axis="x", labelbottom=True)
        figure.supxlabel(measure.name, fontsize=10)
        figure.supylabel("cells", fontsize=10)

    words = [
        f"{' '.join(filter(None, (grid.label, family)))} {_in_words(grid, family, measure)}"
        for grid in grids
        for family in families
    ]
    by_family = ", and a column a family of models" if families != [None] else ""
    cut = "" if top >= max(values) else " The last bar holds what is above the axis, too."
    return save(
        draw,
        folder,
        name,
        height=0.6 + 1.25 * len(grids),
        section="grid",
        title="Spread over the grid" + (" by family" if by_family else ""),
        caption=f"Histograms of the {measure.name.partition(',')[0]} over all cells of a grid, a "
        f"row an optimizer{by_family}; a cell counts once, as the mean over its finished seeds. "
        "Line: the mean over the cells, with ± one standard deviation above. Cells of which "
        f"every seed diverged are in no bar.{cut}",
        alt=f"Histograms of {measure.name}. Mean over the cells: {'; '.join(words)}.",
    )


def _draw_one(
    axes: Any, grid: Grid, family: str | None, measure: Measure, edges: np.ndarray, index: int
) -> None:
    values = _values(grid, family, measure)
    inside = np.clip(values, edges[0], edges[-1]) if values else []
    color = COLORS[index % len(COLORS)]
    axes.hist(inside, bins=edges, color=color, alpha=0.85, edgecolor="white", linewidth=0.8)
    if values:
        mean = float(np.clip(np.mean(values), edges[0], edges[-1]))
        axes.axvline(mean, color=INK, linewidth=1.4)
    # A line for what diverged: a column a family is narrow.
    words = _in_words(grid, family, measure).replace(" cells, ", " cells,\n")
    title = f"{shown(family or grid.label, 34)}\n{words}"
    axes.set_title(title, fontsize=8.5, fontweight="normal")
    axes.grid(axis="x", visible=False)
    axes.tick_params(labelsize=8.5)
    from matplotlib.ticker import MaxNLocator

    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))


def _in_words(grid: Grid, family: str | None, measure: Measure) -> str:
    arms = list(grid.cells.values()) if family is None else grid.of_family(family)
    values, lost = _values(grid, family, measure), sum(map(is_lost, arms))
    text = f"{with_sd(*mean_and_sd(values), digits=measure.digits)}, {len(values)} cells"
    return f"{text}, {lost} diverged: not counted" if lost else text
