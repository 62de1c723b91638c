"""How every figure looks and is saved: one style, colours and markers, deterministic files."""

import textwrap
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nomadam.reports.arms import Arm, Comparison, best

# Okabe and Ito's colours without yellow, which is too pale for a line on white.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINES = (
    "-",
    (0, (5, 1.6)),
    (0, (7, 1.5, 1.5, 1.5)),
    (0, (1.6, 1.2)),
    (0, (9, 2.5)),
)
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
MOST_ARMS = len(COLORS)
INK, QUIET, GRID, FAINT = "#1b1f24", "#57606a", "#e3e6ea", "#a8b0b9"
WIDTH, WIDE = 5.4, 10.8
# Marks a run that diverged.
CROSS: dict[str, Any] = {
    "linestyle": "none",
    "marker": "x",
    "markersize": 8,
    "markeredgewidth": 2.2,
}
STYLE = {
    "font.family": ["DejaVu Sans"],
    "font.size": 10.5,
    "axes.labelsize": 10.5,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8c959f",
    "axes.labelcolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": "#8c959f",
    "ytick.color": "#8c959f",
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
    "text.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 10,
    "lines.linewidth": 1.9,
    "lines.markersize": 6,
    "hatch.linewidth": 0.7,
    # Labels come from files: a dollar sign in one must not start a formula.
    "text.parse_math": False,
    "svg.fonttype": "path",
    "svg.hashsalt": "nomadam",
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A figure that has been saved.

    Args:
        name: its file name without ending.
        section: one of `nomadam.reports.sections.TITLES`.
        caption: what is drawn and how, in plain text.
        alt: what a reader who can not see it should know.
        svg: None for what is no drawing.
        wide: whether it takes the whole width of the page.
    """

    name: str
    section: str
    title: str
    caption: str
    alt: str
    png: Path
    svg: Path | None = None
    wide: bool = False

    @property
    def files(self) -> list[Path]:
        """Its files, the PNG first."""
        return [self.png] if self.svg is None else [self.png, self.svg]


@dataclass(frozen=True)
class Look:
    """Colour, line and marker of an arm; a faint one stands in the background."""

    color: str
    line: Any
    marker: str
    faint: bool = False


def best_of_each(comparison: Comparison) -> list[Arm]:
    """Return all arms where colours suffice, else of each optimizer and setting the best arm.

    Where these are too many as well, it is the best of each optimizer.
    """
    if len(comparison.arms) <= MOST_ARMS:
        return list(comparison.arms)
    found = [best(arms) for _, arms in comparison.tuned()]
    if len(found) > MOST_ARMS:
        by_name: dict[str, list[Arm]] = {}
        for arm in comparison.arms:
            by_name.setdefault(arm.optimizer, []).append(arm)
        found = [best(arms) for arms in by_name.values()] if len(by_name) > 1 else found
    return found


def named_arms(comparison: Comparison) -> list[Arm]:
    """Return the arms that figures of lines name: as many as there are colours.

    Of more than that, the reference, SGD-SaI and those with the lowest loss.
    """
    arms = best_of_each(comparison)
    if len(arms) <= MOST_ARMS:
        return arms
    first = [arm for arm in arms if arm is comparison.reference or arm.optimizer == "sgd_sai"]
    others = [arm for arm in arms if arm not in first and arm.losses()]
    others.sort(key=lambda arm: arm.loss() or 0.0)
    kept = [*first, *others][:MOST_ARMS]
    return [arm for arm in arms if arm in kept]


def looks(comparison: Comparison) -> dict[str, Look]:
    """Return label -> look: one for each named arm, others faint in the look of their optimizer.

    What is of no optimizer that is named is grey.
    """
    named = named_arms(comparison)
    own = {
        arm.label: Look(COLORS[i % len(COLORS)], LINES[i % len(LINES)], MARKERS[i % len(MARKERS)])
        for i, arm in enumerate(named)
    }
    by_name = {arm.optimizer: own[arm.label] for arm in reversed(named)}
    grey = Look(FAINT, "-", "o")
    return {
        arm.label: own.get(arm.label) or replace(by_name.get(arm.optimizer, grey), faint=True)
        for arm in comparison.arms
    }


def shown(text: str, longest: int = 34) -> str:
    """Return a label that fits: its middle is left out where it is too long.

    Example:
        >>> shown("transformer.h.0.attn.c_attn.weight", 18)
        'transfor…tn.weight'
    """
    if len(text) > longest:
        text = f"{text[: (longest - 1) // 2]}…{text[len(text) - longest // 2 :]}"
    # matplotlib hides what begins with an underscore; a hair space before it is not seen.
    return f"\u200a{text}" if text.startswith("_") else text


def folded(text: str, width: int = 34) -> str:
    r"""Return a label on as many lines as it needs, broken at its spaces.

    Example:
        >>> folded("sgd_sai precision=bf16 rounding=stochastic", 24)
        'sgd_sai precision=bf16\nrounding=stochastic'
    """
    lines = textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)
    return "\n".join(shown(line, width) for line in lines)


def paler(color: str) -> str:
    """Return a colour mixed with four parts of white; opaque, for a hatch lies on it.

    Example:
        >>> paler("#0072B2")
        '#cce3f0'
    """
    parts = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
    return "#" + "".join(f"{round((part + 4 * 255) / 5):02x}" for part in parts)


def plain_ticks(axis: Any, widest: float = 3000) -> None:
    """Write the numbers of a logarithmic axis as 0.001 or 3e-05, with a few within each decade.

    Args:
        axis: its limits stand already.
        widest: ratio of the limits from which on a decade has one number.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    steps = (1.0, 3.0) if high < widest * low else (1.0,)
    axis.set_major_locator(LogLocator(subs=steps, numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def counting_ticks(axis: Any) -> None:
    """Keep the ticks few and round, and write large counts with k, M and G."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(
        FuncFormatter(lambda value, _: short_count(value, max(map(abs, axis.get_view_interval()))))
    )


def short_count(value: float, largest: float) -> str:
    """Return a count in few characters, in the unit that suits the largest of its axis.

    Example:
        >>> short_count(5000, 20000), short_count(2.5, 10), short_count(300, 800)
        ('5k', '2.5', '300')
    """
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if largest >= max(unit, 1e4):
            return f"{value / unit:g}{letter}" if value else "0"
    return f"{value:g}"


def _legend_columns(labels: list[str]) -> int:
    longest = max((len(x) for label in labels for x in folded(label).split("\n")), default=1)
    return max(1, min(len(labels), 56 // (longest + 5)))


def legend_height(labels: list[str]) -> float:
    """Return the height in inches that `legend_above` takes of a figure; 0 without labels."""
    if not labels:
        return 0.0
    lines = [folded(label).count("\n") + 1 for label in labels]
    rows = max(1, -(-len(lines) // _legend_columns(labels)))
    columns = [sum(lines[start : start + rows]) for start in range(0, len(lines), rows)]
    return 0.12 + 0.21 * max(columns, default=0)


def legend_above(figure: Any, handles: list[Any], labels: list[str]) -> None:
    """Put the legend above the axes, where it hides nothing, in as many columns as fit."""
    figure.legend(
        handles,
        [folded(label) for label in labels],
        loc="outside upper left",
        ncols=_legend_columns(labels),
        handlelength=3.0,
        columnspacing=1.4,
        borderaxespad=0.2,
    )


def save(
    draw: Callable[[Any], None],
    folder: Path,
    name: str,
    *,
    height: float,
    wide: bool = False,
    **words: str,
) -> Picture:
    """Draw on a new figure and save it as SVG and PNG; the same input gives the same bytes.

    Args:
        draw: called with an empty `matplotlib.figure.Figure`.
        folder: exists already.
        name: of the files, without ending.
        height: inches.
        wide: twice as wide as others; default False.
        words: section, title, caption and alt of the `Picture`.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib import style
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            'reports draw with matplotlib: pip install "nomadam[lab]" installs it'
        ) from error
    png, svg = folder / f"{name}.png", folder / f"{name}.svg"
    # The reader's own matplotlibrc must not change a report, nor a report his settings.
    with style.context(["default", STYLE]), warnings.catch_warnings():
        # A name in a script that the font lacks is drawn as boxes: nothing to warn of.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure = Figure(figsize=(WIDE if wide else WIDTH, height), layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure)
        figure.savefig(svg, metadata={"Date": None, "Creator": None})
        # The layout is found already; finding it again would take as long as the drawing.
        figure.set_layout_engine("none")
        figure.savefig(png, dpi=200, metadata={"Software": None})
    return Picture(name=name, png=png, svg=svg, wide=wide, **words)
