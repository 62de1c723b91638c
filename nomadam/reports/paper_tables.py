"""The paper's tables beside ours, where a study of the paper is reported."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nomadam.reports.arms import Arm, Comparison, best
from nomadam.reports.drawing import best_of_each
from nomadam.reports.grids import FAMILY, measure_of, spread_grids
from nomadam.reports.published import Number, PaperTable, table_of
from nomadam.reports.tables import DASH, MEASURES, fixed, mean_and_sd, milliseconds, scores, with_sd

PAPER = "arXiv 2412.11768"
HEADS = {
    "train_loss": "training loss",
    "validation_loss": "validation loss",
    "optimizer_ms": "optimizer step, ms",
    "state": "state of AdamW's, %",
    "validation_accuracy": "top-1, %",
    "grid": "mean over the grid, %",
    "bleu": "BLEU",
    "rouge_l": "ROUGE-L",
}


@dataclass(frozen=True, kw_only=True)
class PaperSection:
    """What a report says of the paper's numbers: texts, not escaped.

    Args:
        title: of the table.
        heads: empty where the paper has no numbers.
        cells: the rows.
        note: both settings.
    """

    title: str
    heads: list[str]
    cells: list[list[str]]
    note: str


def paper_sections(comparison: Comparison) -> list[PaperSection]:
    """Set the paper's numbers beside ours, a table for each of its studies that was run."""
    names = dict.fromkeys(str(run.configuration.get("name") or "") for run in comparison.runs)
    tables = {table.title: table for name in names if (table := table_of(name)) is not None}
    return [_section(comparison, table, list(names)) for table in tables.values()]


def _section(comparison: Comparison, table: PaperTable, names: Sequence[str]) -> PaperSection:
    first = comparison.runs[0]
    size = "" if first.num_params is None else f", {first.num_params:,.0f} parameters"
    data = str(first.data.get("source") or "unknown data")
    note = f"In the paper ({PAPER}): {table.setting} Ours: {', '.join(names)}{size}, on {data}."
    if not table.rows:
        return PaperSection(title=table.title, heads=[], cells=[], note=note)
    note += (
        " Where these are another model and other data, the order of the optimizers can be "
        "compared, and the numbers can not. Ours: mean over the finished seeds of the arm with the "
        "optimizer's best validation loss, ± one standard deviation where there are several."
    )
    rows = [
        (paper_name, numbers, _ours(comparison, name))
        for name, (paper_name, numbers) in table.rows.items()
    ]
    taken = [arm.label for *_, arm in rows if arm is not None]
    rows += [
        (arm.optimizer, (None,) * len(table.columns), arm)
        for arm in best_of_each(comparison)
        if arm.losses() and arm.label not in taken and _stands_for(arm) not in table.rows
    ]
    shown = {key: [_shown(comparison, arm, key) for *_, arm in rows] for key in table.ours}
    shown = {key: texts for key, texts in shown.items() if set(texts) != {DASH}}
    heads = [
        "optimizer",
        *(f"paper: {head}" for head, _ in table.columns),
        "our arm",
        *(f"ours: {HEADS[key]}" for key in shown),
    ]
    cells = [
        [
            name,
            *(_number(n, digits) for n, (_, digits) in zip(numbers, table.columns, strict=True)),
            arm.label if arm else DASH,
            *(texts[place] for texts in shown.values()),
        ]
        for place, (name, numbers, arm) in enumerate(rows)
    ]
    return PaperSection(title=table.title, heads=heads, cells=cells, note=note)


def _stands_for(arm: Arm) -> str:
    """The optimizer of the paper that an arm can stand for; empty for a variant of it."""
    gain = arm.configuration.get("optimizer.arguments.gain", "gsnr")
    family = arm.configuration.get(FAMILY, "resnet18")
    return arm.optimizer if gain == "gsnr" and family == "resnet18" else ""


def _ours(comparison: Comparison, name: str) -> Arm | None:
    arms = [arm for arm in comparison.arms if _stands_for(arm) == name and arm.losses()]
    return best(arms) if arms else None


def _number(number: Number, digits: int) -> str:
    if isinstance(number, tuple):
        return with_sd(*number, digits=digits)
    return fixed(number, digits)


def _shown(comparison: Comparison, arm: Arm | None, key: str) -> str:
    if arm is None:
        return DASH
    if key == "optimizer_ms":
        return milliseconds(mean_and_sd(arm.values(key))[0])
    if key == "state":
        return _state(comparison, arm)
    if key == "grid":
        return _over_the_grid(comparison, arm)
    factor, digits = next(((f, d) for own, _, f, d in MEASURES if own == key), (1.0, 3))
    values = [factor * value for value in scores(arm, key).values()]
    return with_sd(*mean_and_sd(values), digits=digits)


def _state(comparison: Comparison, arm: Arm) -> str:
    adamw = next((own for own in comparison.arms if own.optimizer == "adamw"), None)
    sizes: list[Any] = [max(own.values("state_bytes"), default=None) for own in (arm, adamw) if own]
    if len(sizes) < 2 or not all(sizes):
        return DASH
    return fixed(100 * sizes[0] / sizes[1], 1)


def _over_the_grid(comparison: Comparison, arm: Arm) -> str:
    measure = measure_of(comparison)
    for grid in spread_grids(comparison):
        arms = list(grid.cells.values())
        if measure.rises and arm.label in {own.label for own in arms}:
            values = [value for own in arms if (value := measure.of(own)[0]) is not None]
            return with_sd(*mean_and_sd(values), digits=2)
    return DASH
