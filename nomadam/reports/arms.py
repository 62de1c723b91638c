"""Group runs into arms: the seeds of one configuration belong together, nothing else does."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nomadam.reports.reading import RunRecord, number, read_folders
from nomadam.units import HELD_OUT, unit_of

# What makes a validation loss another quantity: the text, its tokens, or the part held out.
DATA_IDENTITY = ("sha256", "tokenizer_sha256", *HELD_OUT)
# Beside the model and the data, what makes a comparison of optimizers uneven.
UNEQUAL_TERMS = ("steps", "batch_size", "accumulation", "precision", "evaluation_batches")
RATE, DECAY, ARGUMENTS = "optimizer.lr", "optimizer.weight_decay", "optimizer.arguments."


@dataclass(frozen=True, kw_only=True)
class Arm:
    """Runs that differ in nothing but the seed.

    Args:
        label: unique within a comparison.
        hint: what the comparison file called the arm, or the optimizer's name.
        runs: at least one, in the order in which they were read.
    """

    label: str
    hint: str
    runs: tuple[RunRecord, ...]

    @property
    def optimizer(self) -> str:
        """The optimizer's name."""
        return self.runs[0].optimizer

    @property
    def lr(self) -> float | None:
        """The learning rate."""
        return self.runs[0].lr

    @property
    def configuration(self) -> dict[str, Any]:
        """The flattened configuration, without the seed."""
        return _without(self.runs[0], "seed")

    def with_status(self, status: str) -> list[RunRecord]:
        """Return the runs of this status."""
        return [run for run in self.runs if run.status == status]

    def finals(self, key: str) -> dict[Any, float]:
        """Return seed -> number under `key` in result.json of the finished runs.

        Diverged and unfinished runs have no final numbers: the table counts them instead.
        """
        found = ((run.seed, number(run.result.get(key))) for run in self.with_status("finished"))
        return {seed: value for seed, value in found if value is not None}

    def losses(self) -> dict[Any, float]:
        """Return seed -> final validation loss of the finished runs."""
        return self.finals("validation_loss")

    def loss(self) -> float | None:
        """Return the mean of `losses`, or None where no run has finished."""
        losses = self.losses()
        return statistics.fmean(losses.values()) if losses else None

    def values(self, key: str) -> list[float]:
        """Return the runs' numbers under `key`, from result.json or from what metrics.jsonl has."""
        found = (_measured(run, key) for run in self.runs)
        return [value for value in found if value is not None]


