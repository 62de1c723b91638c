"""The report as one HTML page that needs nothing beside it and runs nothing."""

import base64
import hashlib
import re
from collections.abc import Sequence
from html import escape

from nomadam.reports.arms import Comparison
from nomadam.reports.drawing import Picture
from nomadam.reports.sections import Section
from nomadam.reports.tables import common_cells, difference_cells, environment_cells

STYLE = """
:root { color-scheme: light dark; --page: #ffffff; --ink: #1b1f24; --quiet: #57606a;
  --line: #d8dee4; --card: #f6f8fa; --mark: #0b62a8; --warn: #fff4dc; --warn-line: #d9a441;
  --bad: #a02c00; }
@media (prefers-color-scheme: dark) { :root { --page: #14171c; --ink: #e3e7ec; --quiet: #9ba5b1;
  --line: #323943; --card: #1c2128; --mark: #6cb6f0; --warn: #30270f; --warn-line: #8d6b22;
  --bad: #ff9b73; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
  overflow-wrap: anywhere; }
main { max-width: 1360px; margin: 0 auto; padding: 2rem clamp(0.9rem, 3vw, 2.5rem) 4rem; }
h1 { font-size: clamp(1.4rem, 4vw, 2rem); line-height: 1.2; margin: 0 0 0.4rem; }
h2 { font-size: 1.25rem; line-height: 1.3; margin: 2.6rem 0 0.8rem; padding-top: 0.8rem;
  border-top: 1px solid var(--line); }
p { margin: 0.5rem 0; max-width: 78ch; }
.lead, .small, figcaption { color: var(--quiet); }
.small, figcaption { font-size: 0.86rem; line-height: 1.5; }
.notes { margin: 1rem 0; padding: 0.6rem 1rem 0.6rem 2rem; max-width: 82ch;
  background: var(--warn); border-left: 4px solid var(--warn-line); border-radius: 4px; }
.box { overflow-x: auto; border: 1px solid var(--line); border-radius: 8px; margin: 0.8rem 0; }
.box:focus-visible { outline: 2px solid var(--mark); outline-offset: 2px; }
table { border-collapse: separate; border-spacing: 0; width: 100%; font-size: 0.92rem;
  line-height: 1.4; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
th, td { padding: 0.5rem 0.75rem; text-align: right; vertical-align: top; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
th { background: var(--card); font-weight: 600; }
thead th { vertical-align: bottom; white-space: normal; min-width: 6.6rem; max-width: 12rem;
  color: var(--quiet); font-size: 0.84rem; overflow-wrap: break-word; }
tbody tr:last-child > * { border-bottom: 0; }
.text, tbody th { text-align: left; }
thead th:first-child, thead th:nth-child(2) { min-width: 0; }
/* The arm stays in sight while the box scrolls. */
th:first-child { position: sticky; left: 0; z-index: 1; }
tbody th { background: var(--page); white-space: normal; overflow-wrap: anywhere;
  min-width: min(13rem, 30vw); max-width: min(22rem, 42vw); }
td:last-child { white-space: normal; min-width: 7rem; }
.fields { margin: 0.8rem 0; columns: 3 360px; column-gap: 2.2rem; font-size: 0.92rem; }
.fields div { break-inside: avoid; padding: 0.32rem 0; border-bottom: 1px solid var(--line);
  display: grid; grid-template-columns: minmax(0, 5fr) minmax(0, 6fr); gap: 0.8rem; }
.fields dt { color: var(--quiet); }
.fields dd { margin: 0; }
.reference > * { background: var(--card); }
.bad { color: var(--bad); font-weight: 600; }
.figures { display: grid; gap: 1.2rem; align-items: start;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 380px), 1fr)); }
figure { margin: 0; border: 1px solid var(--line); border-radius: 8px; overflow: hidden;
  max-width: 600px; }
figure.wide { max-width: 1220px; grid-column: 1 / -1; }
figure img { display: block; width: 100%; height: auto; background: #ffffff; padding: 0.5rem; }
figcaption { padding: 0.6rem 0.9rem 0.8rem; border-top: 1px solid var(--line); }
figcaption strong { color: var(--ink); }
code { font: 0.92em/1.4 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
footer { margin-top: 3rem; }
@media (max-width: 600px) { th, td { padding: 0.42rem 0.6rem; } body { font-size: 15px; } }
@media print { figure, .box { break-inside: avoid; } }
""".strip()


def table(
    heads: Sequence[str],
    cells: Sequence[Sequence[str]],
    *,
    label: str,
    text_columns: Sequence[int] = (0,),
    classes: Sequence[str] = (),
) -> str:
    """Return a table in a box of its own that scrolls sideways; every cell is escaped.

    Args:
        heads: the first row.
        cells: the other rows, as texts.
        label: says to a screen reader what the table is.
        text_columns: set left, the others right.
        classes: one class a row; empty for none.
    """

    def cell(tag: str, column: int, text: str, extra: str = "") -> str:
        kind = ' class="text"' if column in text_columns else ""
        return f"<{tag}{extra}{kind}>{escape(text)}</{tag}>"

    head = "".join(cell("th", i, text, ' scope="col"') for i, text in enumerate(heads))
    lines = []
    for index, row in enumerate(cells):
        kind = classes[index] if index < len(classes) else ""
        body = cell("th", 0, row[0], ' scope="row"')
        body += "".join(cell("td", i, text) for i, text in enumerate(row) if i)
        lines.append(f'<tr class="{kind}">{body}</tr>' if kind else f"<tr>{body}</tr>")
    return (
        f'<div class="box" role="region" tabindex="0" '
        f'aria-label="{escape(label)}"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n'
        + "\n".join(lines)
        + "\n</tbody></table></div>\n"
    )


