"""What a Run would cost: its size, and its duration from a few measured steps."""

import dataclasses
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nomadam.experiments.child_process import run_in_child
from nomadam.experiments.comparison import Arm
from nomadam.experiments.configuration import Run
from nomadam.experiments.preparation import Device
from nomadam.runs import RunFolder
from nomadam.units import num_held_out

MEASURED_STEPS = 4
BYTES = {"fp32": 4, "bf16_autocast": 4, "bf16": 2}


def estimate_arms(
    arms: Sequence[Arm], options: Mapping[str, Any], make_progress: Callable[[str, int], Any]
) -> dict[str, dict[str, Any]]:
    """Estimate each label once, in a fresh process, so that its peak memory is its own.

    Args:
        arms: of a comparison.
        options: keyword arguments of ``estimate``: device, cache.
        make_progress: makes a progress line from label and steps; a picklable callable.

    Returns:
        Label to what ``estimate`` returns.

    Raises:
        ValueError: an arm can not be trained because of what it was given.
        RuntimeError: an arm failed otherwise.
    """
    costs: dict[str, dict[str, Any]] = {}
    for arm in arms:
        if arm.label not in costs:
            outcome = run_in_child(estimate_arm, arm, dict(options), make_progress)
            if outcome.error is not None:
                kind = ValueError if outcome.bad_input else RuntimeError
                raise kind(f"{arm.label}: {outcome.error}")
            costs[arm.label] = outcome.value
    return costs


def estimate_arm(
    arm: Arm, options: Mapping[str, Any], make_progress: Callable[[str, int], Any]
) -> dict[str, Any]:
    """Estimate one arm in this process, with a progress line."""
    with make_progress(f"measuring {arm.label}", MEASURED_STEPS) as progress:
        return estimate(arm.run, progress=progress, **options)


def estimate(
    run: Run,
    *,
    device: Device = "auto",
    cache: Path | None = None,
    progress: Callable[[Mapping[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Train a few steps in a temporary folder and work out what the whole Run would cost.

    One micro-batch a step and one validation batch an evaluation are measured and scaled up;
    the first step, which also makes the optimizer's state, is left out.

    Args:
        run: the Run; it is not started.
        device: as ``train`` takes it.
        cache: folder of prepared data.
        progress: called with the record of each measured step.

    Returns:
        ``num_params`` of those that train, ``num_all_params`` and ``parameter_mb`` of all,
        ``gradient_mb``, ``state_mb``, ``state_bytes_per_param``, ``peak_memory_mb`` (of the
        process, or of the GPU), ``device``, ``step_ms``, ``optimizer_ms`` (None, as
        ``gradient_mb``, where gradients are released), ``steps``, ``evaluations``,
        ``validation_seconds`` of one evaluation, and ``seconds`` of the whole training without
        loading. 1 MB is 10^6 bytes.

    Raises:
        ValueError: what training would raise.
    """
    from nomadam.experiments.training import train

    probe = dataclasses.replace(
        run,
        steps=MEASURED_STEPS,
        accumulation=1,
        evaluate_every=MEASURED_STEPS,
        evaluation_batches=1,
        checkpoint_every=MEASURED_STEPS,
    )
    records: list[Mapping[str, Any]] = []
    ends: list[float] = []

    def measure(record: Mapping[str, Any]) -> None:
        records.append(record)
        ends.append(time.monotonic())
        if progress is not None:
            progress(record)

    with tempfile.TemporaryDirectory(prefix="nomadam-") as folder:
        made = RunFolder(Path(folder, "run"))
        options = {"device": device, "cache": cache, "progress": measure}
        result = train(probe, made.path, first_stage=False, **options)
        data = made.read_json("run.json")["data"]
        environment = made.read_json("environment.json")
    if result["status"] != "finished":
        raise ValueError(
            f"the loss is not finite at step {result['diverged_at_step']} already, so there is "
            f"nothing to estimate; lower optimizer.lr = {run.optimizer.lr:g}"
        )
    step_ms = statistics.median(record["step_ms"] for record in records[1:])
    optimizer_ms = None
    whole_step_ms = step_ms * run.accumulation
    if not run.release_gradients:
        optimizer_ms = statistics.median(record["optimizer_ms"] for record in records[1:])
        whole_step_ms -= optimizer_ms * (run.accumulation - 1)
    # The last record comes after the evaluation of one batch.
    validation = max(0.0, ends[-1] - ends[-2] - records[-1]["step_ms"] / 1e3)
    validation *= validation_batches(run, data)
    evaluations = math.ceil(run.steps / run.evaluate_every)
    num_params = result["num_params"]
    num_all_params = result.get("num_all_params", num_params)
    return {
        "num_params": num_params,
        "num_all_params": num_all_params,
        "parameter_mb": num_all_params * BYTES[run.precision] / 1e6,
        "gradient_mb": None if run.release_gradients else num_params * BYTES[run.precision] / 1e6,
        "state_mb": result["state_bytes"] / 1e6,
        "state_bytes_per_param": result["state_bytes_per_param"],
        "peak_memory_mb": result["peak_memory_mb"],
        "device": environment["device"],
        "step_ms": whole_step_ms,
        "optimizer_ms": optimizer_ms,
        "steps": run.steps,
        "evaluations": evaluations,
        "validation_seconds": validation,
        "seconds": run.steps * whole_step_ms / 1e3 + evaluations * validation,
    }


def validation_batches(run: Run, data: Mapping[str, Any]) -> int:
    """Number of batches of one evaluation; where the data does not tell its size, at least 1."""
    rows = (num_held_out(data) or 0) // run.data.tokens_per_row
    rows *= getattr(run.data, "draws", 1)  # a noised image is held out so many times
    whole = max(1, math.ceil(rows / run.batch_size))
    if run.evaluation_batches is None:
        return whole
    return min(whole, run.evaluation_batches) if rows else run.evaluation_batches
