"""The figures of a report, one function for all; the learning curves among them."""

from pathlib import Path
from typing import Any

import numpy as np

from nomadam.reports.arms import Arm, Comparison
from nomadam.reports.cost_figures import draw_costs
from nomadam.reports.curves import AXES, Curve, curves, smoothing_window
from nomadam.reports.drawing import (
    CROSS,
    QUIET,
    Look,
    Picture,
    best_of_each,
    counting_ticks,
    legend_above,
    legend_height,
    looks,
    named_arms,
    save,
)
from nomadam.reports.gain_figures import draw_gains
from nomadam.reports.grid_figures import draw_grids
from nomadam.reports.paired_figures import draw_paired
from nomadam.reports.samples import show_samples
from nomadam.reports.sensitivity_figures import draw_sensitivity
from nomadam.reports.spread_figures import draw_spreads
from nomadam.reports.tables import fixed

# With more faint lines than these only the best arm of each optimizer is drawn.
MOST_FAINT = 20
AXIS_LABELS = {"step": "step", "tokens": "training {}s", "seconds": "training time, s"}
AXIS_TITLES = {"step": "steps", "tokens": "{}s", "seconds": "seconds"}
PANELS = (
    ("validation_loss", "Validation loss", "{}"),
    ("train_loss", "Training loss", "{}"),
    ("validation_accuracy", "Validation accuracy", "part right, top-1"),
)


