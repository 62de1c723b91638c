"""Figures of gains that were measured again through a training: over the steps and over depth."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nomadam.reports.drawing import (
    COLORS,
    INK,
    LINES,
    Picture,
    legend_above,
    legend_height,
    plain_ticks,
    save,
    shown,
)
from nomadam.reports.gain_figures import without_shared_beginning, without_shared_ending
from nomadam.reports.reading import SMALLEST_GAIN, number
from nomadam.runs import RunFolder

FILE = "gains_over_training.json"
BATCHES = {
    "fixed_batch": "of a fixed batch",
    "training_batch": "of the step's own batch",
}
COLUMNS, MOST_PANELS, PANEL_HEIGHT = 3, 30, 1.25


@dataclass(frozen=True, kw_only=True)
class Block:
    """One block: where it is, how large, and its gains, NaN where it has none."""

    kind: str
    layer: int | None
    numel: float
    gains: np.ndarray


def draw_gain_curves(folder: Path, figures: Path, prefix: str = "") -> list[Picture]:
    """Draw the gains of a study over the steps, for both batches, and over depth.

    A panel is a kind of tensor and a line a layer; sqrt(numel) is drawn in. With more than 30 kinds
    those with the most elements are drawn.

    Args:
        folder: of the study; without ``gains_over_training.json`` there is no figure.
        figures: exists already.
        prefix: of the files' names.

    Raises:
        ValueError: the file is damaged.
    """
    held = RunFolder(folder).read_object(FILE)
    if held is None:
        return []
    try:
        steps = [int(step) for step in held["steps"]]
        read = {batch: _blocks(held, batch, len(steps)) for batch in BATCHES}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{folder / FILE} is damaged ({error!r}); run the study again") from error
    drawn = [
        _over_steps(figures, f"{prefix}gains_over_training_{batch}", words, steps, read[batch])
        for batch, words in BATCHES.items()
    ]
    depth = _over_depth(figures, f"{prefix}gains_over_depth", steps, read["fixed_batch"])
    return [picture for picture in (*drawn, depth) if picture is not None]


def _blocks(held: Mapping[str, Any], batch: str, num_steps: int) -> list[Block]:
    found = []
    for name, gains in held[batch].items():
        place = held["blocks"][name]
        values = [number(gain) for gain in gains]
        if len(values) != num_steps:
            raise ValueError(f"{len(values)} gains of {name} at {num_steps} steps")
        series = np.array([np.nan if v is None or v < SMALLEST_GAIN else v for v in values])
        numel = number(place["numel"])
        layer = place["layer"]
        if numel is None or numel < 1 or not (layer is None or isinstance(layer, int)):
            raise ValueError(f"{name} is no block")
        if np.isfinite(series).any():
            found.append(Block(kind=str(place["kind"]), layer=layer, numel=numel, gains=series))
    return found


def _panels(blocks: Sequence[Block]) -> dict[str, list[Block]]:
    """Kind to its blocks by layer, in the model's order, under short names."""
    kinds: dict[str, list[Block]] = {}
    for block in blocks:
        kinds.setdefault(block.kind, []).append(block)
    largest = sorted(kinds, key=lambda kind: -sum(block.numel for block in kinds[kind]))
    kept = [kind for kind in kinds if kind in largest[:MOST_PANELS]]
    # Of a layer's tensor what comes after the layer's number, where that is enough.
    short = without_shared_ending([kind.rpartition("*.")[2] for kind in kept])
    whole = without_shared_ending(without_shared_beginning(kept))
    return {
        one if short.count(one) == 1 else all_of_it: sorted(
            kinds[kind], key=lambda block: block.layer or 0
        )
        for one, all_of_it, kind in zip(short, whole, kept, strict=True)
    }


