"""The cost of the first step, which makes the state and measures the gains, and of measuring."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from nomadam.experiments.cost.bytes_held import (
    available_bytes,
    release_memory,
    sessions_that_fit,
)
from nomadam.experiments.cost.contenders import REFERENCE, Contender
from nomadam.experiments.cost.models import Tensors, in_memory
from nomadam.experiments.cost.timing import Tell, quartiles, quiet, silent, started, step_ms


def measure_first_steps(
    make: Callable[[], Tensors],
    contenders: Sequence[Contender],
    device: torch.device,
    *,
    repeats: int = 5,
    tell: Tell = silent,
) -> dict[str, Any]:
    """Times the first steps of fresh optimizers in turn, and measuring alone where gains are.

    All code is warm: each contender has stepped before, on other state, which was given back to
    the system. So a first step is the memory that it asks for, the gains, and an ordinary step.

    Args:
        make: one of `nomadam.experiments.cost.models.MODELS`.
        contenders: the first is torch's fused SGD, with whose own first step they are compared.
        device: where to measure.
        repeats: how often.
        tell: takes a line of progress.

    Returns:
        ``rows`` by name, and ``skipped``: reason by name. A row has ``first_step_ms``,
        ``later_step_ms``, ``ratio`` (to the reference's first step in the same repeat); where
        there are gains also ``measuring_step_ms``, a step with the state in place that measures
        all gains anew, and ``measuring_ratio``, what it takes beyond a later step, over a later
        step. All as median, q1 and q3.
    """
    with torch.device("meta"):
        numel = make().numel
    sessions, skipped = sessions_that_fit(numel, contenders, available_bytes(device))
    if REFERENCE in skipped:
        return {"rows": {}, "skipped": skipped}
    beside = {each.name for session in sessions if session[0].name == REFERENCE for each in session}
    fitting = [each for each in contenders if each.name in beside]
    for each in contenders:
        if each.name not in beside | set(skipped):
            skipped[each.name] = "does not fit in memory beside the reference"
    modules = {kind: in_memory(make, device, kind) for kind in {c.weights for c in fitting}}
    records: dict[str, list[dict[str, float]]] = {}
    for each in fitting:
        made, _ = started(each, modules[each.weights], device)
        if isinstance(made, str):
            skipped[each.name] = made
        else:
            records[each.name] = []
        del made
    for repeat in range(repeats):
        tell(f"repeat {repeat + 1} of {repeats}")
        for each in fitting:
            if each.name in records:
                release_memory(device)
                records[each.name].append(_first_steps(each, modules[each.weights], device))
    reference = [record["first_step_ms"] for record in records[REFERENCE]]
    labels = {each.name: each.label for each in fitting}
    rows = {name: _row(labels[name], own, reference) for name, own in records.items()}
    return {"rows": rows, "skipped": skipped}


def _first_steps(contender: Contender, module: Tensors, device: torch.device) -> dict[str, float]:
    with quiet():
        optimizer = contender.make(module)
    found = {"first_step_ms": step_ms(optimizer, device)}
    laters = [step_ms(optimizer, device) for _ in range(3)]
    found["later_step_ms"] = sorted(laters)[1]
    if forget_gains(optimizer):
        found["measuring_step_ms"] = step_ms(optimizer, device)
    return found


def forget_gains(optimizer: Optimizer) -> bool:
    """Sets all gains to "not measured", so that the next step measures; whether there were any."""
    gains = [state["gsnr"] for state in optimizer.state.values() if "gsnr" in state]
    ours = type(optimizer).__module__.startswith("nomadam.")
    if not ours or not gains:
        return False
    for gain in gains:
        gain.zero_()
    return True


def _row(
    label: str, own: Sequence[Mapping[str, float]], reference: Sequence[float]
) -> dict[str, Any]:
    row: dict[str, Any] = {"label": label, "repeats": len(own)}
    for key in own[0]:
        row[key] = quartiles([record[key] for record in own])
    ratios = [r["first_step_ms"] / other for r, other in zip(own, reference, strict=True)]
    row["ratio"] = quartiles(ratios)
    if "measuring_step_ms" in own[0]:
        beyond = [(r["measuring_step_ms"] - r["later_step_ms"]) / r["later_step_ms"] for r in own]
        row["measuring_ratio"] = quartiles(beyond)
    return row
