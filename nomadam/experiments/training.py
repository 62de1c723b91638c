"""The one training loop: from a Run to a run folder, exactly repeatable and resumable."""

import contextlib
import functools
import math
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from nomadam.experiments import processes
from nomadam.experiments.checkpoints import random_state, restore_random_state, write_checkpoint
from nomadam.experiments.configuration import Run, differing_fields, to_json
from nomadam.experiments.event_files import event_files, summary_writer
from nomadam.experiments.first_stage import complete_first_stage
from nomadam.experiments.interruption import StopSignals
from nomadam.experiments.preparation import (
    Device,
    Parts,
    check_optimizer,
    check_second_stage,
    make_accelerator,
    prepare,
)
from nomadam.experiments.resources import peak_memory_mb, reset_peak_memory, synchronize
from nomadam.experiments.results import write_result
from nomadam.runs import Interrupted, RunFolder
from nomadam.units import unit_of


def train(
    run: Run,
    folder: str | Path,
    *,
    device: Device = "auto",
    cache: str | Path | None = None,
    progress: Callable[[Mapping[str, Any]], None] | None = None,
    again: bool = False,
    tensorboard: bool = False,
    first_stage: bool = True,
    observe: Callable[[Parts, int], None] | None = None,
) -> dict[str, Any]:
    """Train as a Run says, in a run folder, going on from what the folder holds.

    A folder with a result is left as it is and its result returned. One with a checkpoint of the
    same Run goes on from there, and ends with the weights and metrics of a training that was never
    stopped, bit for bit on a CPU with the same number of threads. Where the Run starts from the
    weights of another one, its first stage, that one's folder is looked for beside this one, and
    trained there first where it is missing or unfinished.

    Started by torchrun or accelerate launch, all processes train together, each on its rows of
    every batch; the first one writes, into a folder that all of them can read.

    Args:
        run: what to train.
        folder: the run folder; made where it is missing.
        device: ``auto`` takes CUDA, else MPS, else the CPU.
        cache: folder for prepared data; default the user's cache folder.
        progress: called with the record of each step, as it stands in ``metrics.jsonl``, and with
            the ``unit`` of its tokens; of several processes only in the first.
        again: train from the beginning though the folder holds this Run already.
        tensorboard: write TensorBoard event files as well.
        first_stage: False starts from fresh weights in any case, to measure the cost alone.
        observe: called with the parts and the step when its gradient lies in the parameters, before
            it is clipped; it has to leave them and the random generators as they are, and its time
            is not counted.

    Returns:
        The content of ``result.json``; its ``status`` is ``finished``, or ``diverged`` where a loss
        was not finite, which ends the training.

    Raises:
        ValueError: for data, an optimizer or a device that can not be had.
        RunFolderError: a ValueError: the folder holds another Run (`AnotherRunError`) or data that
            have changed since, is in use (`FolderInUseError`), or is damaged.
        DiskFullError: an OSError; the earlier checkpoints are intact.
        Interrupted: a KeyboardInterrupt, after SIGINT or SIGTERM; the checkpoint is written.
        ImportError: an optional library is missing; the message names the extra to install.

    Example:
        >>> import tempfile
        >>> from nomadam.experiments.configuration import override
        >>> from nomadam.experiments.gpt2_pretraining import demo
        >>> tiny = {"steps": 2, "model.layers": 1, "data.max_bytes": 200_000, "batch_size": 2}
        >>> run = override(demo(), {**tiny, "evaluation_batches": 1, "data.vocab_size": 300})
        >>> result = train(run, tempfile.mkdtemp(), device="cpu")
        >>> result["status"], result["tokens"]
        ('finished', 256)
    """
    home = RunFolder(folder)
    home.check_run(to_json(run), differing_fields)
    if not again and (result := home.read_result()) is not None:
        return result
    check_optimizer(run)
    if tensorboard:
        summary_writer()
    accelerator = make_accelerator(run, device)
    before = random_state()
    with contextlib.ExitStack() as stack:
        stack.callback(restore_random_state, before)
        if accelerator.is_main_process:
            stack.enter_context(home.locked())
        try:
            stage = None
            if first_stage:
                options = {"device": device, "cache": cache, "progress": progress}
                check = functools.partial(check_second_stage, run, cache=cache)
                stage = complete_first_stage(run, home, accelerator, train, check, **options)
            if stage is not None:
                accelerator = make_accelerator(run, device)  # its training had one of its own
            parts = prepare(run, home, accelerator, cache, again, stage)
            with StopSignals() as stop:
                diverged_at = _loop(parts, stop, progress, tensorboard, observe)
            if accelerator.is_main_process:
                write_result(parts, diverged_at)
        except Interrupted:
            raise
        except KeyboardInterrupt:
            kept = home.newest_checkpoint()
            raise Interrupted(home.path, kept[0] if kept else 0, run.steps, "SIGINT") from None
        accelerator.wait_for_everyone()
        return home.read_json("result.json")


