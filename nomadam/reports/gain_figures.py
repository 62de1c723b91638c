"""Figures of the measured gains by block, with sqrt(numel) beside them."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nomadam.reports.arms import Arm, Comparison
from nomadam.reports.drawing import (
    COLORS,
    MARKERS,
    Picture,
    legend_above,
    legend_height,
    looks,
    plain_ticks,
    save,
    shown,
)

MOST_ROWS = 60
MOST_ARMS = 3
# A row of the picture: its name and the blocks in it, from the first of the model to the last.
Row = tuple[str, list[str]]


@dataclass(frozen=True, kw_only=True)
class Series:
    """The gains of one arm: block name -> the gain of each seed."""

    label: str
    color: str
    marker: str
    gains: dict[str, list[float]]


def draw_gains(comparison: Comparison, folder: Path) -> list[Picture]:
    """Draw gain and gain / sqrt(numel), a row a block, layer by layer.

    With more than 60 blocks a row is a kind of tensor: its blocks share it, the first layer at
    its top and the last at its bottom. At most three arms are drawn, the best ones; of arms with
    the same gains (a grid of learning rates) one stands for all.

    Args:
        comparison: its runs may be without gains: then there is no figure.
        folder: exists already.
    """
    measured = [arm for arm in comparison.arms if _sizes(arm)]
    if not measured:
        return []
    arms = _distinct(measured)
    numel, series = _sizes(arms[0]), _series(comparison, arms[:MOST_ARMS])
    rows = rows_of_blocks(list(numel))
    grouped = len(rows) < len(numel)
    caption = f"{len(numel)} blocks layer by layer, a row " + (
        "a kind of tensor, its first layer on top." if grouped else "a block."
    )
    if any(len(gains) > 1 for one in series for gains in one.gains.values()):
        caption += " Dots: mean over the seeds; lines: their range."
    if len(arms) < len(measured):
        caption += " Arms with the same gains are drawn once, arms of another model left out."
    if len(arms) > MOST_ARMS:
        caption += f" The best {MOST_ARMS} of {len(arms)} arms."
    ratios = [
        gain / np.sqrt(numel[block])
        for one in series
        for block, gains in one.gains.items()
        for gain in gains
    ]
    near = sum(abs(ratio - 1) < 0.01 for ratio in ratios)
    found = f"{near} of {len(ratios)} gains lie within 1 % of sqrt(numel)."
    tallest = max(len(blocks) for _, blocks in rows)
    row_height = min(0.8, 0.26 + 0.016 * tallest) if grouped else 0.21

    labels = [*(one.label for one in series), "sqrt(numel)"]

    def draw_gain(figure: Any) -> None:
        axes = _draw(figure, series, rows, numel, {block: 1.0 for block in numel})
        plain_ticks(axes.xaxis)
        axes.set_xlabel("gain (a factor, no unit)")

    def draw_ratio(figure: Any) -> None:
        axes = _draw(figure, series, rows, numel, {b: np.sqrt(size) for b, size in numel.items()})
        _ratio_ticks(axes, ratios)
        axes.set_xlabel("gain / sqrt(numel)")

    return [
        save(
            draw,
            folder,
            name,
            height=0.85 + legend_height(labels) + row_height * len(rows),
            section="gains",
            title=title,
            caption=f"{caption} {found}",
            alt=f"{title}. {found}",
        )
        for draw, name, title in (
            (draw_gain, "gains_by_block", "Gain by block"),
            (draw_ratio, "gains_relative_to_sqrt_numel", "Gain / sqrt(numel) by block"),
        )
    ]


def _sizes(arm: Arm) -> dict[str, float]:
    sizes = {block: size for run in arm.runs for block, (_, size) in run.gains.items()}
    return {block: sizes[block] for block in layer_by_layer(list(sizes))}


def layer_by_layer(names: list[str]) -> list[str]:
    """Return the names with each layer's together, else in their order.

    An optimizer knows its blocks by group, with norms and biases after all matrices.

    Example:
        >>> layer_by_layer(["wte", "h.0.attn", "h.1.attn", "h.0.norm", "h.1.norm", "norm"])
        ['wte', 'h.0.attn', 'h.0.norm', 'h.1.attn', 'h.1.norm', 'norm']
    """
    layers: dict[str, list[str]] = {}
    for name in names:
        found = re.match(r"(?:.*?\.)?\d+(?=\.)", name)
        layers.setdefault(found[0] if found else name, []).append(name)
    return [name for layer in layers.values() for name in layer]


def _distinct(arms: list[Arm]) -> list[Arm]:
    """Best first, each set of gains once, all of the best one's model."""
    kept: dict[str, Arm] = {}
    for arm in sorted(arms, key=lambda a: (a.loss() is None, a.loss() or 0.0)):
        found = repr([(run.seed, list(run.gains.items())) for run in arm.runs])
        if not kept or _sizes(next(iter(kept.values()))) == _sizes(arm):
            kept.setdefault(found, arm)
    return list(kept.values())


def _series(comparison: Comparison, arms: list[Arm]) -> list[Series]:
    look = looks(comparison)
    # The arm's own colour, as in the other figures, unless two of these share it.
    own = len({look[arm.label].color for arm in arms}) == len(arms)
    return [
        Series(
            label=arm.label,
            color=look[arm.label].color if own else COLORS[index],
            marker=look[arm.label].marker if own else MARKERS[index],
            gains={
                block: [run.gains[block][0] for run in arm.runs if block in run.gains]
                for block in _sizes(arm)
            },
        )
        for index, arm in enumerate(arms)
    ]


