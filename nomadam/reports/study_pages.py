"""The report on studies that are no comparison of trainings: their tables and figures."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from nomadam.reports.drawing import Picture
from nomadam.reports.gain_curves import draw_gain_curves
from nomadam.reports.html import document, field_list, figure
from nomadam.reports.html import table as html_table
from nomadam.reports.reading import RunRecord, plain_text, read_run
from nomadam.reports.tables import DASH, markdown_table, markdown_text
from nomadam.runs import RunFolder

MORE = "report on them separately"


@dataclass(frozen=True, kw_only=True)
class StudyTable:
    """A table as it is shown: texts, rounded for reading."""

    title: str
    heads: list[str]
    cells: list[list[str]]
    note: str


def is_study(folder: Path) -> bool:
    """Say whether a folder is that of a study; what is no folder of ours is none."""
    try:
        header = RunFolder(folder).read_header()
    except ValueError:
        return False
    return header is not None and "class" in header.get("run", {})


def only_studies(folders: Sequence[Path]) -> list[Path]:
    """Return the folders where they are those of studies, nothing where none is.

    Raises:
        ValueError: some are and some are not.
    """
    studies = [Path(folder) for folder in folders if is_study(Path(folder))]
    if studies and len(studies) < len(folders):
        raise ValueError(f"{studies[0]} holds a study, and others hold trainings; {MORE}")
    return studies


def study_tables(folder: Path) -> list[StudyTable]:
    """Read the tables of a study; an unfinished one has none.

    Raises:
        ValueError: ``tables.json`` is damaged.
    """
    held = (RunFolder(folder).read_object("tables.json") or {}).get("tables", [])
    try:
        return [
            StudyTable(
                title=plain_text(table["title"]),
                heads=[plain_text(head) for head in table["heads"]],
                cells=[
                    [shown_cell(cell) for cell, _ in zip(row, table["heads"], strict=True)]
                    for row in table["rows"]
                ],
                note=plain_text(table["note"]),
            )
            for table in held
        ]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        path = folder / "tables.json"
        raise ValueError(f"{path} is damaged ({error!r}); run the study again") from error


def shown_cell(value: Any) -> str:
    """Return a cell as text: counts whole, other numbers with four digits, None as a dash.

    Example:
        >>> shown_cell(1234567), shown_cell(0.0123456), shown_cell(None), shown_cell("tied")
        ('1,234,567', '0.01235', '–', 'tied')
    """
    if value is None:
        return DASH
    if isinstance(value, str):
        return plain_text(value)
    text = f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
    return text.replace("-", "\u2212") if text.startswith("-") else text


def write_study_report(folders: Sequence[Path], out: Path) -> list[Path]:
    """Write report.md, report.html and figures/ on studies.

    Args:
        folders: of studies.
        out: exists, or its parent does.

    Returns:
        The paths that were written, report.md and report.html first.
    """
    (out / "figures").mkdir(parents=True, exist_ok=True)
    records = [read_run(folder) for folder in folders]
    names = [str(record.configuration.get("name") or record.folder.name) for record in records]
    title = " and ".join(dict.fromkeys(names))
    notes = [note for record in records for note in record.notes]
    notes += [
        f"{record.folder}: not finished; the same command goes on"
        for record in records
        if record.status != "finished"
    ]
    texts, pages, drawn = [f"# {markdown_text(title)}\n"], [], []
    texts += ["".join(f"- {markdown_text(note)}\n" for note in notes)] if notes else []
    for number, record in enumerate(records):
        prefix = f"{number + 1}_" if len(records) > 1 else ""
        pictures = draw_gain_curves(record.folder, out / "figures", prefix)
        tables = study_tables(record.folder)
        texts += _markdown(record, tables, pictures)
        pages += _html(record, tables, pictures)
        drawn += pictures
    (out / "report.md").write_text("\n".join(texts), encoding="utf-8", newline="\n")
    page = document(title, "", notes, pages)
    (out / "report.html").write_text(page, encoding="utf-8", newline="\n")
    files = [path for picture in drawn for path in picture.files]
    return [out / "report.md", out / "report.html", *files]


def _fields(record: RunRecord) -> list[tuple[str, list[list[str]]]]:
    sections = (("Configuration", record.configuration), ("Environment", record.environment))
    return [
        (title, [[name, str(value)] for name, value in fields.items()])
        for title, fields in sections
    ]


def _markdown(
    record: RunRecord, tables: Sequence[StudyTable], pictures: Sequence[Picture]
) -> list[str]:
    parts = []
    for table in tables:
        parts += [f"## {markdown_text(table.title)}\n", markdown_table(table.heads, table.cells)]
        parts += [f"{markdown_text(table.note)}\n"] if table.note else []
    for picture in pictures:
        alt, caption = markdown_text(picture.alt), markdown_text(picture.caption)
        parts += [f"![{alt}](figures/{picture.name}.png)\n", f"{picture.title}. {caption}\n"]
    for title, cells in _fields(record):
        parts += [f"## {title}\n", markdown_table(["field", "value"], cells, left=(0, 1))]
    return parts


def _html(
    record: RunRecord, tables: Sequence[StudyTable], pictures: Sequence[Picture]
) -> list[str]:
    parts = []
    for table in tables:
        parts.append(f"<h2>{escape(table.title)}</h2>\n")
        parts.append(html_table(table.heads, table.cells, label=table.title))
        parts += [f'<p class="small">{escape(table.note)}</p>\n'] if table.note else []
    if pictures:
        parts.append(f'<div class="figures">\n{"".join(map(figure, pictures))}</div>\n')
    for title, cells in _fields(record):
        parts += [f"<h2>{title}</h2>\n", field_list(cells)]
    return parts
