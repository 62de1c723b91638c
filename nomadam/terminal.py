"""What the commands print: results on standard output, everything else on standard error."""

import json
import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nomadam.experiments import processes
from nomadam.progress import duration, show_cursor
from nomadam.runs import RunFolder

if TYPE_CHECKING:
    from nomadam.experiments.catalog import Entry
    from nomadam.experiments.comparison import Arm, ArmOutcome, Comparison

NONE = "-"
GAP = "  "
NARROWEST_LABEL = 10
WIDEST_HEAD = 12


def say(text: str) -> None:
    """Write a line to standard error."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def say_error(message: str) -> None:
    """Write an error, and of several processes which one it is in."""
    where = "" if processes.is_first() else f"process {processes.index()} of {processes.count()}: "
    say(f"{where}error: {message}")


def show(text: str) -> None:
    """Write a line to standard output."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def show_json(value: Any) -> None:
    """Write a value to standard output as JSON.

    Example:
        >>> show_json({"steps": 6})
        {
          "steps": 6
        }
    """
    show(json.dumps(value, indent=2, allow_nan=False))


def show_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    r"""Print a table, the first column to the left, the others to the right; nothing is cut.

    In a terminal that is too narrow the first column is folded; elsewhere a row is one line.

    Example:
        >>> show_table(["arm", "state\nMB"], [["sgd_sai", "5.31"]])
        <BLANKLINE>
                 state
        arm         MB
        ──────────────
        sgd_sai   5.31
        <BLANKLINE>
    """
    lines = [line for row in [heads, *rows] for line in _cells_as_lines(row)]
    widths = [max(len(line[index]) for line in lines) for index in range(len(heads))]
    if sys.stdout.isatty():
        room = shutil.get_terminal_size().columns - sum(widths[1:]) - len(GAP) * len(widths[1:])
        widths[0] = min(widths[0], max(room, NARROWEST_LABEL))
    rule = "─" * (sum(widths) + len(GAP) * (len(widths) - 1))
    show("")
    for index, row in enumerate([heads, *rows]):
        label = "\n".join(textwrap.wrap(row[0], widths[0]))
        for line in _cells_as_lines([label, *row[1:]]):
            cells = [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
            show(GAP.join([line[0].ljust(widths[0]), *cells]))
        if index == 0:
            show(rule)
    show("")


def _cells_as_lines(row: Sequence[str]) -> list[tuple[str, ...]]:
    """Give the lines of a row whose cells may have several, the last ones level."""
    cells = [cell.split("\n") for cell in row]
    height = max(map(len, cells))
    return list(zip(*([""] * (height - len(cell)) + cell for cell in cells), strict=True))


def show_summary(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the rows of ``nomadam.reports.tables.summary_rows``."""
    reference = next((row["reference"] for row in rows if row["reference"]), None)
    seeds = any(row["num_seeds"] > 1 for row in rows)
    heads = ["arm", *(["seeds"] if seeds else []), "validation\nloss"]
    heads += ["difference\nto " + reference.replace(" ", "\n")] if reference else []
    heads += ["state\nMB", "bytes/\nparam", "optimizer\nstep ms", "memory\npeak MB"]
    cells = []
    for row in rows:
        loss = _number(row["validation_loss"], 3)
        if row["num_diverged"] and row["validation_loss"] is None:
            loss = "diverged"
        elif row["validation_loss_sd"] is not None:
            loss += f" ± {row['validation_loss_sd']:.3f}"
        line = [row["label"], loss]
        if seeds:
            line.insert(1, f"{row['num_finished']}/{row['num_seeds']}")
        if reference:
            line.append(NONE if row["is_reference"] else _number(row["difference"], 3, "+"))
        line += [_number(row["state_mb"], 2), _number(row["state_bytes_per_param"], 2)]
        line += [_number(row["optimizer_ms"], 2), _number(row["peak_memory_mb"], 0)]
        cells.append(line)
    show_table(heads, cells)
    for row in rows:
        if row["num_finished"] < row["num_seeds"]:
            show(f"{row['label']}: {row['status']}")


def result_lines(result: Mapping[str, Any]) -> list[str]:
    """Put a ``result.json`` into a few lines.

    Example:
        >>> result_lines({"status": "diverged", "steps": 9, "diverged_at_step": 9})[0]
        'diverged at step 9: the loss was not finite'
    """
    if result["status"] == "diverged":
        lines = [f"diverged at step {result.get('diverged_at_step')}: the loss was not finite"]
    else:
        seconds = result.get("seconds")
        took = f" in {duration(seconds)}" if seconds is not None else ""
        lines = [f"{result['status']}: {result.get('steps')} steps{took}"]
    best = _number(result.get("best_validation_loss"), 4)
    state_mb = _number(_scaled(result.get("state_bytes"), 1e-6), 2)
    per_param = _number(result.get("state_bytes_per_param"), 2)
    accuracy = _scaled(result.get("validation_accuracy"), 100)
    values = {
        "validation loss": f"{_number(result.get('validation_loss'), 4)} (best {best})",
        **({} if accuracy is None else {"accuracy": f"{accuracy:.2f} % (top-1)"}),
        "train loss": f"{_number(result.get('train_loss'), 4)} (mean of the last 10 steps)",
        "optimizer state": f"{state_mb} MB ({per_param} bytes a parameter)",
        "optimizer step": f"{_number(result.get('optimizer_ms'), 2)} ms",
        "whole step": f"{_number(result.get('step_ms'), 2)} ms",
        "peak memory": f"{_number(result.get('peak_memory_mb'), 0)} MB",
    }
    return [*lines, *(f"  {name:<16} {value}" for name, value in values.items())]


def estimate_lines(cost: Mapping[str, Any]) -> list[str]:
    """Put what ``nomadam.experiments.estimate.estimate`` gives into a few lines."""
    where = "the whole process" if cost["device"] == "cpu" else f"on {cost['device']}"
    times = "evaluation" if cost["evaluations"] == 1 else "evaluations"
    per_param = cost["state_bytes_per_param"]
    if cost["gradient_mb"] is None:
        gradients, part = "released, one tensor at a time", "with the optimizer"
    else:
        gradients = f"{cost['gradient_mb']:.2f} MB"
        part = f"the optimizer {cost['optimizer_ms']:.2f} ms of it"
    values = {
        "parameters": f"{_parameters(cost)} ({cost['parameter_mb']:.2f} MB)",
        "gradients": gradients,
        "optimizer state": f"{cost['state_mb']:.2f} MB ({per_param:.2f} bytes a parameter)",
        "peak memory": f"{_number(cost['peak_memory_mb'], 0)} MB ({where})",
        "step": f"{cost['step_ms']:.1f} ms ({part})",
        "training": f"about {duration(cost['seconds'])}: {cost['steps']:,} steps, "
        f"{cost['evaluations']:,} {times}",
    }
    return [f"  {name:<16} {value}" for name, value in values.items()]


def _parameters(cost: Mapping[str, Any]) -> str:
    training, everything = cost["num_params"], cost["num_all_params"]
    return f"{training:,}" if training == everything else f"{training:,} of {everything:,} train"


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _number(value: float | None, digits: int, sign: str = "") -> str:
    return NONE if value is None else f"{value:{sign}.{digits}f}"


def plan_line(planned: "Comparison") -> str:
    """Put the arms of a comparison and its folder into a line."""
    labels = planned.labels
    shown = ", ".join(labels if len(labels) <= 6 else [*labels[:5], f"{len(labels) - 5} more"])
    seeds = len(planned.arms) // len(labels)
    times = f"; {seeds} seeds each" if seeds > 1 else ""
    return f"{planned.name}: {shown}{times}\nin {planned.folder}"


def tell_outcome(arm: "Arm", outcome: "ArmOutcome", *, traceback: bool = False) -> None:
    """Say what became of an arm, where its last progress line does not."""
    show_cursor(sys.stderr)
    title, result = arm.title, outcome.result or {}
    words = f"validation loss {_number(result.get('validation_loss'), 3)}"
    if outcome.status == "diverged":
        words = f"diverged at step {result.get('diverged_at_step')}"
    if not outcome.trained:
        say(f"{title}: {words}, trained before")
    elif outcome.error is not None:
        if traceback:
            say(outcome.traceback)
        say(f"{title}: failed: {outcome.error}")
    elif outcome.status == "diverged":
        say(f"{title}: {words}; the comparison goes on")


def show_comparison(
    planned: "Comparison", outcomes: "Sequence[ArmOutcome]", *, as_json: bool
) -> None:
    """Print the table of a comparison, which arms failed and why, and the path of its report."""
    failed = [
        {"label": arm.label, "seed": arm.run.seed, "error": outcome.error}
        for arm, outcome in zip(planned.arms, outcomes, strict=True)
        if outcome.error is not None
    ]
    rows, paths = [], []
    if any((arm.folder / "run.json").exists() for arm in planned.arms):
        notes = [
            f"{each['label']}, seed {each['seed']}: failed: {each['error']}" for each in failed
        ]
        rows, paths = show_report([planned.folder], planned.folder, as_json=as_json, notes=notes)
    if as_json:
        folder = str(planned.folder)
        show_json({"folder": folder, "rows": rows, "failed": failed, "report": paths})


def show_report(
    folders: Sequence[Path], out: Path, *, as_json: bool, notes: Sequence[str] = ()
) -> tuple[list[dict[str, Any]], list[str]]:
    """Print the table, the notes and the report's path; return the table's rows and all paths.

    The table comes before the figures are drawn, which takes longer and may fail.
    """
    from nomadam.reports import summary_rows, write_report
    from nomadam.reports.study_pages import only_studies

    studies = only_studies(folders)
    rows = [] if studies else summary_rows(folders)
    if not as_json:
        for folder in studies:
            show_tables(folder)
        if not studies:
            show_summary(rows)
        for note in notes:
            show(note)
    paths = [str(path) for path in write_report(folders, out)]
    for path in paths:
        if path.endswith(".html") and not as_json:
            show(f"report: {path}")
    return rows, paths


def show_result(folder: Path, result: Mapping[str, Any], *, ended: bool, as_json: bool) -> None:
    """Print how a run ended; whether it had before this command."""
    if as_json:
        show_json({"folder": str(folder), **result})
        return
    if (folder / "tables.json").exists():
        show_tables(folder)
        lines = [str(result["status"])]
    else:
        lines = result_lines(result)
    show("\n".join([*lines, f"  {'run folder':<16} {folder}"]))
    if ended:
        show("it had ended before; --again trains it from the start")


def show_tables(folder: Path) -> None:
    """Print the tables of a study."""
    from nomadam.reports.study_pages import study_tables

    for table in study_tables(folder):
        show(table.title)
        heads = ["\n".join(textwrap.wrap(head, WIDEST_HEAD)) for head in table.heads]
        show_table(heads, table.cells)
        if table.note:
            show(table.note)


def show_estimate(
    folder: Path, run: Mapping[str, Any], cost: Mapping[str, Any] | None, *, as_json: bool
) -> None:
    """Print a whole Run or study, and what it would cost where that is known."""
    if as_json:
        show_json({"folder": str(folder), "run": run, "estimate": cost})
        return
    show_json(run)
    lines = [] if cost is None else estimate_lines(cost)
    show("\n".join([*lines, f"  {'run folder':<16} {folder}"]))


def show_catalog(entries: "Sequence[Entry]", *, as_json: bool) -> None:
    """Print a line a run, whatever the terminal's width, the name first."""
    if as_json:
        show_json([vars(entry) for entry in entries])
        return
    width = max((len(entry.name) for entry in entries), default=0)
    for entry in entries:
        grid = " (a grid, for compare)" if entry.grid else ""
        show(f"{entry.name:<{width}}  {entry.summary}{grid}".rstrip())


def show_estimates(
    planned: "Comparison", costs: Mapping[str, Mapping[str, Any]], *, as_json: bool
) -> None:
    """Print what each arm of a comparison would cost, and all of them together."""
    if as_json:
        show_json({"folder": str(planned.folder), "arms": costs})
        return
    heads = ["arm", "learning\nrate", "steps", "parameters", "state\nMB", "memory\npeak MB", "time"]
    rows = []
    for label, cost in costs.items():
        lr = next(arm.run.optimizer.lr for arm in planned.arms if arm.label == label)
        numbers = [f"{lr:g}", f"{cost['steps']:,}", _parameters(cost)]
        numbers += [f"{cost['state_mb']:.2f}", _number(cost["peak_memory_mb"], 0)]
        rows.append([label, *numbers, duration(cost["seconds"])])
    show_table(heads, rows)
    total = duration(sum(costs[arm.label]["seconds"] for arm in planned.arms))
    show(f"about {total} for {len(planned.arms)} runs, in {planned.folder}")


def show_repetition(source: Path, folder: Path) -> None:
    """Say how a repeated run ended beside the one that it repeats."""
    both = [RunFolder(path) for path in (source, folder)]
    results = [run.read_result() or {} for run in both]
    if not any("validation_loss" in result for result in results):
        return  # of a study: its tables are shown
    losses = [result.get("validation_loss") for result in results]
    hashes = [(run.read_header() or {}).get("data", {}).get("sha256") for run in both]
    say(f"validation loss: {losses[1]} here, {losses[0]} in {source}")
    if hashes[0] != hashes[1]:
        say(f"the data is not the same: sha256 {hashes[1]} here, {hashes[0]} there")