def _loop(
    parts: Parts,
    stop: StopSignals,
    progress: Callable[[Mapping[str, Any]], None] | None,
    tensorboard: bool,
    observe: Callable[[Parts, int], None] | None,
) -> int | None:
    """Train to the last step; return the step at which it diverged, None where it did not."""
    run, home, optimizer = parts.run, parts.home, parts.optimizer
    device = parts.accelerator.device
    if parts.step < run.steps:  # else the weights stay those that were evaluated
        parts.model.train()
        _set_mode(optimizer, "train")
    tokens_a_step = run.batch_size * run.accumulation * run.data.tokens_per_row
    unit = unit_of(parts.dataset.description)
    wanted = tensorboard and parts.is_main
    with event_files(
        home.path / "tensorboard", first_step=parts.step + 1, wanted=wanted
    ) as write_events:
        reset_peak_memory(device)
        for step in range(parts.step + 1, run.steps + 1):
            synchronize(device)
            began = time.perf_counter()
            factor = run.schedule.factor(step, run.steps)
            _set_lrs(optimizer, [lr * factor for lr in parts.peak_lrs])
            train_loss = processes.summed(_gradient(parts, step).item(), device)
            record: dict[str, Any] = {
                "step": step,
                "tokens": step * tokens_a_step,
                "seconds": parts.seconds,
                "train_loss": train_loss,
                "lr": run.optimizer.lr * factor,
                **dict.fromkeys(("grad_norm", "step_ms", "optimizer_ms", "peak_memory_mb")),
            }
            diverged = not math.isfinite(train_loss)
            if not diverged:
                if observe is not None:
                    began += _seconds_of(observe, parts, step)
                record["grad_norm"] = _clip(parts)
                synchronize(device)
                ready = time.perf_counter()
                optimizer.step()
                synchronize(device)
                ended = time.perf_counter()
                optimizer.zero_grad(set_to_none=True)
                parts.seconds += ended - began
                record["seconds"] = parts.seconds
                record["step_ms"] = (ended - began) * 1e3
                if parts.release is None:  # else the step is a part of the backward
                    record["optimizer_ms"] = (ended - ready) * 1e3
                record["peak_memory_mb"] = peak_memory_mb(device)
                if step % run.evaluate_every == 0 or step == run.steps:
                    record |= _evaluate(parts, last=step == run.steps)
                    diverged = not math.isfinite(record["validation_loss"])
            parts.step = step
            if parts.is_main:
                home.append_metrics(record)
                write_events(record)
                if progress is not None:
                    progress({**record, "unit": unit})
            if diverged:
                return step
            stopped = processes.summed(float(stop.requested), device) > 0
            if step % run.checkpoint_every == 0 or step == run.steps or stopped:
                _save(parts)
            if stopped and step < run.steps:
                raise Interrupted(home.path, step, run.steps, stop.signal_name)
            if step % run.evaluate_every == 0 or step % run.checkpoint_every == 0:
                # Evaluating and saving are not training: their memory is not counted.
                reset_peak_memory(device)
    return None


def _seconds_of(observe: Callable[[Parts, int], None], parts: Parts, step: int) -> float:
    synchronize(parts.accelerator.device)
    began = time.perf_counter()
    observe(parts, step)
    synchronize(parts.accelerator.device)
    return time.perf_counter() - began