def rows_of_blocks(names: list[str]) -> list[Row]:
    """Return the rows of the picture: a block each, or where that is too many, a kind each.

    Blocks are of one kind when their names differ in numbers only (`h.0.ln.weight`,
    `h.1.ln.weight`). Dotted beginnings that all names share are left out.

    Example:
        >>> rows_of_blocks(["gpt.h.0.w", "gpt.h.1.w"])
        [('0.w', ['gpt.h.0.w']), ('1.w', ['gpt.h.1.w'])]
    """
    short = dict(zip(names, without_shared_beginning(names), strict=True))
    if len(names) <= MOST_ROWS:
        return [(short[name], [name]) for name in names]
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(re.sub(r"(?<![^.])\d+(?![^.])", "*", short[name]), []).append(name)
    return list(kinds.items())


def without_shared_beginning(names: list[str]) -> list[str]:
    """Return dotted names without the parts that all of them begin with."""
    parts = [name.split(".") for name in names]
    shared = 0
    # The last part always stays: it says what the tensor is.
    while len({tuple(p[: shared + 1]) for p in parts}) == 1 and min(map(len, parts)) > shared + 1:
        shared += 1
    return [".".join(p[shared:]) for p in parts] if len(names) > 1 else names


def without_shared_ending(names: list[str]) -> list[str]:
    """Return dotted names without the parts that all of them end with, such as ``.weight``.

    What follows a space, such as a shape, stays.

    Example:
        >>> without_shared_ending(["q.lora_A.default.weight", "q.lora_B.default.weight 4x8"])
        ['q.lora_A', 'q.lora_B 4x8']
    """
    parted = [name.partition(" ") for name in names]
    backwards = [".".join(dotted.split(".")[::-1]) for dotted, _, _ in parted]
    kept = [name.split(".")[::-1] for name in without_shared_beginning(backwards)]
    return [f"{'.'.join(n)}{gap}{rest}" for n, (_, gap, rest) in zip(kept, parted, strict=True)]


def _positions(rows: list[Row]) -> dict[str, float]:
    places = {}
    for place, (_, blocks) in enumerate(rows):
        spread = 0.34 if len(blocks) > 1 else 0.0
        for block, offset in zip(blocks, np.linspace(-spread, spread, len(blocks)), strict=True):
            places[block] = place + float(offset)
    return places


def _draw(
    figure: Any,
    series: list[Series],
    rows: list[Row],
    numel: dict[str, float],
    scale: dict[str, float],
) -> Any:
    from matplotlib.lines import Line2D

    axes = figure.subplots()
    axes.set_xscale("log")
    grouped = len(rows) < len(numel)
    places = _positions(rows)
    expected = [np.sqrt(size) / scale[block] for block, size in numel.items()]
    heights = np.array([places[block] for block in numel])
    reach = np.where([len(blocks) > 1 for _, blocks in rows for _ in blocks], 0.06, 0.36)
    handles = []
    for index, one in enumerate(series):
        # Side by side, for the gains of two arms often lie on one another.
        dodge = (index - (len(series) - 1) / 2) * (0.05 if grouped else 0.24)
        size = 4.5 if grouped else 6.5 if len(series) == 1 else 5
        means = [np.mean(gains) / scale[block] for block, gains in one.gains.items()]
        lows = [min(gains) / scale[block] for block, gains in one.gains.items()]
        highs = [max(gains) / scale[block] for block, gains in one.gains.items()]
        y = np.array([places[block] for block in one.gains]) + dodge
        axes.hlines(y, lows, highs, color=one.color, linewidth=1.0, alpha=0.6)
        look: dict[str, Any] = {"color": one.color, "marker": one.marker, "linestyle": "none"}
        axes.plot(means, y, markersize=size, markeredgewidth=0, zorder=3, **look)
        handles.append(Line2D([], [], markersize=7, **look))
    axes.vlines(expected, heights - reach, heights + reach, color="black", linewidth=1.6, zorder=2)
    handles.append(
        Line2D([], [], linestyle="none", marker="|", markersize=11, color="black", mew=1.6)
    )
    axes.set_yticks(range(len(rows)), [shown(name, 30) for name, _ in rows], fontsize=9)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    for place in range(1, len(rows), 2):
        axes.axhspan(place - 0.5, place + 0.5, color="#f4f6f8", zorder=0)
    legend_above(figure, handles, [*(one.label for one in series), "sqrt(numel)"])
    return axes


def _ratio_ticks(axes: Any, ratios: list[float]) -> None:
    from matplotlib.ticker import FixedLocator, NullLocator

    low, high = min(0.95, *ratios), max(1.05, *ratios)
    margin = (high / low) ** 0.05
    axes.set_xlim(low / margin, high * margin)
    plain_ticks(axes.xaxis)
    if high < 8 * low:
        # Within a decade a logarithmic axis has too few ticks of its own; these begin at 1.
        step = next((s for s in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5) if 6 * s > high - low), 1.0)
        ticks = [round(1 + place * step, 2) for place in range(-8, 9)]
        axes.xaxis.set_major_locator(FixedLocator([tick for tick in ticks if tick > 0]))
        axes.xaxis.set_minor_locator(NullLocator())
