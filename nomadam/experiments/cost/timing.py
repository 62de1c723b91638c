"""Step times taken in turn: every round steps each contender once, so all meet the same machine."""

import contextlib
import gc
import io
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch.optim import Optimizer

from nomadam.experiments.cost.bytes_held import (
    available_bytes,
    release_memory,
    sessions_that_fit,
    state_bytes,
)
from nomadam.experiments.cost.contenders import REFERENCE, Contender
from nomadam.experiments.cost.models import Tensors, in_memory
from nomadam.experiments.resources import synchronize

LARGE = 300_000_000  # parameters
COPY = "copy"
Tell = Callable[[str], None]
Round = dict[str, float]


def silent(line: str) -> None:
    """Tells nobody."""


def measure_steps(
    make: Callable[[], Tensors],
    contenders: Sequence[Contender],
    device: torch.device,
    *,
    rounds: int = 20,
    seconds: float = 10.0,
    tell: Tell = silent,
) -> dict[str, Any]:
    """Step times of the contenders that fit, their ratios to the first, and their traffic.

    Args:
        make: one of `nomadam.experiments.cost.models.MODELS`.
        contenders: the first is the one that ratios are taken to; it is in every session that has
            memory for it, and what fits only without it has no ratio.
        device: where to measure.
        rounds: how often each is stepped, after two steps that do not count.
        seconds: a slower contender is stepped fewer times: about so long, but 2 times at least.
        tell: takes a line of progress.

    Returns:
        ``num_params``, ``num_tensors``, ``copy_gb_s`` (read and written), ``rows`` by name, and
        ``skipped``: reason by name. A row is that of `row_of`.
    """
    with torch.device("meta"):
        shapes = make()
    skipped = {}
    if device.type == "cpu" and shapes.numel > LARGE:
        slow = [each.name for each in contenders if each.slow_on_cpu]
        skipped = dict.fromkeys(slow, "takes minutes on a CPU at this size")
    chosen = [each for each in contenders if each.name not in skipped]
    sessions, too_large = sessions_that_fit(shapes.numel, chosen, available_bytes(device))
    skipped |= too_large
    rows: dict[str, Any] = {}
    speeds: list[float] = []
    for number, session in enumerate(sessions, 1):
        tell(f"session {number} of {len(sessions)}: {', '.join(each.name for each in session)}")
        found, failed, copies = _measure_session(make, session, device, rounds, seconds, tell)
        rows |= {name: row for name, row in found.items() if name not in rows}
        skipped |= failed
        speeds += copies
        release_memory(device)
    return {
        "num_params": shapes.numel,
        "num_tensors": len(list(shapes.parameters())),
        "copy_gb_s": quartiles(speeds) if speeds else None,
        "rows": rows,
        "skipped": skipped,
    }


def _measure_session(
    make: Callable[[], Tensors],
    contenders: Sequence[Contender],
    device: torch.device,
    rounds: int,
    seconds: float,
    tell: Tell,
) -> tuple[dict[str, Any], dict[str, str], list[float]]:
    """Rows, reasons of those that failed, and copy speeds; its tensors end with it."""
    modules = {kind: in_memory(make, device, kind) for kind in {c.weights for c in contenders}}
    optimizers: dict[str, Optimizer] = {}
    turns: dict[str, int] = {COPY: rounds}
    failed: dict[str, str] = {}
    for each in contenders:
        made, second = started(each, modules[each.weights], device)
        if isinstance(made, str):
            failed[each.name] = made
            tell(f"{each.name}: skipped: {made}")
        else:
            optimizers[each.name] = made
            turns[each.name] = min(rounds, max(2, int(seconds * 1e3 / second)))
            tell(f"{each.name}: {second:.2f} ms, {turns[each.name]} rounds")
    if REFERENCE in failed:
        raise RuntimeError(f"{REFERENCE}: {failed[REFERENCE]}")
    if not optimizers:
        return {}, failed, []
    source, target = copy_buffers(device)
    steps = {name: partial(step_ms, made, device) for name, made in optimizers.items()}
    steps[COPY] = partial(copy_ms, source, target, device)
    times = in_turn(steps, turns)
    speeds = [2e-6 * source.nbytes / each[COPY] for each in times if COPY in each]
    rows = {
        each.name: row_of(each, optimizers[each.name], modules[each.weights], times)
        for each in contenders
        if each.name in optimizers
    }
    copied = 2 * source.nbytes
    for row in rows.values():
        if (moved := row["bytes_moved"]) is not None:
            shares = [moved / each[row["name"]] / (copied / each[COPY]) for each in times
                      if row["name"] in each]  # fmt: skip
            row["share_of_copy"] = statistics.median(shares)
    return rows, failed, speeds


