"""The figure of paired differences: a point a seed, the mean and its interval an arm."""

from pathlib import Path
from typing import Any

from nomadam.reports.arms import Comparison
from nomadam.reports.drawing import INK, QUIET, Picture, folded, looks, save
from nomadam.reports.paired import (
    BAR_PERCENT,
    PairedDifference,
    paired_differences,
    paired_explanation,
)
from nomadam.reports.tables import fixed


def draw_paired(comparison: Comparison, folder: Path) -> Picture | None:
    """Draw the paired differences in per cent of the reference's loss; None where there are none.

    Args:
        comparison: the arms.
        folder: exists already.
    """
    pairs = [each for each in paired_differences(comparison) if each.percent(0.0) is not None]
    if not pairs:
        return None
    look = looks(comparison)

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        axes.axvspan(-BAR_PERCENT, BAR_PERCENT, color="#eef2f5", zorder=0, linewidth=0)
        axes.axvline(0, color=QUIET, linewidth=1)
        for place, pair in enumerate(pairs):
            _draw_pair(axes, place, pair, look[pair.label].color)
        axes.set_yticks(range(len(pairs)), [folded(pair.label, 26) for pair in pairs])
        axes.set_ylim(len(pairs) - 0.5, -0.5)
        axes.margins(x=0.06)
        axes.set_xlabel("difference of the final validation loss, %")
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0, labelcolor=INK)

    described = "; ".join(f"{pair.label} {_in_words(pair)}" for pair in pairs)
    return save(
        draw,
        folder,
        "paired_differences",
        height=0.9 + (0.72 if len(pairs) <= 8 else 0.5) * len(pairs),
        section="paired",
        title="Paired differences",
        caption="Small dots: one seed each. Large dots and lines: their mean and its 95 % "
        f"interval. Grey: ±{BAR_PERCENT:g} %. {paired_explanation(comparison).split(': ')[0]}.",
        alt=f"Difference of the final validation loss, per cent: {described}.",
    )


def _draw_pair(axes: Any, place: int, pair: PairedDifference, color: str) -> None:
    values = [pair.percent(value) for value in pair.differences.values()]
    axes.plot(
        values,
        [place + 0.2] * len(values),
        linestyle="none",
        marker="o",
        markersize=4,
        color=color,
        alpha=0.45,
    )
    if pair.interval is not None:
        axes.plot([pair.percent(end) for end in pair.interval], [place] * 2, color=color)
    axes.plot(pair.percent(pair.mean or 0.0), place, marker="o", markersize=7, color=color)


def _in_words(pair: PairedDifference) -> str:
    mean = fixed(pair.percent(pair.mean or 0.0), 2, signed=True)
    if pair.interval is None:
        return f"{mean} from one seed"
    low, high = (fixed(pair.percent(end), 2, signed=True) for end in pair.interval)
    return f"{mean} ({low} to {high})"