def _breakable(text: str) -> str:
    """Escape, and let a line break after the dots, underscores and slashes of a long name."""
    return re.sub(r"(?<=\w)([._/])(?=\w)", r"\1<wbr>", escape(text))


def field_list(cells: Sequence[Sequence[str]]) -> str:
    """Return pairs of name and value as a list in as many columns as fit; both are escaped."""
    items = (
        f"<div><dt>{_breakable(name)}</dt><dd>{_breakable(value)}</dd></div>\n"
        for name, value in cells
    )
    return f'<dl class="fields">\n{"".join(items)}</dl>\n'


def figure(picture: Picture) -> str:
    """Return a figure with its caption; its SVG file, or else its PNG, is read and embedded."""
    # As an image, an SVG file can neither run scripts nor load anything.
    file, kind = (picture.png, "png") if picture.svg is None else (picture.svg, "svg+xml")
    content = base64.b64encode(file.read_bytes()).decode("ascii")
    opening = '<figure class="wide">' if picture.wide else "<figure>"
    return (
        f'{opening}<img src="data:image/{kind};base64,{content}" alt="{escape(picture.alt)}">\n'
        f"<figcaption><strong>{escape(picture.title)}.</strong> {escape(picture.caption)} "
        f"<code>figures/{escape(file.name)}</code></figcaption></figure>\n"
    )


def _section(section: Section) -> str:
    """Return a section with its heading, its tables and its figures."""
    parts = [f'<h2 id="{section.name}">{section.title}</h2>\n']
    for one in section.tables:
        if one.heads:
            parts.append(
                table(
                    one.heads,
                    one.cells,
                    label=one.label,
                    text_columns=one.text_columns,
                    classes=one.classes,
                )
            )
        parts += [f'<p class="small">{escape(one.note)}</p>\n'] if one.note else []
    if section.pictures:
        figures = "".join(figure(picture) for picture in section.pictures)
        parts.append(f'<div class="figures">\n{figures}</div>\n')
    return "".join(parts)


def _configuration(comparison: Comparison) -> str:
    heads, cells = difference_cells(comparison)
    parts = ['<h2 id="configuration">Configuration</h2>\n']
    if len(comparison.arms) > 1:
        parts.append("<p>What differs between the arms, their seeds included:</p>\n")
        parts.append(table(heads, cells, label="Differences", text_columns=range(len(heads))))
        parts.append("<p>What all arms have in common:</p>\n")
    parts.append(field_list(common_cells(comparison)[1]))
    return "".join(parts)


def _environment(comparison: Comparison) -> str:
    _, cells = environment_cells(comparison)
    title = '<h2 id="environment">Environment</h2>\n'
    if not cells:
        return f"{title}<p>The run folders hold no readable environment.json.</p>\n"
    return title + field_list(cells)


def lead_text(comparison: Comparison) -> str:
    """Return one line of plain text that says what was compared."""
    arms, runs = len(comparison.arms), len(comparison.runs)
    text = f"{arms} arm{'s' * (arms != 1)}, {runs} run{'s' * (runs != 1)}"
    first = comparison.runs[0]
    sizes = {run.num_params for run in comparison.runs}
    if len(sizes) == 1 and first.num_params is not None:
        text += f", {first.num_params:,.0f} parameters"
    source = first.data.get("source")
    checksum = str(first.data.get("sha256") or "")
    if source is not None:
        text += f"; data: {source}" + (f" (SHA-256 {checksum[:12]}…)" if checksum else "")
    return text


def page(comparison: Comparison, sections: Sequence[Section]) -> str:
    """Return the whole page: tables, figures, configuration and environment.

    Args:
        comparison: the arms.
        sections: from `sections_of`; the files of their figures are read and embedded.
    """
    parts = [*map(_section, sections), _configuration(comparison), _environment(comparison)]
    return document(comparison.title, lead_text(comparison), comparison.notes, parts)


def document(title: str, lead: str, notes: Sequence[str], parts: Sequence[str]) -> str:
    """Return a whole page; title, lead and notes are escaped.

    A Content-Security-Policy allows this page's own style and images within it, and nothing else:
    no script, no request.

    Args:
        title: of the page.
        lead: a line below the title.
        notes: what a reader should be warned of.
        parts: HTML, in which everything that comes from a file is escaped already.
    """
    digest = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode("ascii")
    policy = (
        f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; "
        "base-uri 'none'; form-action 'none'"
    )
    items = "".join(f"<li>{escape(note)}</li>" for note in notes)
    head = [
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n',
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n',
        '<meta name="referrer" content="no-referrer">\n',
        f"<title>{escape(title)} – nomadam report</title>\n",
        f"<style>{STYLE}</style>\n</head>\n<body>\n<main>\n",
        f"<h1>{escape(title)}</h1>\n",
        f'<p class="lead">{escape(lead)}</p>\n',
        f'<ul class="notes">{items}</ul>\n' if items else "",
    ]
    return "".join([*head, *parts, "</main>\n</body>\n</html>\n"])