def row_of(
    contender: Contender, optimizer: Optimizer, module: Tensors, times: Sequence[Round]
) -> dict[str, Any]:
    """What the tables say of one contender.

    Args:
        contender: which.
        optimizer: as it stands after its steps.
        module: its weights and gradients.
        times: milliseconds by name in each round.

    Returns:
        ``name``, ``label``, ``weights`` and ``state`` (dtypes), ``step_ms`` and ``ratio`` (to the
        reference, None without it) as median, q1 and q3, ``state_bytes_per_param``, and
        ``bytes_moved``: weights and state read and written and the gradient read, None where that
        is not what the step has to do; ``share_of_copy`` None; ``rounds_ms``, the times
        themselves, from the first round on.
    """
    own = [each for each in times if contender.name in each]
    ratios = [each[contender.name] / each[REFERENCE] for each in own if REFERENCE in each]
    held = state_bytes(optimizer)
    moved = 3 * module.numel * contender.weights.itemsize + 2 * held
    return {
        "name": contender.name,
        "label": contender.label,
        "weights": str(contender.weights).removeprefix("torch."),
        "state": contender.state,
        "step_ms": quartiles([each[contender.name] for each in own]),
        "ratio": quartiles(ratios) if ratios else None,
        "state_bytes_per_param": held / module.numel,
        "bytes_moved": moved if contender.one_pass else None,
        "share_of_copy": None,
        "rounds_ms": [each[contender.name] for each in own],
    }


def started(
    contender: Contender, module: Tensors, device: torch.device
) -> tuple[Optimizer | str, float]:
    """An optimizer after the two steps that do not count, and the second one's milliseconds.

    Where it can not be had, or not here, the reason in its place.
    """
    try:
        with quiet():
            optimizer = contender.make(module)
        step_ms(optimizer, device)
        return optimizer, step_ms(optimizer, device)
    except Exception as error:
        return reason_of(error), 0.0


def reason_of(error: Exception) -> str:
    r"""The first line of an error, with its kind.

    Example:
        >>> reason_of(ImportError("no module\nmore"))
        'ImportError: no module'
    """
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first[:200]}".removesuffix(": ")


def in_turn(
    steps: Mapping[str, Callable[[], float]], turns: Mapping[str, int] | int
) -> list[Round]:
    """Calls each step once a round, each round beginning with another, and keeps what it returned.

    Args:
        steps: by name.
        turns: in how many rounds a name takes part: the first ones.

    Example:
        >>> in_turn({"a": lambda: 1.0, "b": lambda: 2.0}, {"a": 2, "b": 1})
        [{'a': 1.0, 'b': 2.0}, {'a': 1.0}]
    """
    names = list(steps)
    counts = dict.fromkeys(names, turns) if isinstance(turns, int) else turns
    rounds = []
    collects = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for number in range(max(counts.values())):
            first = number % len(names)
            order = [n for n in names[first:] + names[:first] if number < counts[n]]
            rounds.append({name: steps[name]() for name in order})
    finally:
        if collects:
            gc.enable()
    return rounds


def step_ms(optimizer: Optimizer, device: torch.device) -> float:
    """Milliseconds of one step until the device has done it."""
    with quiet():
        synchronize(device)
        start = time.perf_counter()
        optimizer.step()
        synchronize(device)
        return 1e3 * (time.perf_counter() - start)


def copy_buffers(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Two buffers that no cache holds, for `copy_ms`."""
    numel = 2**28 if device.type == "cuda" else 2**26
    return torch.ones(numel, device=device), torch.zeros(numel, device=device)


def copy_ms(source: torch.Tensor, target: torch.Tensor, device: torch.device) -> float:
    """Milliseconds of one copy, by torch on all its threads."""
    synchronize(device)
    start = time.perf_counter()
    target.copy_(source)
    synchronize(device)
    return 1e3 * (time.perf_counter() - start)


class quiet(contextlib.ExitStack):  # noqa: N801
    """Throws away what rivals print and warn of while they step."""

    def __enter__(self) -> "quiet":
        """Opens it."""
        self.enter_context(contextlib.redirect_stdout(io.StringIO()))
        self.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        return self


def quartiles(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles.

    Example:
        >>> quartiles([4.0, 1.0, 2.0, 3.0])
        {'median': 2.5, 'q1': 1.75, 'q3': 3.25}
    """
    if len(values) == 1:
        return dict.fromkeys(("median", "q1", "q3"), values[0])
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "q1": q1, "q3": q3}