def _grid(figure: Any, panels: Mapping[str, list[Block]]) -> dict[str, Any]:
    """Axes by panel; those that are left over are taken away."""
    rows = -(-len(panels) // COLUMNS)
    axes = figure.subplots(rows, COLUMNS, squeeze=False, sharex=True).ravel()
    for unused in axes[len(panels) :]:
        # The last row has gaps: the axes above them bear the steps.
        unused.set_visible(False)
    for above in axes[max(0, len(panels) - COLUMNS) : len(panels)]:
        above.tick_params(labelbottom=True)
    for name, one in zip(panels, axes, strict=False):
        one.set_title(shown(name, 23), fontsize=7.5, fontweight="normal")
        one.tick_params(labelsize=7.5)
    return dict(zip(panels, axes, strict=False))


def _level(axes: Any, blocks: Sequence[Block], series: Sequence[np.ndarray]) -> None:
    """Draw sqrt(numel), and keep the axis wide enough for a constant to look like one."""
    roots = sorted({block.numel**0.5 for block in blocks})
    for root in roots:
        axes.axhline(root, color=INK, linewidth=1.0, linestyle=LINES[3], zorder=4)
    values = np.concatenate([*series, np.array(roots)])
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    middle = (low * high) ** 0.5
    axes.set_yscale("log")
    axes.set_ylim(min(low / 1.15, middle / 1.6), max(high * 1.15, middle * 1.6))
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    bottom, top = axes.get_ylim()
    narrow, wide = (1, 1.5, 2, 3, 4, 6, 8), (1, 3)
    steps = narrow if top < 8 * bottom else wide if top < 100 * bottom else (1,)
    decades = range(int(np.floor(np.log10(bottom))), int(np.ceil(np.log10(top))) + 1)
    ticks = [step * 10.0**decade for decade in decades for step in steps]
    axes.yaxis.set_major_locator(FixedLocator(ticks))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _over_steps(
    folder: Path, name: str, words: str, steps: list[int], blocks: list[Block]
) -> Picture | None:
    panels = _panels(blocks)
    if not panels:
        return None
    deepest = max((block.layer or 0 for block in blocks), default=0)
    layered = any(block.layer is not None for block in blocks)
    labels = ["first layer", "last layer"] if layered and deepest else ["gain"]
    labels += ["sqrt(numel)"]

    def draw(figure: Any) -> None:
        for panel, axes in _grid(figure, panels).items():
            for block in panels[panel]:
                color = _shade(block.layer, deepest)
                axes.plot(steps, block.gains, color=color, linewidth=1.2, marker=".", markersize=3)
            axes.set_xscale("log")
            _level(axes, panels[panel], [block.gains for block in panels[panel]])
            plain_ticks(axes.xaxis, widest=200)
            axes.tick_params(labelsize=7.5)
        _finish(figure, labels, deepest, "step", "gain (a factor, no unit)")

    drifts = [_largest_drift(block.gains) for block in blocks]
    steady = sum(drift < 0.01 for drift in drifts)
    found = f"{steady} of {len(blocks)} blocks stay within 1 % of their first gain."
    return save(
        draw,
        folder,
        name,
        height=PANEL_HEIGHT * -(-len(panels) // COLUMNS) + legend_height(labels) + 0.4,
        section="gains",
        title=f"Gain over training, {words}",
        caption=f"Measured again at {len(steps)} steps; a panel is a kind of tensor, a line a "
        f"block, dotted: sqrt(numel). {found}{_left_out(blocks, panels)}",
        alt=f"Gain of each block against the step, {words}. {found}",
    )


def _over_depth(folder: Path, name: str, steps: list[int], blocks: list[Block]) -> Picture | None:
    panels = {
        panel: own
        for panel, own in _panels([block for block in blocks if block.layer is not None]).items()
        if len(own) > 1
    }
    if not panels:
        return None
    moments = sorted({0, len(steps) // 2, len(steps) - 1})
    labels = [*(f"step {steps[moment]}" for moment in moments), "sqrt(numel)"]

    def draw(figure: Any) -> None:
        from matplotlib.lines import Line2D
        from matplotlib.ticker import MaxNLocator

        for panel, axes in _grid(figure, panels).items():
            own = panels[panel]
            layers = [block.layer for block in own]
            series = [np.array([block.gains[moment] for block in own]) for moment in moments]
            for index, gains in enumerate(series):
                axes.plot(layers, gains, color=COLORS[index], linewidth=1.2, marker=".")
            _level(axes, own, series)
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        handles = [Line2D([], [], color=COLORS[i], marker=".") for i in range(len(moments))]
        handles.append(Line2D([], [], color=INK, linestyle=LINES[3], linewidth=1.0))
        legend_above(figure, handles, labels)
        figure.supxlabel("layer", fontsize=9)
        figure.supylabel("gain (a factor, no unit)", fontsize=9)

    return save(
        draw,
        folder,
        name,
        height=PANEL_HEIGHT * -(-len(panels) // COLUMNS) + legend_height(labels) + 0.4,
        section="gains",
        title="Gain over depth, of a fixed batch",
        caption="A panel is a kind of tensor that several layers have; dotted: sqrt(numel).",
        alt="Gain against the layer for each kind of tensor, at the first, a middle and the last "
        "step.",
    )


def _largest_drift(gains: np.ndarray) -> float:
    known = gains[np.isfinite(gains)]
    return float(np.max(np.abs(known / known[0] - 1)))


def _left_out(blocks: Sequence[Block], panels: Mapping[str, Any]) -> str:
    kinds = len({block.kind for block in blocks})
    return f" {len(panels)} of {kinds} kinds are drawn, the largest." if kinds > len(panels) else ""


def _shade(layer: int | None, deepest: int) -> str:
    """From blue for the first layer to red for the last; what is in no layer is blue."""
    part = 0.0 if layer is None or deepest == 0 else layer / deepest
    ends = [[int(color[i : i + 2], 16) for i in (1, 3, 5)] for color in COLORS[:2]]
    mixed = (round(a + (b - a) * part) for a, b in zip(*ends, strict=True))
    return "#" + "".join(f"{channel:02x}" for channel in mixed)


def _finish(figure: Any, labels: Sequence[str], deepest: int, x: str, y: str) -> None:
    from matplotlib.lines import Line2D

    colors = [_shade(0, 1), _shade(1, 1)][: len(labels) - 1]
    handles = [Line2D([], [], color=color, marker=".") for color in colors]
    handles.append(Line2D([], [], color=INK, linestyle=LINES[3], linewidth=1.0))
    legend_above(figure, handles, list(labels))
    figure.supxlabel(x, fontsize=9)
    figure.supylabel(y, fontsize=9)
