"""Copies finished run folders into the repository, small: the evidence behind a table.

Of each run it keeps ``run.json``, ``environment.json``, ``result.json``, what else is JSON there,
and of ``metrics.jsonl`` the steps with an evaluation; of a comparison ``comparison.json``. No
weights, and no figures: ``nomadam compare NAME --out FOLDER`` or ``nomadam report`` makes them
again from what is kept.

Run: ``python benchmarks/keep_runs.py runs/A runs/B ... --out results/NAME``.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from nomadam.durable_files import write_json


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
        kept = out / run.name
        kept.mkdir(parents=True, exist_ok=True)
        for file in run.glob("*.json"):
            shutil.copy(file, kept)
        environment = json.loads((run / "environment.json").read_text(encoding="utf-8"))
        # Paths of the machine say nothing to others.
        environment["command"] = [Path(word).name for word in environment.get("command", [])]
        write_json(kept / "environment.json", environment)
        with open(run / "metrics.jsonl", encoding="utf-8") as lines:
            evaluated = [line for line in lines if "validation_loss" in json.loads(line)]
        (kept / "metrics.jsonl").write_text("".join(evaluated), encoding="utf-8")
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
