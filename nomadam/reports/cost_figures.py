"""Bars of what the arms cost: optimizer state, peak memory, optimizer step."""

from pathlib import Path
from typing import Any

from nomadam.reports.arms import Arm, Comparison
from nomadam.reports.drawing import (
    INK,
    QUIET,
    Picture,
    best_of_each,
    counting_ticks,
    folded,
    looks,
    paler,
    save,
)
from nomadam.reports.tables import MB, fixed, milliseconds, rows_of, size


def draw_costs(comparison: Comparison, folder: Path) -> list[Picture]:
    """Draw the bars that the runs have numbers for; at most one arm an optimizer if many.

    Args:
        comparison: the arms.
        folder: exists already.
    """
    arms = best_of_each(comparison)
    rows = {row["label"]: row for row in rows_of(comparison)}
    largest = max((rows[arm.label]["state_bytes"] or 0.0 for arm in arms), default=0.0)
    # One unit for all bars: of a small model the state is kilobytes.
    unit, scale = ("MB", MB) if largest >= 1e5 else ("kB", 1e3)

    def state(row: dict[str, Any]) -> tuple[float | None, str]:
        value = row["state_bytes"] and row["state_bytes"] / scale
        return value, f"{size(value)} {unit} · {fixed(row['state_bytes_per_param'], 2)} B/param"

    def memory(row: dict[str, Any]) -> tuple[float | None, str]:
        return row["peak_memory_mb"], f"{fixed(row['peak_memory_mb'], 0)} MB"

    def step(row: dict[str, Any]) -> tuple[float | None, str]:
        return row["optimizer_ms"], f"{milliseconds(row['optimizer_ms'])} ms"

    drawn = []
    for name, measure, title, label, caption in (
        (
            "optimizer_state",
            state,
            "Optimizer state",
            f"optimizer state, {unit}",
            "What the optimizer keeps between steps; 1 MB = 10⁶ bytes.",
        ),
        (
            "peak_memory",
            memory,
            "Peak memory",
            "peak memory, MB",
            "Of the device where there is one, else of the whole process; largest of the seeds. "
            "Pale and hatched: what was in use before training.",
        ),
        (
            "optimizer_step",
            step,
            "Optimizer step",
            "optimizer step, ms",
            "Median over the steps, then over the seeds.",
        ),
    ):
        bars = [(arm, *measure(rows[arm.label])) for arm in arms]
        known = [(arm, value, text) for arm, value, text in bars if value is not None]
        if len(arms) < len(comparison.arms):
            caption += " The best arm of each optimizer."
        if known:
            drawn.append(_bars(comparison, folder, name, known, title, label, caption))
    return drawn


def _bars(
    comparison: Comparison,
    folder: Path,
    name: str,
    bars: list[tuple[Arm, float, str]],
    title: str,
    label: str,
    caption: str,
) -> Picture:
    look, largest = looks(comparison), max(value for _, value, _ in bars)

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for place, (arm, value, text) in enumerate(bars):
            color = look[arm.label].color
            used = arm.values("baseline_memory_mb") if name == "peak_memory" else []
            before = min([*used, value]) if used else 0.0
            axes.barh(place, value - before, left=before, color=color, height=0.6)
            if before > 0:
                axes.barh(
                    place,
                    before,
                    color=paler(color),
                    edgecolor=color,
                    hatch="////",
                    height=0.6,
                    linewidth=0,
                )
            # Above its bar and not at its end: no bar is too short or too long for its number.
            axes.text(largest * 0.006, place - 0.33, text, va="bottom", fontsize=9.5, color=QUIET)
        axes.set_yticks(range(len(bars)), [folded(arm.label, 26) for arm, _, _ in bars])
        axes.set_ylim(len(bars) - 0.55, -0.8)
        axes.set_xlim(0, largest * 1.05 or 1.0)
        axes.set_xlabel(label)
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        counting_ticks(axes.xaxis)

    return save(
        draw,
        folder,
        name,
        height=0.95 + 0.62 * len(bars),
        section="cost",
        title=title,
        caption=caption,
        alt=f"{title}: " + "; ".join(f"{arm.label} {text}" for arm, _, text in bars) + ".",
    )