def _measured(run: RunRecord, key: str) -> float | None:
    final = number(run.result.get(key))
    if final is not None:
        return final
    steps = [value for row in run.metrics if (value := number(row.get(key))) is not None]
    if not steps:
        return None
    return max(steps) if key == "peak_memory_mb" else statistics.median(steps)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Arms that may be compared: one data set for all.

    Args:
        title: what the report is called.
        arms: in the order in which they were read.
        reference: the arm that the others are set against, or None.
        notes: what a reader has to know before trusting the numbers.
    """

    title: str
    arms: tuple[Arm, ...]
    reference: Arm | None
    notes: tuple[str, ...]

    @property
    def runs(self) -> list[RunRecord]:
        """Every run of every arm."""
        return [run for arm in self.arms for run in arm.runs]

    @property
    def unit(self) -> str:
        """What a row of the data counts: `token`, `pair` or `image`."""
        return unit_of(self.runs[0].data)

    @property
    def loss_unit(self) -> str:
        """The unit of the loss."""
        if self.unit != "image":
            return "nats per token"
        scored = [row for run in self.runs for row in (run.result, *run.metrics)]
        # Images without an accuracy are not classified but cleared of noise.
        classified = any("validation_accuracy" in row for row in scored)
        return "nats per image" if classified else "mean squared error"

    def differing_fields(self) -> list[str]:
        """Return the fields of the configuration, the seed apart, that differ between arms."""
        return differing([arm.configuration for arm in self.arms])

    def common_fields(self) -> dict[str, Any]:
        """Return the fields, the seed apart, that are the same in every arm."""
        first, unequal = self.arms[0].configuration, set(self.differing_fields())
        return {key: value for key, value in first.items() if key not in unequal}

    def groups(self, *fields: str) -> list[tuple[str, list[Arm]]]:
        """Return (label, arms) of arms that differ in nothing but these fields and the seed."""
        found: dict[str, list[Arm]] = {}
        for arm in self.arms:
            found.setdefault(_key(arm.runs[0], "seed", *fields), []).append(arm)
        members = list(found.values())
        labels = _labels(
            [arms[0].optimizer for arms in members],
            [_without(arms[0].runs[0], "seed", *fields) for arms in members],
            [arms[0].runs[0].folder for arms in members],
        )
        return list(zip(labels, members, strict=True))

    def families(self) -> list[tuple[str, list[Arm]]]:
        """Return (label, arms by learning rate) of arms that differ in their lr only."""
        with_rate = [
            (label, [arm for arm in arms if arm.lr is not None and arm.lr > 0])
            for label, arms in self.groups(RATE)
        ]
        return [
            (label, sorted(arms, key=lambda arm: arm.lr or 0.0))
            for label, arms in with_rate
            if arms
        ]

    def tuned(self) -> list[tuple[str, list[Arm]]]:
        """Return (label, arms) of arms that differ in what is tuned only.

        That is the learning rate, the decay, the optimizer's arguments that are fractions, and a
        seed among them, which follows that of the run.
        """
        return self.groups(*tuned_fields(self.arms))


def best(arms: Sequence[Arm]) -> Arm:
    """Return the arm with the lowest loss; the first where none has one.

    An arm with less than half as many finished seeds as another one does not count: the best of
    many trials with one seed each owes a part of its place to chance.

    Args:
        arms: at least one.
    """
    most = max(len(arm.losses()) for arm in arms)
    known = [arm for arm in arms if arm.losses() and 2 * len(arm.losses()) >= most]
    return min(known, key=lambda arm: arm.loss() or 0.0) if known else arms[0]


def tuned_fields(arms: Sequence[Arm]) -> list[str]:
    """Return the fields of the configuration that a tuning may change, and the arm's own seed."""
    arguments = {
        key: None
        for arm in arms
        for key, value in arm.configuration.items()
        if key == f"{ARGUMENTS}seed" or (key.startswith(ARGUMENTS) and isinstance(value, float))
    }
    return [RATE, DECAY, *arguments]


def _without(run: RunRecord, *fields: str) -> dict[str, Any]:
    return {key: value for key, value in run.configuration.items() if key not in fields}


def _key(run: RunRecord, *fields: str) -> str:
    return json.dumps(_without(run, *fields), sort_keys=True)


def differing(configurations: list[dict[str, Any]]) -> list[str]:
    """Return the fields that not all configurations have with one value, in their own order.

    Example:
        >>> differing([{"lr": 0.1, "steps": 300}, {"lr": 0.2, "steps": 300}])
        ['lr']
    """
    fields = dict.fromkeys(key for configuration in configurations for key in configuration)
    # JSON text tells 1 from True and a missing field from a null one.
    return [
        key
        for key in fields
        if len({json.dumps(c[key]) if key in c else "" for c in configurations}) > 1
    ]


def short_value(value: Any) -> str:
    """Return a configuration's value as a reader writes it: numbers short, nothing as a dash.

    Example:
        >>> short_value(0.00030000), short_value(None), short_value(True)
        ('0.0003', '–', 'true')
    """
    if value is None:
        return "–"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    return str(value)


def _labels(bases: list[str], configurations: list[dict], folders: list[Path]) -> list[str]:
    labels = list(bases)
    fields = sorted(differing(configurations), key=lambda key: not key.startswith("optimizer."))
    for field in fields:
        values = [short_value(own.get(field)) for own in configurations]
        told: dict[str, set[str]] = {}
        for label, value in zip(labels, values, strict=True):
            told.setdefault(label, set()).add(value)
        # Only what still tells apart arms of one name is worth a place in it.
        labels = [
            f"{label} {field.rsplit('.', 1)[-1]}={value}" if len(told[label]) > 1 else label
            for label, value in zip(labels, values, strict=True)
        ]
    labels = [
        f"{label} ({folder.name})" if labels.count(label) > 1 else label
        for label, folder in zip(labels, folders, strict=True)
    ]
    # Folders of one name in different places are left: they are numbered.
    return [
        f"{label} #{labels[:index].count(label) + 1}" if label in labels[:index] else label
        for index, label in enumerate(labels)
    ]


