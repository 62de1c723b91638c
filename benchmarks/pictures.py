"""The pictures of docs/speed.md, from the results."""

import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sections import DEVICES, LABELS, Results

from nomadam.reports.drawing import (
    COLORS,
    INK,
    LINES,
    MARKERS,
    QUIET,
    legend_above,
    legend_height,
    plain_ticks,
    save,
    short_count,
)

OURS, TORCHS, OTHERS = COLORS[0], COLORS[1], "#8c959f"


def draw_all(results: Results, folder: Path) -> list[Path]:
    """Draws what there are results for, a PNG each.

    Args:
        results: newest of each kind and device.
        folder: exists already.
    """
    drawn = []
    for device in DEVICES:
        if ("step_time", device) in results:
            shapes = results["step_time", device]["shapes"]
            model = "gpt2_small" if shapes.get("gpt2_small", {}).get("rows") else next(iter(shapes))
            drawn.append(_ratios(shapes[model], model, folder, f"speed_ratios_{device}"))
        if ("scaling", device) in results:
            studies = results["scaling", device]["studies"]
            for study, across, label in (
                ("parameters", "num_params", "parameters, in 100 tensors"),
                ("tensors", "num_tensors", "tensors, 10 M parameters together"),
            ):
                rows, name = studies[study]["rows"], f"speed_{study}_{device}"
                if rows:
                    drawn.append(_growth(rows, across, label, folder, name))
    return drawn


def _saved(draw: Callable[[Any], None], folder: Path, name: str, height: float) -> Path:
    with tempfile.TemporaryDirectory() as place:
        words = dict.fromkeys(("section", "title", "caption", "alt"), "")
        picture = save(draw, Path(place), name, height=height, **words)
        shutil.copy(picture.png, folder / picture.png.name)
    return folder / f"{name}.png"


def _count(value: float) -> str:
    return short_count(value, value).replace("M", " M").replace("G", " B")


def _color(label: str) -> str:
    if label.startswith("SGDSaI,"):
        return OURS
    return TORCHS if label.startswith("torch ") else OTHERS


def _ratios(found: Mapping[str, Any], model: str, folder: Path, name: str) -> Path:
    rows = [row for row in found["rows"].values() if row["ratio"]]
    rows.sort(key=lambda row: row["ratio"]["median"])

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        most = max(row["ratio"]["q3"] for row in rows)
        low = min(0.5, min(row["ratio"]["q1"] for row in rows) / 1.3)
        for place, row in enumerate(rows):
            ratio = row["ratio"]
            width = ratio["median"] - low
            axes.barh(place, width, left=low, color=_color(row["label"]), height=0.42)
            axes.plot([ratio["q1"], ratio["q3"]], [place, place], color=INK, linewidth=1.4)
            # Above its bar: no bar is too short or too long for its words.
            words = f"{row['label']}: {ratio['median']:.2f}, {row['step_ms']['median']:.0f} ms"
            axes.text(low * 1.01, place - 0.27, words, va="bottom", fontsize=8.5, color=INK)
        axes.set_xscale("log")
        axes.set_xlim(low, most * 1.2)
        axes.axvline(1.0, color=QUIET, linewidth=0.8, zorder=0)
        axes.set_yticks([])
        axes.set_ylim(len(rows) - 0.6, -0.9)
        axes.set_xlabel(f"step / torch SGD fused, {LABELS[model]}")
        axes.grid(axis="y", visible=False)
        plain_ticks(axes.xaxis)

    return _saved(draw, folder, name, 0.7 + 0.4 * len(rows))


def _growth(
    rows: Sequence[Mapping[str, Any]], across: str, label: str, folder: Path, name: str
) -> Path:
    labels = {row["name"]: row["label"] for row in rows}

    def draw(figure: Any) -> None:
        from matplotlib.ticker import FuncFormatter, LogLocator

        axes = figure.subplots()
        for index, each in enumerate(labels):
            own = sorted((row[across], row["step_ms"]) for row in rows if row["name"] == each)
            places = [place for place, _ in own]
            axes.plot(
                places,
                [ms["median"] for _, ms in own],
                color=COLORS[index % len(COLORS)],
                linestyle=LINES[index % len(LINES)],
                marker=MARKERS[index % len(MARKERS)],
                label=labels[each],
            )
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel(label)
        axes.set_ylabel("step, ms")
        axes.set_xlim(
            min(row[across] for row in rows) / 1.3, max(row[across] for row in rows) * 1.4
        )
        axes.xaxis.set_major_locator(LogLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _count(value)))
        plain_ticks(axes.yaxis)
        legend_above(figure, *axes.get_legend_handles_labels())

    return _saved(draw, folder, name, 3.4 + legend_height(list(labels.values())))
