"""Reports: what run folders say, as tables and figures. Reads files only; needs no torch."""

from collections.abc import Sequence
from pathlib import Path

from nomadam.durable_files import disk_full_told
from nomadam.reports.arms import Comparison, read_comparison
from nomadam.reports.figures import draw_all
from nomadam.reports.html import lead_text, page
from nomadam.reports.sections import Section, sections_of
from nomadam.reports.study_pages import only_studies, write_study_report
from nomadam.reports.tables import (
    common_cells,
    difference_cells,
    environment_cells,
    markdown_table,
    markdown_text,
    summary_rows,
)
from nomadam.runs import refuse_file

__all__ = ["summary_rows", "write_report"]


def write_report(folders: Sequence[Path], out: Path) -> list[Path]:
    """Write report.md, report.html and figures/ on the runs, or the studies, of some folders.

    The same folders give the same bytes. Files of an earlier report are replaced.

    Args:
        folders: run folders and comparison folders, mixed as you like; each run counts once. Or
            folders of studies that are no trainings.
        out: folder to write to; made where it is missing.

    Returns:
        The paths that were written, report.md and report.html first.

    Raises:
        ValueError: a folder that is neither, runs on different data, studies and runs together,
            or a file for `out`.
        ImportError: matplotlib is not installed.
        DiskFullError: no space left for the report.
    """
    out, studies = Path(out), only_studies(folders)
    refuse_file(out)
    if studies:
        with disk_full_told(out, "free some and make the report again"):
            return write_study_report(studies, out)
    comparison = read_comparison([Path(folder) for folder in folders])
    with disk_full_told(out, "free some and make the report again"):
        pictures = draw_all(comparison, out / "figures")
        sections = sections_of(comparison, pictures)
        texts = {
            out / "report.md": _markdown_page(comparison, sections),
            out / "report.html": page(comparison, sections),
        }
        for path, text in texts.items():
            path.write_text(text, encoding="utf-8", newline="\n")
    drawn = [path for picture in pictures for path in picture.files]
    return [*texts, *drawn]


def _markdown_page(comparison: Comparison, sections: Sequence[Section]) -> str:
    parts = [f"# {markdown_text(comparison.title)}\n", f"{markdown_text(lead_text(comparison))}\n"]
    if comparison.notes:
        parts.append("".join(f"- {markdown_text(note)}\n" for note in comparison.notes))
    for section in sections:
        parts.append(f"## {section.title}\n")
        for one in section.tables:
            if one.heads:
                parts.append(markdown_table(one.heads, one.cells, left=one.text_columns))
            parts += [f"{markdown_text(one.note)}\n"] if one.note else []
        for picture in section.pictures:
            alt, words = (markdown_text(text) for text in (picture.alt, picture.caption))
            title = markdown_text(picture.title)
            parts += [f"![{alt}](figures/{picture.name}.png)\n", f"{title}. {words}\n"]
    parts.append("## Configuration\n")
    if len(comparison.arms) > 1:
        heads, cells = difference_cells(comparison)
        parts += [
            "What differs between the arms, their seeds included:\n",
            markdown_table(heads, cells, left=range(len(heads))),
            "What all arms have in common:\n",
        ]
    parts += [markdown_table(*common_cells(comparison), left=(0, 1)), "## Environment\n"]
    heads, cells = environment_cells(comparison)
    parts.append(
        markdown_table(heads, cells, left=(0, 1))
        if cells
        else "The run folders hold no readable environment.json.\n"
    )
    return "\n".join(parts)
