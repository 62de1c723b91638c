"""The gain measured again through training, per block: the paper's Figures 3 and 4."""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nomadam.experiments import (
    gpt2_pretraining,
    lora_finetuning,
    resnet18_grid,
    vit_classification,
)
from nomadam.experiments.configuration import Run
from nomadam.experiments.fields import require
from nomadam.experiments.study import Findings, Study, Table, parts_of
from nomadam.runs import RunFolder

if TYPE_CHECKING:
    from nomadam.experiments.preparation import Parts

# Whose gradient is measured: the one that the step is taken along, and that of a batch which is
# the same at every step and never trained on.
BATCHES = ("training_batch", "fixed_batch")
# Step 0 is none of the training's own, so that its batch is one that the training does not see.
FIXED_STEP = 0

# Of one kind of batch: block to its gain at each measured step, None where it has none.
Gains = Mapping[str, Sequence[float | None]]


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
        fixed_batches: batches of the training's size whose mean gradient is the fixed one, at
            least 1; default 1.

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
            numbers=_numbers(blocks, gains),
            tables=(_summary(blocks, gains), _block_table(blocks, gains)),
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
        batches = (
            run.data.train_batch(
                trained.dataset,
                seed=run.seed,
                step=FIXED_STEP,
                micro=micro,
                batch_size=run.batch_size,
            ).to(device)
            for micro in range(self.fixed_batches)
        )
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


