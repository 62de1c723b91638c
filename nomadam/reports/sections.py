"""What a report on trainings shows, section by section, before it becomes HTML or Markdown."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from nomadam.reports.arms import Comparison
from nomadam.reports.drawing import Picture, best_of_each
from nomadam.reports.grids import grid_cells, grid_explanation, measure_of, spread_grids
from nomadam.reports.paired import (
    PAIRED_TEXT,
    paired_cells,
    paired_differences,
    paired_explanation,
)
from nomadam.reports.paper_tables import paper_sections
from nomadam.reports.tables import LONGEST_RESULTS, explanation, rows_of, summary_cells

TITLES = {
    "results": "Results",
    "paper": "In the paper",
    "paired": "Paired differences",
    "curves": "Learning curves",
    "sensitivity": "Learning-rate sensitivity",
    "grid": "Over the grid",
    "samples": "Samples",
    "cost": "Memory and time",
    "gains": "Gains by block",
    "arms": "All arms",
}


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table and what its columns mean; texts, not escaped.

    Args:
        label: says what it is to those who do not see it.
        heads: empty where there is only the note.
        cells: the rows.
        note: in a paragraph below it.
        text_columns: set left, the others right.
        classes: one a row, empty for none.
    """

    label: str
    heads: list[str]
    cells: list[list[str]]
    note: str = ""
    text_columns: Sequence[int] = (0,)
    classes: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of the report: its tables, then its figures."""

    name: str
    title: str
    tables: list[Table] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)


def sections_of(comparison: Comparison, pictures: Sequence[Picture]) -> list[Section]:
    """Return the sections that there is something to show in, in order.

    Args:
        comparison: the arms.
        pictures: the figures that have been drawn.
    """
    tables = {
        "results": _results(comparison),
        "paper": _paper(comparison),
        "paired": _paired(comparison),
        "grid": _grid(comparison),
        "arms": _all_arms(comparison),
    }
    found = [
        Section(
            name=name,
            title=title,
            tables=tables.get(name, []),
            pictures=[picture for picture in pictures if picture.section == name],
        )
        for name, title in TITLES.items()
    ]
    return [section for section in found if section.tables or section.pictures]


def _is_long(comparison: Comparison) -> bool:
    most = max(LONGEST_RESULTS, len(best_of_each(comparison)))
    return len(comparison.arms) > most


def _summary(rows: list[dict[str, Any]], label: str, note: str) -> Table:
    heads, cells = summary_cells(rows)
    return Table(
        label=label,
        heads=heads,
        cells=cells,
        note=note,
        text_columns=(0, len(heads) - 1),
        classes=["reference" if row["is_reference"] else "" for row in rows],
    )


def _results(comparison: Comparison) -> list[Table]:
    rows = rows_of(comparison)
    note = explanation(rows)
    if _is_long(comparison):
        best = {arm.label for arm in best_of_each(comparison)}
        rows = [row for row in rows if row["label"] in best]
        note = f"Of each optimizer the best arm; all arms stand at the end. {note}"
    return [_summary(rows, TITLES["results"], note)]


def _all_arms(comparison: Comparison) -> list[Table]:
    if not _is_long(comparison):
        return []
    return [_summary(rows_of(comparison), TITLES["arms"], "")]


def _paper(comparison: Comparison) -> list[Table]:
    return [
        Table(
            label=f"{TITLES['paper']}: {one.title}",
            heads=one.heads,
            cells=one.cells,
            note=one.note,
            text_columns=[
                i for i, head in enumerate(one.heads) if head in ("optimizer", "our arm")
            ],
        )
        for one in paper_sections(comparison)
    ]


def _paired(comparison: Comparison) -> list[Table]:
    pairs = paired_differences(comparison)
    if not pairs:
        return []
    heads, cells = paired_cells(pairs)
    return [
        Table(
            label=TITLES["paired"],
            heads=heads,
            cells=cells,
            note=paired_explanation(comparison),
            text_columns=PAIRED_TEXT,
        )
    ]


def _grid(comparison: Comparison) -> list[Table]:
    grids, measure = spread_grids(comparison), measure_of(comparison)
    if not grids:
        return []
    by_family = any(len(grid.families) > 1 for grid in grids)
    heads, cells = grid_cells(grids, measure, by_family=by_family)
    return [
        Table(
            label=TITLES["grid"],
            heads=heads,
            cells=cells,
            note=grid_explanation(measure),
            text_columns=(0, 1) if by_family else (0,),
        )
    ]
