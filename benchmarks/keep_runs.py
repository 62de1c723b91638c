"""Copies finished run folders into the repository, small: the evidence behind a table.

Of each run it keeps ``run.json``, ``environment.json``, ``result.json``, what else is JSON there,
and of ``metrics.jsonl`` the steps with an evaluation; of a comparison ``comparison.json``. No
weights, and no figures: ``nomadam compare NAME --out FOLDER`` or ``nomadam report`` makes them
again from what is kept.

Run: ``python benchmarks/keep_runs.py runs/A runs/B ... --out results/NAME``.
"""

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from nomadam.experiments.kept_runs import keep_run


def keep(folders: Sequence[Path], out: Path) -> int:
    """Copies run folders that have a result; returns how many there were.

    Args:
        folders: run folders, or folders of such.
        out: the folder in the repository, made where it is missing.
    """
    out.mkdir(parents=True, exist_ok=True)
    for comparison in (folder / "comparison.json" for folder in folders):
        if comparison.is_file():
            shutil.copy(comparison, out)
    runs = [run for folder in folders for run in (folder, *sorted(folder.iterdir()))]
    runs = [run for run in runs if (run / "result.json").is_file()]
    for run in runs:
        keep_run(run, out / run.name)
    return len(runs)


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--out", required=True, type=Path)
    arguments = parser.parse_args()
    for folder in arguments.folders:
        if not folder.is_dir():
            sys.exit(f"{folder} is no folder")
    print(f"{keep(arguments.folders, arguments.out)} runs")


if __name__ == "__main__":
    main()
