"""The gain measured again through training, per block: the paper's Figures 3 and 4."""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nomadam.experiments import (
    diffusion,
    gpt2_pretraining,
    lora_finetuning,
    resnet18_grid,
    vit_classification,
)
from nomadam.experiments.configuration import Run
from nomadam.experiments.fields import require
from nomadam.experiments.gain_drift import BATCHES, block_table, drift_numbers, summary_table
from nomadam.experiments.study import Findings, Study, parts_of
from nomadam.runs import RunFolder

if TYPE_CHECKING:
    from nomadam.experiments.preparation import Parts


@dataclasses.dataclass(frozen=True, kw_only=True)
class GainsOverTraining(Study):
    """A training, and the gain of every block at some of its steps.

    The training goes on in a folder beside the study's, ``NAME-HASH-training``. What is measured
    changes nothing in it. A gain is that of `nomadam.measure_gains`, of the gradient at the weights
    before the step.

    Args:
        run: what is trained; it must not release its gradients.
        measurements: steps at which gains are measured, from the first to the last, evenly in the
            logarithm of the step: at least 2; default 24. Early on several fall together.
        fixed_batches: held-out batches of the training's size, the first ones, whose mean gradient
            is the fixed one, at least 1; default 1.

    Raises:
        ValueError: for a value outside its range.

    Example:
        >>> gpt2("adamw").run.optimizer.name
        'adamw'
    """

    run: Run
    measurements: int = 24
    fixed_batches: int = 1

    def __post_init__(self) -> None:
        """Check the fields."""
        super().__post_init__()
        require(self.measurements >= 2, "measurements", self.measurements, "at least 2")
        require(self.fixed_batches >= 1, "fixed_batches", self.fixed_batches, "at least 1")
        released, why = self.run.release_gradients, "false: a released gradient is not there"
        require(not released, "run.release_gradients", released, why)

    def measured_steps(self) -> list[int]:
        """The steps at which gains are measured.

        Example:
            >>> gpt2().measured_steps()[:6]
            [1, 2, 3, 4, 5, 7]
        """
        spaced = np.geomspace(1, self.run.steps, self.measurements)
        return sorted({round(step) for step in spaced.tolist()})

    def measure(
        self,
        home: RunFolder,
        *,
        device: str,
        cache: str | Path | None,
        make_progress: Callable[[str, int], Any],
        tell: Callable[[str], None],
    ) -> Findings:
        """Train, measure on the way, and sum it up."""
        training = RunFolder(home.path.with_name(f"{home.path.name}-training"))
        parts, steps = parts_of(home), self.measured_steps()
        self._train(training, parts, steps, device, cache, make_progress)
        records = [_read(parts, step) for step in steps]
        gains = {kind: _by_block([record[kind] for record in records]) for kind in BATCHES}
        blocks = records[0]["blocks"]
        home.write_json("gains_over_training.json", {"steps": steps, "blocks": blocks, **gains})
        return Findings(
            numbers=drift_numbers(blocks, gains),
            tables=(summary_table(blocks, gains), block_table(blocks, gains)),
        )

    def _train(
        self,
        training: RunFolder,
        parts: RunFolder,
        steps: Sequence[int],
        device: Any,
        cache: str | Path | None,
        make_progress: Callable[[str, int], Any],
    ) -> None:
        # Imported here, since it loads torch.
        from nomadam.experiments.training import train

        def observe(trained: "Parts", step: int) -> None:
            if step in steps and trained.is_main:
                parts.write_json(_file(step), self._gains(trained))

        label = f"{self.run.name} {self.run.optimizer.name}"
        with make_progress(label, self.run.steps) as progress:
            result = train(
                self.run,
                training.path,
                device=device,
                cache=cache,
                progress=progress,
                again=_lost(training, parts, steps),
                observe=observe,
            )
        if result["status"] != "finished":
            raise ValueError(
                f"the training of {training.path} diverged at step {result['diverged_at_step']}; "
                f"lower run.optimizer.lr = {self.run.optimizer.lr:g}"
            )

    def _gains(self, trained: "Parts") -> dict[str, Any]:
        """Gains of both gradients by block, and what the blocks are."""
        from nomadam.diagnostics.gsnr import gains_of, measure_gains

        run, module, device = self.run, trained.module, trained.accelerator.device
        named = {name: p for name, p in module.named_parameters() if p.requires_grad}
        held_out = run.data.validation_batches(
            trained.dataset, batch_size=run.batch_size, max_batches=self.fixed_batches
        )
        batches = (batch.to(device) for batch in held_out)
        own = {name: p.grad for name, p in named.items() if p.grad is not None}
        return {
            "blocks": blocks_of({name: list(p.shape) for name, p in named.items()}),
            "training_batch": gains_of(own),
            "fixed_batch": measure_gains(module, run.model.loss, batches),
        }