def drift(gains: Sequence[float | None]) -> list[float]:
    """How far each later gain of a block is from its first one: ``|gain_t / gain_0 - 1|``.

    Example:
        >>> drift([2.0, None, 2.5, 1.0])
        [0.25, 0.5]
    """
    known = [gain for gain in gains if gain is not None]
    return [abs(gain / known[0] - 1) for gain in known[1:]]


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Spearman's rank correlation, ties at their mean rank; None where either does not vary.

    Values that agree in six digits are ties: gains of equal tensors differ in the last ones only.

    Example:
        >>> rank_correlation([1.0, 2.0, 3.0, 4.0], [10.0, 30.0, 20.0, 40.0])
        0.8
    """
    ranks = []
    for values in (one, other):
        values = np.array([float(f"{value:.6g}") for value in values])
        ordered = np.sort(values)
        left, right = (np.searchsorted(ordered, values, side) for side in ("left", "right"))
        ranks.append((left + right) / 2)
    if any(len(rank) < 2 or np.ptp(rank) == 0 for rank in ranks):
        return None
    return round(float(np.corrcoef(*ranks)[0, 1]), 12)


def _numbers(blocks: Mapping[str, Any], gains: Mapping[str, Gains]) -> dict[str, float | None]:
    return {
        f"{kind}.{group}.{key}": value
        for kind in BATCHES
        for group, names in _groups(blocks).items()
        for key, value in _measures(blocks, gains[kind], names).items()
    }


def _groups(blocks: Mapping[str, Any]) -> dict[str, list[str]]:
    """All blocks, and those with several dimensions and with one apart."""
    flat = {name: len(block["shape"]) < 2 for name, block in blocks.items()}
    groups = {
        "all": list(blocks),
        "matrices": [name for name in blocks if not flat[name]],
        "vectors": [name for name in blocks if flat[name]],
    }
    return {group: names for group, names in groups.items() if names}


def _measures(
    blocks: Mapping[str, Any], gains: Gains, names: Sequence[str]
) -> dict[str, float | None]:
    """What is said of some blocks together."""
    known = {name: [g for g in gains.get(name, ()) if g is not None] for name in names}
    known = {name: series for name, series in known.items() if series}
    drifts = {name: drift(series) for name, series in known.items() if len(series) > 1}
    ratios = [
        gain / blocks[name]["numel"] ** 0.5 for name, series in known.items() for gain in series
    ]
    both = [(series[0], series[-1]) for series in known.values()]
    medians = [float(np.median(each)) for each in drifts.values()]
    largest = [max(each) for each in drifts.values()]
    return {
        "num_blocks": len(known),
        "median_drift": float(np.median(medians)) if medians else None,
        "largest_drift": max(largest, default=None),
        "share_within_1_percent": float(np.mean([each < 0.01 for each in largest]))
        if largest
        else None,
        "rank_correlation_of_first_and_last": rank_correlation(*zip(*both, strict=True))
        if both
        else None,
        "spread_over_depth": _spread_over_depth(blocks, known),
        "rank_correlation_with_depth": _correlation_with_depth(blocks, known),
        "least_of_sqrt_numel": min(ratios, default=None),
        "median_of_sqrt_numel": float(np.median(ratios)) if ratios else None,
        "largest_of_sqrt_numel": max(ratios, default=None),
    }


def _layers(
    blocks: Mapping[str, Any], known: Mapping[str, Sequence[float]]
) -> list[list[tuple[int, float]]]:
    """Of each kind that has several layers: layer and last gain."""
    kinds: dict[str, list[tuple[int, float]]] = {}
    for name, series in known.items():
        if blocks[name]["layer"] is not None:
            kinds.setdefault(blocks[name]["kind"], []).append((blocks[name]["layer"], series[-1]))
    return [sorted(layers) for layers in kinds.values() if len(layers) > 1]


def _spread_over_depth(
    blocks: Mapping[str, Any], known: Mapping[str, Sequence[float]]
) -> float | None:
    """Median over the kinds of tensors: largest over smallest gain of the layers, less 1."""
    spreads = [
        max(gain for _, gain in layers) / min(gain for _, gain in layers) - 1
        for layers in _layers(blocks, known)
    ]
    return float(np.median(spreads)) if spreads else None


def _correlation_with_depth(
    blocks: Mapping[str, Any], known: Mapping[str, Sequence[float]]
) -> float | None:
    """Mean over the kinds of tensors of the rank correlation between layer and gain."""
    found = [rank_correlation(*zip(*layers, strict=True)) for layers in _layers(blocks, known)]
    told = [each for each in found if each is not None]
    return float(np.mean(told)) if told else None


def _summary(blocks: Mapping[str, Any], gains: Mapping[str, Gains]) -> Table:
    rows = []
    for kind in BATCHES:
        for group, names in _groups(blocks).items():
            rows.append(
                (
                    f"{group}, {kind.replace('_', ' ')}",
                    *_measures(blocks, gains[kind], names).values(),
                )
            )
    heads = (
        "blocks, gradient of",
        "blocks",
        "median drift",
        "largest drift",
        "part within 1 %",
        "first and last, rank corr.",
        "spread over depth",
        "with depth, rank corr.",
        "gain / sqrt(numel), least",
        "median",
        "largest",
    )
    return Table(
        title="Gains through training",
        heads=heads,
        rows=rows,
        note="Drift: |gain / first gain - 1| of a block over the measured steps; the median over "
        "blocks of their medians, and the largest of all; the part of the blocks that never drift "
        "by 1 %. Spread over depth: largest gain over smallest among the layers of one kind of "
        "tensor at the last step, less 1, the median over the kinds.",
    )


def _block_table(blocks: Mapping[str, Any], gains: Mapping[str, Gains]) -> Table:
    rows = []
    for name, block in blocks.items():
        root = block["numel"] ** 0.5
        cells: list[Any] = [name, "x".join(map(str, block["shape"])), round(root, 2)]
        for kind in BATCHES:
            known = [gain for gain in gains[kind].get(name, ()) if gain is not None]
            drifts = drift(known)
            cells += [
                known[0] if known else None,
                known[-1] / root if known else None,
                float(np.median(drifts)) if drifts else None,
                max(drifts, default=None),
            ]
        rows.append(cells)
    heads = ["block", "shape", "sqrt(numel)"]
    for kind in BATCHES:
        words = kind.replace("_", " ")
        heads += [f"first gain, {words}", "last gain / sqrt(numel)", "median drift", "largest"]
    return Table(title="Gains by block", heads=heads, rows=rows)
