"""The stage that a Run's weights come from: a Run of its own, found beside it or trained first."""

import dataclasses
import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nomadam.experiments.configuration import Run, short_hash
from nomadam.runs import FolderInUseError, RunFolder, RunFolderError

POLL_SECONDS = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class FirstStage:
    """A finished first stage.

    Args:
        run: what was trained.
        folder: its run folder.
        validation_loss: at its end.
        weights_sha256: of its final weights' file.
        tokenizer_sha256: of the tokenizer of its data, None where these have none.
    """

    run: Run
    folder: Path
    validation_loss: float
    weights_sha256: str
    tokenizer_sha256: str | None

    @property
    def description(self) -> dict[str, Any]:
        """What ``run.json`` of the second stage says of it."""
        return {
            "name": self.run.name,
            "hash": short_hash(self.run),
            "validation_loss": self.validation_loss,
            "weights_sha256": self.weights_sha256,
        }


def first_stage_of(run: Run) -> Run | None:
    """The Run whose final weights a Run starts from, None where it starts from none.

    Example:
        >>> from nomadam.experiments.gpt2_pretraining import demo
        >>> first_stage_of(demo()) is None
        True
    """
    make = getattr(run.model, "first_stage", None)
    return None if make is None else make()


def complete_first_stage(
    run: Run,
    home: RunFolder,
    accelerator: Any,
    train: Callable[..., dict[str, Any]],
    check: Callable[[Run], None],
    **options: Any,
) -> FirstStage | None:
    """Find the finished first stage of a Run beside the Run's folder, or train it there.

    Where another process trains it, this one waits. Before either, what the Run itself would fail
    by is looked for, so that no first stage is trained in vain.

    Args:
        run: the second stage.
        home: its run folder; the first stage's is ``NAME-HASH`` in the same folder.
        accelerator: accelerate's, whose processes all call this.
        train: the training loop's `train`.
        check: called with the first stage where that is unfinished; raises a ValueError.
        **options: keyword arguments of ``train``: device, cache, progress.

    Returns:
        None where the Run has no first stage.

    Raises:
        RunFolderError: its folder is damaged, or its training diverged.
        Interrupted: a KeyboardInterrupt, during its training; it can go on.
        ValueError: as ``train`` and ``check``.
    """
    stage = first_stage_of(run)
    if stage is None:
        return None
    folder = RunFolder(home.path.parent / f"{stage.name}-{short_hash(stage)}")
    shown = getattr(options.get("progress"), "stage", None)
    if shown is not None:
        options = {**options, "progress": shown(stage.name, stage.steps)}
    if accelerator.is_main_process and folder.read_result() is None:
        check(stage)
    while True:
        if accelerator.is_main_process:
            _wait_until_free(folder)
        accelerator.wait_for_everyone()
        try:
            result = train(stage, folder.path, **options)
            break
        except FolderInUseError:  # another process was faster
            if accelerator.num_processes > 1:
                raise
    return _finished(stage, folder, result)


def load_final_weights(module: Any, folder: Path) -> None:
    """Put the weights that a finished training ended with into a module of the same kind.

    Args:
        module: built as that training's was; its parameters are overwritten.
        folder: the run folder, as ``build`` gets it in ``pretrained``.

    Raises:
        RunFolderError: the folder holds no whole checkpoint.
        ValueError: the checkpoint is of another model.
    """
    # Imported here, since it loads torch.
    from nomadam.experiments.checkpoints import read_weights

    read_weights(_last_checkpoint(folder), module)


def final_weights(folder: Path) -> dict[str, Any]:
    """The weights that a finished training ended with, by name, on the CPU; tied ones once.

    Args:
        folder: the run folder, as ``build`` gets it in ``pretrained``.

    Raises:
        RunFolderError: it holds no whole checkpoint.
    """
    from safetensors.torch import load_file

    return load_file(_last_checkpoint(folder) / "model.safetensors")


def _last_checkpoint(folder: Path) -> Path:
    found = RunFolder(folder).newest_checkpoint()
    if found is None:
        raise RunFolderError(f"{folder} holds no checkpoint that is whole; delete that folder")
    return found[1]


def _wait_until_free(folder: RunFolder) -> None:
    told = False
    while folder.read_result() is None:
        try:
            with folder.locked():
                return
        except FolderInUseError:
            if not told:
                warnings.warn(
                    f"waiting for {folder.path}, the first stage, which another process trains",
                    stacklevel=4,
                )
            told = True
            time.sleep(POLL_SECONDS)


def _finished(stage: Run, folder: RunFolder, result: dict[str, Any]) -> FirstStage:
    again = "delete that folder to train it again"
    if result["status"] != "finished" or result.get("validation_loss") is None:
        step = result.get("diverged_at_step")
        raise RunFolderError(f"{folder.path}, the first stage, diverged at step {step}; {again}")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = folder.newest_checkpoint()
    if found is None or found[0] != stage.steps:
        why = "; ".join(str(warning.message) for warning in told) or "it is not there"
        raise RunFolderError(
            f"{folder.path}, the first stage, lacks its checkpoint of step {stage.steps} "
            f"({why}); {again}"
        )
    sums = json.loads((found[1] / "checksums.json").read_bytes())
    header = folder.read_header()
    if header is None or "model.safetensors" not in sums:
        raise RunFolderError(f"{folder.path}, the first stage, is not whole; {again}")
    return FirstStage(
        run=stage,
        folder=folder.path,
        validation_loss=result["validation_loss"],
        weights_sha256=sums["model.safetensors"],
        tokenizer_sha256=header.get("data", {}).get("tokenizer_sha256"),
    )
