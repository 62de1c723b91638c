"""Writes the tables of README.md and of the documentation, between their markers, from the results.

A table stands between ``<!-- begin NAME -->`` and ``<!-- end NAME -->``; all else is left alone.
Run: ``make tables``, or ``python benchmarks/tables.py [--check]``, which also draws the pictures.
"""

import argparse
import re
import sys
from pathlib import Path

from sections import SECTIONS, Results, read_results

ROOT = Path(__file__).parents[1]
PAGES = tuple(
    ROOT / page
    for page in ("README.md", "docs/speed.md", "docs/distributed.md", "docs/trainers.md")
)
MARKER = re.compile(r"<!-- begin (\w+) -->\n.*?<!-- end \1 -->", re.DOTALL)


def filled(text: str, results: Results) -> str:
    """The text with every marked section made anew.

    Args:
        text: of a page.
        results: newest of each kind and device.

    Raises:
        KeyError: a marker names no section.
    """

    def section(found: re.Match[str]) -> str:
        name = found[1]
        return f"<!-- begin {name} -->\n{SECTIONS[name](results)}\n<!-- end {name} -->"

    return MARKER.sub(section, text)


def stale(results: Results) -> list[Path]:
    """The pages that do not say what the results say."""
    return [page for page in PAGES if filled(page.read_text(), results) != page.read_text()]


def main() -> None:
    """Writes the pages and the pictures; with ``--check`` only tells which pages are stale."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if stale")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args()
    results = read_results(args.results)
    if args.check:
        old = [str(page.relative_to(ROOT)) for page in stale(results)]
        sys.exit(f"stale, run `make tables`: {', '.join(old)}" if old else 0)
    for page in PAGES:
        page.write_text(filled(page.read_text(), results))
    from pictures import draw_all

    for path in draw_all(results, ROOT / "docs" / "pictures"):
        print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