def _gradient(parts: Parts, step: int) -> torch.Tensor:
    """Leave the gradient of a step in the parameters, or take the step where it is released.

    Returns this process's part of the mean loss.
    """
    run, accelerator, release = parts.run, parts.accelerator, parts.release
    total = torch.zeros((), device=accelerator.device)
    for micro in range(run.accumulation):
        batch = run.data.train_batch(
            parts.dataset, seed=run.seed, step=step, micro=micro, batch_size=run.batch_size
        )
        rows, share = processes.own_rows(batch)
        rows = rows.to(accelerator.device, non_blocking=True)
        last = micro == run.accumulation - 1
        with contextlib.nullcontext() if last or not release else release.accumulate():
            loss = run.model.loss(parts.model, rows) * share / run.accumulation
            accelerator.backward(loss)
        total += loss.detach()
    processes.sum_gradients(parts.module.parameters())
    return total


def _clip(parts: Parts) -> float | None:
    """Clip the gradient where the Run says so; its norm before, None where it is released."""
    if parts.release is not None:
        return None
    if parts.run.clip_norm is not None:
        return torch.nn.utils.clip_grad_norm_(parts.module.parameters(), parts.run.clip_norm).item()
    gradients = [p.grad for p in parts.module.parameters() if p.grad is not None]
    return torch.nn.utils.get_total_norm(gradients).item()


def _evaluate(parts: Parts, *, last: bool) -> dict[str, float]:
    """Mean validation loss, and what else the model measures, each row counting the same."""
    run, accelerator = parts.run, parts.accelerator
    batches = run.data.validation_batches(
        parts.dataset, batch_size=run.batch_size, max_batches=run.evaluation_batches
    )
    found: list[tuple[int, int, dict[str, float]]] = []
    parts.module.eval()
    _set_mode(parts.optimizer, "eval")
    with torch.no_grad():
        for index, batch in enumerate(batches):
            if index % processes.count() == processes.index():
                measured = _measures(run.model, parts.module, batch.to(accelerator.device))
                values = {name: value.item() for name, value in measured.items()}
                found.append((index, len(batch), values))
    if not last:
        # After the last step the weights stay those that were evaluated, to be saved.
        _set_mode(parts.optimizer, "train")
        parts.module.train()
    # Added in the order of the batches, whichever process has measured which.
    rows, sums = 0, defaultdict[str, float](float)
    for _, length, values in sorted(processes.gathered(found), key=lambda each: each[0]):
        rows += length
        for name, value in values.items():
            sums[f"validation_{name}"] += value * length
    if rows == 0:
        raise ValueError("the validation data have no batch; hold out more of the data")
    return {name: total / rows for name, total in sums.items()}


def _measures(model: Any, module: torch.nn.Module, batch: Any) -> Mapping[str, torch.Tensor]:
    """What a batch is evaluated by: the loss, and more where the model has more to say."""
    measures = getattr(model, "measures", None)
    return measures(module, batch) if measures else {"loss": model.loss(module, batch)}


def _set_mode(optimizer: Any, mode: Literal["train", "eval"]) -> None:
    # Schedule-free optimizers train other weights than those to be used.
    if callable(switch := getattr(optimizer, mode, None)):
        switch()


def _set_lrs(optimizer: Any, lrs: list[float]) -> None:
    for group, lr in zip(optimizer.param_groups, lrs, strict=True):
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def _save(parts: Parts) -> None:
    generators = processes.gathered([random_state()])
    if parts.is_main:
        run = parts.run
        lrs = [float(group["lr"]) for group in parts.optimizer.param_groups]
        state = {
            "step": parts.step,
            "seconds": parts.seconds,
            "schedule": {"step": parts.step, "lrs": lrs},
            "data": {"seed": run.seed, "step": parts.step},
            "random": generators,
        }
        parts.home.save_checkpoint(
            parts.step,
            lambda folder: write_checkpoint(folder, parts.module, parts.optimizer, state),
        )
    parts.accelerator.wait_for_everyone()
