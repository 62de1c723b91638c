"""Finished run folders, kept small: what a table or a figure needs of them, and no weights."""

import json
from pathlib import Path
from typing import Any

from nomadam.durable_files import write_atomically


def keep_run(run: Path, out: Path) -> None:
    """Copy what is small of a finished run folder or a study's, and no paths of the machine.

    Of a run are kept its JSON files, its samples, and the steps of ``metrics.jsonl`` at which it
    was evaluated.
    ``result.json`` comes last, so that a folder with it is whole.

    Args:
        run: a run folder with a result.
        out: the folder to copy to; made where it is missing.

    Raises:
        OSError: a file is missing, or can not be written.
    """
    files = [file for file in sorted(run.glob("*.json")) if file.name != "result.json"]
    kept = {file.name: file.read_bytes() for file in files}
    result = (run / "result.json").read_bytes()
    environment = json.loads((run / "environment.json").read_bytes())
    kept["environment.json"] = (json.dumps(_without_paths(environment), indent=2) + "\n").encode()
    if (run / "samples.png").exists():
        kept["samples.png"] = (run / "samples.png").read_bytes()
    if (run / "metrics.jsonl").exists():
        lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
        evaluated = [line for line in lines if "validation_loss" in json.loads(line)]
        kept["metrics.jsonl"] = b"".join(evaluated)
    out.mkdir(parents=True, exist_ok=True)
    # What was kept before, damaged, has to count as torn until all is there.
    (out / "result.json").unlink(missing_ok=True)
    for name, content in kept.items():
        write_atomically(out / name, content)
    write_atomically(out / "result.json", result)


def _without_paths(surroundings: dict[str, Any]) -> dict[str, Any]:
    """Where a run was made; paths of the machine say nothing to others."""
    told = dict(surroundings)
    told["command"] = [Path(word).name for word in told.get("command", [])]
    if "resumed" in told:
        told["resumed"] = [_without_paths(each) for each in told["resumed"]]
    return told
