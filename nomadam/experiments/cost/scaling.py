"""How a step's time grows with the number of parameters, and with the number of tensors."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from nomadam.experiments.cost.bytes_held import available_bytes, release_memory, sessions_that_fit
from nomadam.experiments.cost.contenders import Contender
from nomadam.experiments.cost.models import equal, in_memory
from nomadam.experiments.cost.timing import (
    Tell,
    in_turn,
    quartiles,
    silent,
    started,
    step_ms,
)


def measure_growth(
    sizes: Sequence[tuple[int, int]],
    contenders: Sequence[Contender],
    device: torch.device,
    *,
    rounds: int = 10,
    seconds: float = 3.0,
    tell: Tell = silent,
) -> dict[str, Any]:
    """Step times over models of equal matrices.

    Args:
        sizes: number of parameters and number of tensors of each model.
        contenders: in turn at each size; where memory does not hold all, the first and some others.
        device: where to measure.
        rounds: steps of each at each size, ten times as many where they take under 5 ms.
        seconds: a slower contender is stepped fewer times: about so long, but 3 times at least.
        tell: takes a line of progress.

    Returns:
        ``rows``: ``name``, ``num_params``, ``num_tensors`` and ``step_ms`` as median, q1 and q3;
        ``skipped``: reason by contender and size.
    """
    rows: list[dict[str, Any]] = []
    skipped: dict[str, str] = {}
    for numel, count in sizes:
        place = f"{numel:,} parameters in {count:,} tensors"
        tell(place)
        sessions, failed = sessions_that_fit(numel, contenders, available_bytes(device))
        found: dict[str, Any] = {}
        for session in sessions:
            measured, more = _at_size(numel, count, session, device, rounds, seconds)
            found = measured | found
            failed |= more
            release_memory(device)
        rows += found.values()
        skipped |= {f"{name}, {place}": reason for name, reason in failed.items()}
    return {"rows": rows, "skipped": skipped}


def _at_size(
    numel: int,
    count: int,
    contenders: Sequence[Contender],
    device: torch.device,
    rounds: int,
    seconds: float,
) -> tuple[dict[str, Any], dict[str, str]]:
    make = partial(equal, numel=numel, count=count)
    modules = {kind: in_memory(make, device, kind) for kind in {c.weights for c in contenders}}
    steps, turns, failed = {}, {}, {}
    for each in contenders:
        optimizer, second = started(each, modules[each.weights], device)
        if isinstance(optimizer, str):
            failed[each.name] = optimizer
            continue
        steps[each.name] = partial(step_ms, optimizer, device)
        most = 10 * rounds if second < 5.0 else rounds
        turns[each.name] = min(most, max(3, int(seconds * 1e3 / second)))
    times = in_turn(steps, turns) if steps else []
    rows = {
        each.name: {
            "name": each.name,
            "label": each.label,
            "num_params": next(iter(modules.values())).numel,
            "num_tensors": count,
            "step_ms": quartiles([row[each.name] for row in times if each.name in row]),
        }
        for each in contenders
        if each.name in steps
    }
    return rows, failed
