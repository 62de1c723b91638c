"""Finished run folders, kept small: what a table or a figure needs of them, and no weights."""

import json
import shutil
from pathlib import Path

from nomadam.durable_files import write_json


def keep_run(run: Path, out: Path) -> None:
    """Copy what is small of a finished run folder or a study's, and no paths of the machine.

    Of a run are kept its JSON files, and the steps of ``metrics.jsonl`` at which it was evaluated.
    ``result.json`` comes last, so that a folder with it is whole.

    Args:
        run: a run folder with a result.
        out: the folder to copy to; made where it is missing.

    Raises:
        OSError: a file is missing, or can not be written.
    """
    out.mkdir(parents=True, exist_ok=True)
    for file in run.glob("*.json"):
        if file.name not in ("environment.json", "result.json"):
            shutil.copy(file, out)
    environment = json.loads((run / "environment.json").read_text(encoding="utf-8"))
    # Paths of the machine say nothing to others.
    environment["command"] = [Path(word).name for word in environment.get("command", [])]
    write_json(out / "environment.json", environment)
    if (run / "metrics.jsonl").exists():
        with open(run / "metrics.jsonl", encoding="utf-8") as lines:
            evaluated = [line for line in lines if "validation_loss" in json.loads(line)]
        (out / "metrics.jsonl").write_text("".join(evaluated), encoding="utf-8")
    # In one piece, where the other files may be torn by a kill.
    write_json(out / "result.json", json.loads((run / "result.json").read_text(encoding="utf-8")))