def gpt2(optimizer: str = "sgd_sai") -> Study:
    """The gains of the GPT-2 demonstration through its training: minutes on two cores.

    Args:
        optimizer: that trains it; default ``sgd_sai``.

    Example:
        >>> gpt2().name
        'gsnr_over_training.gpt2'
    """
    run = gpt2_pretraining.demo(optimizer)
    return GainsOverTraining(name="gsnr_over_training.gpt2", run=run)


def vit(optimizer: str = "sgd_sai") -> Study:
    """The gains of the ViT demonstration through its training: a minute on a core.

    Args:
        optimizer: that trains it; default ``sgd_sai``.

    Example:
        >>> vit().run.name
        'vit_classification.demo'
    """
    run = vit_classification.demo(optimizer)
    return GainsOverTraining(name="gsnr_over_training.vit", run=run)


def diffusion_lora(optimizer: str = "sgd_sai") -> Study:
    """The gains of the diffusion demonstration through its training, after that of its first stage.

    Args:
        optimizer: that trains it; default ``sgd_sai``.

    Example:
        >>> diffusion_lora().run.name
        'diffusion.demo'
    """
    run = diffusion.demo(optimizer)
    return GainsOverTraining(name="gsnr_over_training.diffusion_lora", run=run)


def _file(step: int) -> str:
    return f"step_{step:08d}.json"


def _read(parts: RunFolder, step: int) -> dict[str, Any]:
    record = parts.read_object(_file(step))
    if record is None or not all(isinstance(record.get(key), dict) for key in ("blocks", *BATCHES)):
        raise ValueError(f"{parts.path / _file(step)} is damaged; delete the folder to start again")
    return record


def _lost(training: RunFolder, parts: RunFolder, steps: Sequence[int]) -> bool:
    """Whether the training is beyond a step that was not measured, and has to begin again."""
    kept = training.newest_checkpoint()
    done = 0 if kept is None else kept[0]
    return any(step <= done and not (parts.path / _file(step)).exists() for step in steps)


def resnet18(optimizer: str = "sgd_sai") -> Study:
    """The gains of the ResNet-18 demonstration through its training: a minute on a core.

    Args:
        optimizer: that trains it; default ``sgd_sai``.

    Example:
        >>> resnet18().run.name
        'resnet18_grid.demo'
    """
    run = resnet18_grid.demo(optimizer)
    return GainsOverTraining(name="gsnr_over_training.resnet18", run=run)


def lora(optimizer: str = "sgd_sai") -> Study:
    """The gains of the LoRA demonstration through its training, after that of its first stage.

    Args:
        optimizer: that trains it; default ``sgd_sai``.

    Example:
        >>> lora().run.name
        'lora_finetuning.demo'
    """
    run = lora_finetuning.demo(optimizer)
    return GainsOverTraining(name="gsnr_over_training.lora", run=run)


def blocks_of(shapes: Mapping[str, Sequence[int]]) -> dict[str, dict[str, Any]]:
    """What each block is: its size, its kind, and the layer that it is in, None where in none.

    A kind has the blocks whose names differ in the number of the layer alone, and whose shapes are
    equal.

    Example:
        >>> blocks_of({"h.0.w": [2, 3], "h.1.w": [2, 3], "norm.w": [3]})["h.1.w"]
        {'numel': 6, 'shape': [2, 3], 'kind': 'h.*.w', 'layer': 1}
    """
    blocks: dict[str, dict[str, Any]] = {}
    shapes_of: dict[str, list[Sequence[int]]] = {}
    for name, shape in shapes.items():
        # Before a number there is the name of a list of layers: elsewhere it counts something else.
        numbered = re.search(r"(?<=\.)\d+(?=\.)", name)
        kind = name if numbered is None else re.sub(r"(?<=\.)\d+(?=\.)", "*", name, count=1)
        blocks[name] = {
            "numel": math.prod(shape),
            "shape": list(shape),
            "kind": kind,
            "layer": None if numbered is None else int(numbered[0]),
        }
        if list(shape) not in shapes_of.setdefault(kind, []):
            shapes_of[kind].append(list(shape))
    for block in blocks.values():
        if len(shapes_of[block["kind"]]) > 1:
            block["kind"] += f" {'x'.join(map(str, block['shape']))}"
    return blocks


def _by_block(records: Sequence[Mapping[str, float]]) -> dict[str, list[float | None]]:
    names = dict.fromkeys(name for record in records for name in record)
    return {name: [record.get(name) for record in records] for name in names}