def draw_all(comparison: Comparison, folder: Path) -> list[Picture]:
    """Draw every figure that the runs have numbers for.

    Args:
        comparison: the arms.
        folder: is made where it is missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pictures = [
        draw_paired(comparison, folder),
        *(draw_learning_curves(comparison, folder, axis) for axis in AXES),
        draw_sensitivity(comparison, folder),
        *draw_grids(comparison, folder),
        *draw_spreads(comparison, folder),
        *show_samples(comparison, folder),
        *draw_costs(comparison, folder),
        *draw_gains(comparison, folder),
    ]
    return [picture for picture in pictures if picture is not None]


def _lines(comparison: Comparison, key: str, axis: str) -> list[tuple[Arm, list[Any]]]:
    # Faint arms first, so that those with a name in the legend lie on top.
    order = looks(comparison)
    drawn = best_of_each(comparison) if _is_crowded(order) else comparison.arms
    arms = sorted(drawn, key=lambda arm: not order[arm.label].faint)
    found = []
    for arm in arms:
        drawable = [c for c in curves(arm, key) if np.isfinite(c.x[axis]).any()]
        if drawable:
            found.append((arm, drawable))
    return found


def _is_crowded(look: dict[str, Look]) -> bool:
    return sum(one.faint for one in look.values()) > MOST_FAINT


def _top(lines: list[tuple[Arm, list[Any]]], look: dict[str, Look]) -> float | None:
    """Return where the loss axis ends: no line that went far above its start presses the others."""
    named = [c for arm, found in lines for c in found if not look[arm.label].faint]
    healthy = [_band(c)[1].max() for c in named if not c.diverged]
    starts = [_band(c)[1][0] for c in named]
    return min(max(healthy or starts), 1.25 * max(starts)) if starts else None


def _band(curve: Curve) -> tuple[np.ndarray, np.ndarray]:
    spread = 0.0 if curve.sd is None else curve.sd
    return curve.mean - spread, curve.mean + spread


def _lowest(curve: Curve, look: Look) -> float:
    return float((curve.mean if look.faint else _band(curve)[0]).min())


def _limit_loss(axes: Any, lines: list[tuple[Arm, list[Any]]], look: dict[str, Look]) -> None:
    tops = _top(lines, look)
    floor = min((_lowest(c, look[arm.label]) for arm, found in lines for c in found), default=0.0)
    if tops is not None and tops > floor:
        margin = 0.05 * (tops - floor)
        axes.set_ylim(floor - margin, tops + margin)


def _draw_lines(axes: Any, lines: list[tuple[Arm, list[Any]]], axis: str, look: dict[str, Look]):
    for arm, found in lines:
        style = look[arm.label]
        width, alpha = (1.0, 0.35) if style.faint else (1.9, 1.0)
        for curve in found:
            x = curve.x[axis]
            thin = curve.diverged and len(arm.runs) > 1
            axes.plot(
                x,
                curve.mean,
                color=style.color,
                linestyle=style.line,
                alpha=alpha,
                linewidth=1.0 if thin else width,
            )
            if curve.sd is not None and not style.faint:
                axes.fill_between(x, *_band(curve), alpha=0.18, color=style.color, linewidth=0)
            if not style.faint and len(x) <= 60:
                axes.plot(
                    x,
                    curve.mean,
                    linestyle="none",
                    marker=style.marker,
                    markersize=4,
                    color=style.color,
                )
            if curve.end is not None:
                low, high = axes.get_ylim()
                # A line that has left the axes is marked just below their top.
                height = min(curve.mean[-1], high - 0.05 * (high - low))
                axes.plot(curve.end[axis], height, color=style.color, zorder=5, **CROSS)


def draw_learning_curves(comparison: Comparison, folder: Path, axis: str) -> Picture | None:
    """Draw validation and training loss, and accuracy where there is one; None without any.

    Args:
        comparison: the arms.
        folder: exists already.
        axis: what they are drawn against, `"step"`, `"tokens"` or `"seconds"`.
    """
    look = looks(comparison)
    panels = [(*panel, lines) for panel in PANELS if (lines := _lines(comparison, panel[0], axis))]
    if not panels:
        return None
    present = {arm.label for *_, lines in panels for arm, _ in lines}
    named = [arm for arm in named_arms(comparison) if arm.label in present]
    diverged = any(c.diverged for *_, lines in panels for _, found in lines for c in found)
    against = AXIS_TITLES[axis].format(comparison.unit)
    labels = [*(arm.label for arm in named), *(["diverged"] if diverged else [])]

    def draw(figure: Any) -> None:
        from matplotlib.lines import Line2D

        all_axes = np.atleast_1d(figure.subplots(len(panels), 1, sharex=True))
        for axes, (key, title, label, lines) in zip(all_axes, panels, strict=True):
            if key.endswith("loss"):
                _limit_loss(axes, lines, look)
            _draw_lines(axes, lines, axis, look)
            axes.set_title(title)
            axes.set_ylabel(label.format(comparison.loss_unit))
            axes.margins(x=0.02)
        counting_ticks(all_axes[-1].xaxis)
        all_axes[-1].set_xlabel(AXIS_LABELS[axis].format(comparison.unit))
        handles = [
            Line2D([], [], color=s.color, linestyle=s.line, marker=s.marker, markersize=4)
            for s in (look[a.label] for a in named)
        ]
        if diverged:
            handles.append(Line2D([], [], color=QUIET, **CROSS))
        legend_above(figure, handles, labels)

    ends = "; ".join(f"{a.label} {fixed(a.loss(), 3)}" for a in named if a.loss() is not None)
    return save(
        draw,
        folder,
        f"learning_curves_{against}",
        height=2.45 * len(panels) + legend_height(labels),
        section="curves",
        title=f"Learning curves against {against}",
        caption=_curve_caption(comparison, look),
        alt=f"Validation and training loss against {against}. Final validation loss: "
        f"{ends or 'none yet'}.",
    )


def _curve_caption(comparison: Comparison, look: dict[str, Look]) -> str:
    windows = sorted({smoothing_window(len(r.metrics)) for r in comparison.runs if r.metrics})
    text = f"Training loss: mean over the last {windows[-1]} steps"
    if len(windows) > 1:
        text += f" (of shorter lines fewer, at least {windows[0]})"
    text = f"{text}. " if windows[-1] > 1 else ""
    text += "Validation loss: as measured, on the held-out split."
    if any(len(arm.runs) > 1 for arm in comparison.arms):
        text += " Lines are means over the seeds, bands ± one standard deviation."
        if any(run.status == "diverged" for run in comparison.runs):
            text += " Seeds that diverged are drawn by themselves, thin."
    text += " A line that leaves the axes goes on above them."
    if any(style.faint for style in look.values()):
        text += " Named is the best arm of each optimizer; "
        few = len(named_arms(comparison)) < len(best_of_each(comparison))
        text += "of many, the best ones; " if few else ""
        crowded = _is_crowded(look)
        text += "other trials are not drawn." if crowded else "other arms are the faint lines."
    return text
