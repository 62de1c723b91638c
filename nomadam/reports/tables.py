"""The tables of a report: plain rows, and the same as Markdown."""

import html
import re
import statistics
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from nomadam.reports.arms import Arm, Comparison, read_comparison, short_value

MB = 1e6
LONGEST_CELL = 300
DASH = "–"
# Final numbers beside the loss: key in result.json, head, factor and digits of the column.
MEASURES = (
    ("validation_accuracy", "accuracy, %", 100.0, 2),
    ("bleu", "BLEU", 1.0, 1),
    ("rouge_l", "ROUGE-L", 1.0, 1),
    ("recognised", "samples recognised, %", 100.0, 1),
    ("frechet_distance", "Fréchet distance", 1.0, 2),
)
# Scores of fewer texts are no measure of anything.
FEWEST_TEXTS = 10
# With more arms the table of results is of the best ones, and all arms stand further below.
LONGEST_RESULTS = 24


def summary_rows(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """Return one plain row an arm, in order, with numbers that are not rounded.

    The keys: `label`, `optimizer`, `lr`, `is_reference`, `reference` (its label, or None),
    `num_seeds`, `num_finished`, `num_diverged`, `num_unfinished`, `validation_loss` (mean over
    the finished seeds) and `validation_loss_sd` (unbiased; None below two); likewise, with the
    same ending, `validation_accuracy` and `recognised` (0 to 1), `bleu` and `rouge_l` (0 to 100)
    and `frechet_distance`; `difference` to the reference and `difference_sd`, `state_bytes`,
    `state_mb` (1 MB = 10^6 bytes), `state_bytes_per_param`, `state_ratio` to the reference,
    `optimizer_ms` (median over a run's steps, then over the seeds), `peak_memory_mb` (largest of
    the seeds), `status` in words. What is not known is None.

    Args:
        folders: run folders and comparison folders.

    Raises:
        ValueError: see `nomadam.reports.arms.read_comparison`.
    """
    return rows_of(read_comparison([Path(folder) for folder in folders]))


def rows_of(comparison: Comparison) -> list[dict[str, Any]]:
    """Return the rows of `summary_rows` for a comparison that has been read already."""
    return [_row(arm, comparison.reference) for arm in comparison.arms]


def _row(arm: Arm, reference: Arm | None) -> dict[str, Any]:
    loss, loss_sd = mean_and_sd(arm.losses().values())
    measures = {}
    for key, *_ in MEASURES:
        measures[key], measures[f"{key}_sd"] = mean_and_sd(scores(arm, key).values())
    difference, difference_sd = _difference(arm, reference)
    state_bytes, per_param = _state(arm)
    other = _state(reference)[0] if reference else None
    return {
        "label": arm.label,
        "optimizer": arm.optimizer,
        "lr": arm.lr,
        "is_reference": arm is reference,
        "reference": reference.label if reference else None,
        "num_seeds": len(arm.runs),
        "num_finished": len(arm.with_status("finished")),
        "num_diverged": len(arm.with_status("diverged")),
        "num_unfinished": len(arm.with_status("unfinished")),
        "validation_loss": loss,
        "validation_loss_sd": loss_sd,
        **measures,
        "difference": difference,
        "difference_sd": difference_sd,
        "state_bytes": state_bytes,
        "state_mb": None if state_bytes is None else state_bytes / MB,
        "state_bytes_per_param": per_param,
        "state_ratio": state_bytes / other if state_bytes is not None and other else None,
        "optimizer_ms": _reduced(statistics.median, arm.values("optimizer_ms")),
        "peak_memory_mb": _reduced(max, arm.values("peak_memory_mb")),
        "status": _status(arm),
    }


def scores(arm: Arm, key: str) -> dict[Any, float]:
    """Return seed -> final number under `key`, without scores of a handful of texts."""
    found = arm.finals(key)
    if key not in ("bleu", "rouge_l"):
        return found
    texts = arm.finals("judged_texts")
    return {
        seed: value
        for seed, value in found.items()
        if texts.get(seed, FEWEST_TEXTS) >= FEWEST_TEXTS
    }


def mean_and_sd(values: Collection[float]) -> tuple[float | None, float | None]:
    """Return mean and unbiased standard deviation, None for each that there is none of.

    Example:
        >>> mean_and_sd([1.0, 3.0]), mean_and_sd([2.0]), mean_and_sd([])
        ((2.0, 1.4142135623730951), (2.0, None), (None, None))
    """
    mean = statistics.fmean(values) if values else None
    return mean, statistics.stdev(values) if len(values) > 1 else None


def _reduced(reduce: Any, values: list[float]) -> float | None:
    return reduce(values) if values else None


def _state(arm: Arm) -> tuple[float | None, float | None]:
    state_bytes = _reduced(max, arm.values("state_bytes"))
    num_params = arm.runs[0].num_params
    if state_bytes is not None and num_params:
        return state_bytes, state_bytes / num_params
    return state_bytes, _reduced(max, arm.values("state_bytes_per_param"))


def _difference(arm: Arm, reference: Arm | None) -> tuple[float | None, float | None]:
    if reference is None or arm is reference:
        return None, None
    ours, theirs = arm.losses(), reference.losses()
    # A seed gives both arms the same batches, so that seeds are compared in pairs where they can.
    paired = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
    if len(paired) > 1 and len(paired) == len(ours) == len(theirs):
        return statistics.fmean(paired), statistics.stdev(paired)
    if not ours or not theirs:
        return None, None
    return statistics.fmean(ours.values()) - statistics.fmean(theirs.values()), None


def _status(arm: Arm) -> str:
    run, *others = arm.runs
    if others:
        counts = ((len(arm.with_status(s)), s) for s in ("finished", "diverged", "unfinished"))
        return ", ".join(f"{count} {status}" for count, status in counts if count)
    if run.status == "diverged":
        step = run.result.get("diverged_at_step")
        return "diverged" if step is None else f"diverged at step {short_value(step)}"
    if run.status == "unfinished":
        steps = run.configuration.get("steps")
        return f"unfinished, at step {run.last_step}" + (f" of {steps}" if steps else "")
    return "finished"


def fixed(value: float | None, digits: int, *, signed: bool = False) -> str:
    """Return `value` with `digits` decimals, a true minus sign, and a dash for None.

    Example:
        >>> fixed(-0.1781, 3, signed=True), fixed(None, 2)
        ('−0.178', '–')
    """
    if value is None:
        return DASH
    return f"{value:{'+' if signed else ''}.{digits}f}".replace("-", "\u2212")


def with_sd(value: float | None, sd: float | None, *, digits: int = 3, signed: bool = False) -> str:
    """Return a mean, followed by ± its standard deviation where there is one.

    Example:
        >>> with_sd(5.3182, 0.0121), with_sd(95.26, None, digits=1)
        ('5.318 ± 0.012', '95.3')
    """
    text = fixed(value, digits, signed=signed)
    return text if value is None or sd is None else f"{text} ± {fixed(sd, digits)}"


def milliseconds(value: float | None) -> str:
    """Return a duration in ms with about three digits."""
    return DASH if value is None else fixed(value, 2 if value < 10 else 1 if value < 100 else 0)


def size(value: float | None) -> str:
    """Return a size in MB with about three digits."""
    return DASH if value is None else fixed(value, 2 if value < 100 else 0)


def summary_cells(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Return the heads and the texts of the summary table, not escaped, the units in the heads.

    Without a reference the two columns that relate to it are left out, and of `MEASURES` those
    that no arm has.
    """
    columns = {
        "arm": [row["label"] for row in rows],
        "seeds": [str(row["num_seeds"]) for row in rows],
        "validation loss": [
            with_sd(row["validation_loss"], row["validation_loss_sd"]) for row in rows
        ],
        **{
            head: [_scaled(row, key, factor, digits) for row in rows]
            for key, head, factor, digits in MEASURES
            if any(row.get(key) is not None for row in rows)
        },
        "difference": [
            "reference"
            if row["is_reference"]
            else with_sd(row["difference"], row["difference_sd"], signed=True)
            for row in rows
        ],
        "state, MB": [size(row["state_mb"]) for row in rows],
        "state, bytes/param": [fixed(row["state_bytes_per_param"], 2) for row in rows],
        "state relative": [
            DASH if row["state_ratio"] is None else f"{fixed(row['state_ratio'], 2)}×"
            for row in rows
        ],
        "optimizer step, ms": [milliseconds(row["optimizer_ms"]) for row in rows],
        "peak memory, MB": [fixed(row["peak_memory_mb"], 0) for row in rows],
        "status": [row["status"] for row in rows],
    }
    reference = rows[0]["reference"] if rows else None
    related = ("difference", "state relative")
    kept = [head for head in columns if reference is not None or head not in related]
    heads = [f"{head} to {reference}" if head in related else head for head in kept]
    return heads, [list(cells) for cells in zip(*(columns[head] for head in kept), strict=True)]


def _scaled(row: dict[str, Any], key: str, factor: float, digits: int) -> str:
    value, sd = row.get(key), row.get(f"{key}_sd")
    return with_sd(value and factor * value, sd and factor * sd, digits=digits)


def explanation(rows: list[dict[str, Any]]) -> str:
    """Return what the columns of the summary table mean, in a paragraph of plain text."""
    text = (
        "Validation loss: after the last step, on the held-out split; mean over the finished "
        "seeds, ± one standard deviation where there are several; other scores likewise. State: "
        "what the optimizer keeps between steps; 1 MB = 10⁶ bytes. Optimizer step: median over the "
        "steps. Peak memory: the largest of the seeds, of the device where there is one, else of "
        "the whole process."
    )
    if any(row["difference_sd"] is not None for row in rows):
        text += " Differences are taken seed by seed."
    if any(row["num_diverged"] or row["num_unfinished"] for row in rows):
        text += " Diverged and unfinished runs are counted under status and are in no mean."
    return text


def difference_cells(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Return heads and texts of the configuration fields that differ, a row an arm."""
    fields = comparison.differing_fields()
    heads = ["arm", "seeds", *fields]
    cells = []
    for arm in comparison.arms:
        seeds = ", ".join(short_value(run.seed) for run in arm.runs)
        values = [
            short_value(arm.configuration[key]) if key in arm.configuration else ""
            for key in fields
        ]
        cells.append([arm.label, seeds, *map(_shortened, values)])
    return heads, cells


def common_cells(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Return heads and texts of the configuration that all arms have in common, and the data."""
    fields = dict(comparison.common_fields())
    first = comparison.runs[0]
    if first.num_params is not None and len({r.num_params for r in comparison.runs}) == 1:
        fields["parameters"] = f"{first.num_params:,.0f}"
    for key, value in first.data.items():
        # `data.source` stands in the configuration already; the description adds what was found.
        if all(run.data.get(key) == value for run in comparison.runs):
            fields.setdefault(f"data.{key}", value)
    return ["field", "value"], [[k, _shortened(short_value(v))] for k, v in fields.items()]


def environment_cells(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Return heads and texts of the environment; where arms differ, each value with its arms."""
    keys = dict.fromkeys(key for run in comparison.runs for key in run.environment)
    cells = []
    for key in keys:
        arms_of: dict[str, list[str]] = {}
        for arm in comparison.arms:
            for run in arm.runs:
                value = _shortened(short_value(run.environment.get(key)))
                arms_of.setdefault(value, []).append(arm.label)
        if len(arms_of) == 1:
            cells.append([key, next(iter(arms_of))])
            continue
        cells.extend(
            [f"{key} ({', '.join(dict.fromkeys(labels))})", value]
            for value, labels in arms_of.items()
        )
    return ["field", "value"], cells


def _shortened(text: str) -> str:
    return text if len(text) <= LONGEST_CELL else f"{text[:LONGEST_CELL]}… ({len(text)} characters)"


def markdown_text(text: str) -> str:
    r"""Escape `text` so that Markdown and HTML show it and obey none of it.

    Example:
        >>> print(markdown_text("a|b <img> sgd_sai *x*"))
        a\|b &lt;img&gt; sgd_sai \*x\*
    """
    text = html.escape(" ".join(text.split()), quote=False)
    text = re.sub(r"([\\`*|\[\]!~$])", r"\\\1", text)
    # An underscore inside a word is no emphasis and stays as it is.
    return re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\_", text)


def markdown_table(heads: list[str], cells: list[list[str]], *, left: Sequence[int] = (0,)) -> str:
    """Return a Markdown table, the columns in `left` set left and the others right."""
    lines = [heads, ["---" if i in left else "---:" for i in range(len(heads))]]
    body = [[markdown_text(cell) for cell in row] for row in cells]
    lines = [[markdown_text(head) for head in heads], lines[1], *body]
    return "\n".join(f"| {' | '.join(row)} |" for row in lines) + "\n"


def markdown(rows: list[dict[str, Any]]) -> str:
    """Return the rows of `summary_rows` as a Markdown table, escaped, and rounded for reading."""
    heads, cells = summary_cells(rows)
    return markdown_table(heads, cells, left=(0, len(heads) - 1))