def _group(runs: tuple[RunRecord, ...]) -> tuple[Arm, ...]:
    groups: dict[tuple[str, str, int], list[RunRecord]] = {}
    for run in runs:
        hint = run.hint or run.optimizer
        copy = 0
        # The same seed twice is a repetition, not a second seed: it becomes an arm of its own.
        while any(r.seed == run.seed for r in groups.get((hint, _key(run, "seed"), copy), [])):
            copy += 1
        groups.setdefault((hint, _key(run, "seed"), copy), []).append(run)
    members = list(groups.values())
    hints = [key[0] for key in groups]
    labels = _labels(
        hints, [_without(m[0], "seed") for m in members], [m[0].folder for m in members]
    )
    return tuple(
        Arm(label=label, hint=hint, runs=tuple(member))
        for label, hint, member in zip(labels, hints, members, strict=True)
    )


def _check_data(runs: tuple[RunRecord, ...]) -> None:
    first = runs[0]
    for run in runs[1:]:
        for key in DATA_IDENTITY:
            a, b = first.data.get(key), run.data.get(key)
            if a == b and (a is not None or key != "sha256"):
                continue
            raise ValueError(
                f"results on different data are not compared: {first.folder} has data.{key}={a}, "
                f"{run.folder} has data.{key}={b}; report on each data set by itself"
            )


def _is_called(arm: Arm, name: str) -> bool:
    return name in (arm.label, arm.hint, arm.optimizer)


def _reference(arms: tuple[Arm, ...], names: tuple[str, ...]) -> Arm | None:
    for name in (*names, "adamw"):
        named = next((arm for arm in arms if _is_called(arm, name)), None)
        if named is not None:
            own = _key(named.runs[0], "seed", RATE, DECAY)
            # Of several learning rates and decays the best is the fair opponent.
            return best([arm for arm in arms if _key(arm.runs[0], "seed", RATE, DECAY) == own])
    return None


def _warnings(arms: tuple[Arm, ...], references: tuple[str, ...]) -> list[str]:
    notes = []
    for name in references:
        if not any(_is_called(arm, name) for arm in arms):
            notes.append(f"The reference {name} is not among the arms")
    budget = [
        key
        for key in differing([arm.configuration for arm in arms])
        if key in UNEQUAL_TERMS or key.startswith(("model.", "data."))
    ]
    if budget:
        notes.append(f"The arms differ in more than the optimizer: {', '.join(budget)}")
    seeds = {len(arm.runs) for arm in arms}
    if len(arms) > 1 and max(seeds) == 1:
        notes.append("One seed an arm: a small difference may be chance")
    if len(seeds) > 1:
        notes.append("The arms do not have the same number of seeds")
    devices = {str(run.environment.get("device_name")) for arm in arms for run in arm.runs}
    if len(devices) > 1:
        notes.append(
            f"Run on different devices ({', '.join(sorted(devices))}): "
            "times and memory are not comparable"
        )
    return notes


def read_comparison(folders: list[Path]) -> Comparison:
    """Read folders and group their runs into arms.

    Runs of one label and one configuration, the seed apart, are one arm. Where a label stands for
    several configurations (a grid), the fields that differ are added to it. The reference is the
    comparison's own, else AdamW; where it was run at several learning rates or decays, at the best
    of them.

    Args:
        folders: run folders and comparison folders, mixed as you like.

    Raises:
        ValueError: a wrong folder, or runs whose data are not the same (`sha256`,
            `tokenizer_sha256` or the number held out differ, or `sha256` is not known).
    """
    reading = read_folders(folders)
    _check_data(reading.runs)
    arms = _group(reading.runs)
    runs = dict.fromkeys(str(run.configuration.get("name") or "run") for run in reading.runs)
    return Comparison(
        title=", ".join(reading.names or tuple(runs)[:3]),
        arms=arms,
        reference=_reference(arms, reading.references),
        notes=(*_warnings(arms, reading.references), *reading.notes),
    )
