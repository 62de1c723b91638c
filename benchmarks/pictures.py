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


def _color(label: str) -> str:
    if label.startswith("SGDSaI,"):
        return OURS
    return TORCHS if label.startswith("torch ") else OTHERS


def _ratios(found: Mapping[str, Any], model: str, folder: Path, name: str) -> Path:
    rows = sorted(found["rows"].values(), key=lambda row: row["ratio"]["median"])

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        most = max(row["ratio"]["median"] for row in rows)
        least = min(row["ratio"]["median"] for row in rows)
        low = min(0.3, least / 1.5)
        for place, row in enumerate(rows):
            ratio = row["ratio"]
            axes.barh(
                place, ratio["median"] - low, left=low, color=_color(row["label"]), height=0.7
            )
            axes.plot([ratio["q1"], ratio["q3"]], [place, place], color=INK, linewidth=1.2)
            end = max(ratio["median"], ratio["q3"]) * 1.06
            text = f"{ratio['median']:.2f} · {row['step_ms']['median']:.0f} ms"
            axes.text(end, place, text, va="center", fontsize=8.5, color=QUIET)
        axes.set_xscale("log")
        axes.set_xlim(low, most * 6)
        axes.axvline(1.0, color=INK, linewidth=0.8)
        axes.set_yticks(range(len(rows)), [row["label"] for row in rows], fontsize=8.5)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_xlabel(f"step / torch SGD fused, {LABELS[model]}")
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        plain_ticks(axes.xaxis)

    return _saved(draw, folder, name, 1.0 + 0.27 * len(rows))


def _growth(
    rows: Sequence[Mapping[str, Any]], across: str, label: str, folder: Path, name: str
) -> Path:
    labels = {row["name"]: row["label"] for row in rows}

    def draw(figure: Any) -> None:
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
        plain_ticks(axes.xaxis)
        plain_ticks(axes.yaxis)
        legend_above(figure, *axes.get_legend_handles_labels())

    return _saved(draw, folder, name, 3.4 + legend_height(list(labels.values())))
