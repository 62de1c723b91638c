"""The result of a training: one file, written last."""

import math
import statistics
from typing import Any

import torch

from nomadam.experiments.checkpoints import seed_everything
from nomadam.experiments.preparation import Parts
from nomadam.experiments.resources import optimizer_state_bytes


def write_result(parts: Parts, diverged_at: int | None) -> None:
    """Write ``result.json``, and ``gains.json`` for an optimizer that has gains.

    The model's ``finish``, where it has one, is called before; its numbers stand in the result.

    Args:
        parts: of the training, at its end.
        diverged_at: the step whose loss was not finite, None where all were.

    Raises:
        DiskFullError: a training that is started again then writes it.
    """
    metrics = parts.home.metrics()
    numbers = {
        key: [record[key] for record in metrics if record.get(key) is not None]
        for key in ("validation_loss", "train_loss", "optimizer_ms", "step_ms", "peak_memory_mb")
    }
    gains: Any = getattr(parts.optimizer, "gains", None)
    if gains is not None:
        parts.home.write_json("gains.json", {"blocks": _blocks(parts.module, gains())})
    state_bytes = optimizer_state_bytes(parts.optimizer)
    last = metrics[-1]
    stage = parts.first_stage
    first_stage = {} if stage is None else {"first_stage_validation_loss": stage.validation_loss}
    finished = {} if diverged_at is not None else _finish(parts)
    parts.home.write_json(
        "result.json",
        {
            "status": "finished" if diverged_at is None else "diverged",
            "steps": last["step"],
            "validation_loss": last.get("validation_loss"),
            **{key: last[key] for key in last if key.startswith("validation_")},
            "best_validation_loss": min(numbers["validation_loss"], default=None),
            "train_loss": statistics.fmean(numbers["train_loss"][-10:] or [math.nan]),
            "state_bytes": state_bytes,
            "state_bytes_per_param": state_bytes / parts.num_params,
            **parts.sizes,
            "optimizer_ms": statistics.median(numbers["optimizer_ms"] or [math.nan]),
            "step_ms": statistics.median(numbers["step_ms"] or [math.nan]),
            "first_optimizer_ms": metrics[0].get("optimizer_ms"),
            "peak_memory_mb": max(numbers["peak_memory_mb"], default=None),
            "baseline_memory_mb": parts.baseline_memory_mb,
            "seconds": last["seconds"],
            "tokens": last["tokens"],
            "diverged_at_step": diverged_at,
            **first_stage,
            **finished,
        },
    )


def _finish(parts: Parts) -> dict[str, float]:
    """What the model says of the whole training, drawing from generators seeded as the Run is."""
    finish = getattr(parts.run.model, "finish", None)
    if finish is None:
        return {}
    seed_everything(parts.run.seed)
    parts.module.eval()
    with torch.no_grad():
        return finish(parts.module, parts.dataset, parts.home.path)


def _blocks(module: torch.nn.Module, gains: dict[Any, float]) -> dict[str, Any]:
    """Each measured gain with the block that it belongs to."""
    shapes = {name: parameter.shape for name, parameter in module.named_parameters()}
    return {
        str(name): {"gain": gain, "numel": shapes[name].numel(), "shape": list(shapes[name])}
        for name, gain in gains.items()
    }
