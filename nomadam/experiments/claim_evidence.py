"""What the trainings behind the claims have come to: numbers by seed, read from what is kept."""

import functools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nomadam.durable_files import is_number
from nomadam.experiments.claim_plan import AT_THE_VALUES_OF, SEEDS, Setting, with_seed
from nomadam.experiments.claim_runs import Places, final_runs, tuned
from nomadam.experiments.claim_settings import SETTINGS
from nomadam.experiments.configuration import Run
from nomadam.experiments.search_spaces import Edge, Values, short
from nomadam.experiments.verdicts import Finals
from nomadam.runs import RunFolder

# Seed to learning rate and decay to the number; None where the training diverged.
Cells = Mapping[int, Mapping[tuple[float, float], float | None]]


@dataclass(frozen=True, kw_only=True)
class TunedArm:
    """What the tuning of an arm has found.

    Args:
        source: the arm at whose values it is trained, None where it has its own.
        values: the best ones, by the short names of the fields; None where they are not known.
        edges: fields whose best value lies at an edge of what was searched.
        diverged: trainings of its tuning that diverged.
        trials: trainings of its tuning that have ended, the repeated ones too.
    """

    source: str | None
    values: Values | None
    edges: Mapping[str, Edge]
    diverged: int
    trials: int


@dataclass(frozen=True, kw_only=True)
class Kept:
    """A training that has ended.

    Args:
        run: what was trained.
        folder: where it is kept.
        result: what is in ``result.json``.
    """

    run: Run
    folder: Path
    result: dict[str, Any]

    def number(self, measure: str) -> float:
        """A number of its result.

        Raises:
            ValueError: there is none, naming the file.
        """
        value = self.result.get(measure)
        if value is None or not is_number(value):
            raise _damaged(self.folder / "result.json", f"no number {measure}")
        return value

    def records(self) -> list[dict[str, Any]]:
        """The evaluations that are kept of ``metrics.jsonl``.

        Raises:
            ValueError: the file is missing or damaged, naming it.
        """
        file = self.folder / "metrics.jsonl"
        try:
            records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        except (OSError, ValueError) as error:
            raise _damaged(file, str(error)) from error
        for record in records:
            if not isinstance(record, dict) or not {"step", "validation_loss"} <= record.keys():
                raise _damaged(file, f"{record!r} is no evaluation")
            for name, value in record.items():
                if value is not None and not is_number(value):
                    raise _damaged(file, f"{name} = {value!r} is no number")
        return records


class Evidence:
    """Reads what is kept of the trainings; what has not ended is missing, and nothing is trained.

    Args:
        places: where the trainings live.
        settings: that are known.
    """

    def __init__(self, places: Places, settings: tuple[Setting, ...] = SETTINGS) -> None:
        """See the class."""
        self.places = places
        self.settings = {setting.name: setting for setting in settings}

    def _kept(self, setting: Setting, run: Run) -> Kept | None:
        result = self.places.result(setting, run)
        folder = self.places.folder(setting, run)
        return None if result is None else Kept(run=run, folder=folder, result=result)

    @functools.cache  # noqa: B019
    def trained(self, setting: str, optimizer: str) -> list[Kept]:
        """The finals of an arm that have ended."""
        chosen = self.settings[setting]
        runs = final_runs(self.places, chosen, optimizer)
        return [kept for run in runs if (kept := self._kept(chosen, run)) is not None]

    def finals(self, setting: str, optimizer: str, measure: str = "validation_loss") -> Finals:
        """A number of the finals of an arm, None where the training diverged or learnt nothing.

        Raises:
            ValueError: a training that has finished does not have it, naming the file.
        """
        chosen = self.settings[setting]
        return {
            kept.run.seed: kept.number(measure) if chosen.has_learnt(kept.result) else None
            for kept in self.trained(setting, optimizer)
        }

    def has(self, setting: str, optimizer: str, measure: str) -> bool:
        """Whether a final of an arm has such a number."""
        return any(measure in kept.result for kept in self.trained(setting, optimizer))

    def cross_entropies(self, setting: str, optimizer: str) -> Finals:
        """Of the finals of an arm; none where they are its losses, which are not smoothed."""
        if not self.has(setting, optimizer, "validation_cross_entropy"):
            return {}
        found = self.finals(setting, optimizer, "validation_cross_entropy")
        return {} if found == self.finals(setting, optimizer) else found

    def errors(self, setting: str, optimizer: str) -> Finals:
        """1 − top-1 of the finals of an arm."""
        accuracies = self.finals(setting, optimizer, "validation_accuracy")
        return {seed: None if got is None else 1 - got for seed, got in accuracies.items()}

    def early(self, setting: str, optimizer: str, step: int) -> Finals:
        """The validation loss of the finals of an arm at an earlier step, None where it diverged.

        Raises:
            ValueError: a training that has finished was not evaluated there, naming the file.
        """
        found: dict[int, float | None] = {}
        for kept in self.trained(setting, optimizer):
            losses = {record["step"]: record["validation_loss"] for record in kept.records()}
            found[kept.run.seed] = losses.get(step)
            if losses.get(step) is None and kept.result["status"] == "finished":
                raise _damaged(kept.folder / "metrics.jsonl", f"no validation loss of step {step}")
        return found

    @functools.cache  # noqa: B019
    def tuned(self, setting: str, optimizer: str) -> TunedArm:
        """What the tuning of an arm has found so far; of one without, that of its source."""
        chosen = self.settings[setting]
        source = optimizer if chosen.is_tuned(optimizer) else AT_THE_VALUES_OF[optimizer]
        search, found = chosen.search(source), tuned(self.places, chosen, source)
        best = found.best
        edges = search.edges(best, [values for values, _ in found.trials]) if best else {}
        ended = found.trials + found.again
        return TunedArm(
            source=None if source == optimizer else source,
            values=None if best is None else {short(field): best[field] for field in best},
            edges={short(field): edge for field, edge in edges.items()},
            diverged=sum(not math.isfinite(loss) for _, loss in ended),
            trials=len(ended),
        )

    def seconds(self, setting: str) -> float:
        """By the clock, of all that is kept of a setting, trials and finals.

        Raises:
            ValueError: one of them can not be read, naming the file.
        """
        folders = [
            RunFolder(file.parent) for file in (self.places.kept / setting).glob("*/result.json")
        ]
        for folder in folders:
            folder.read_header()
        return sum((folder.read_result() or {}).get("seconds") or 0.0 for folder in folders)

    def cells(self, setting: str, optimizer: str, measure: str, diverged: float | None) -> Cells:
        """A number of every cell of a grid, by seed; seeds with a missing cell are left out.

        Args:
            setting: a grid.
            optimizer: whose cells.
            measure: of ``result.json``.
            diverged: what stands for a training that diverged.
        """
        chosen, found = self.settings[setting], {}
        runs = [run for run in chosen.cells() if run.optimizer.name == optimizer]
        for seed in SEEDS:
            cells: dict[tuple[float, float], float | None] = {}
            for run in [with_seed(run, seed) for run in runs]:
                if (kept := self._kept(chosen, run)) is not None:
                    learnt = chosen.has_learnt(kept.result)
                    value = kept.number(measure) if learnt else diverged
                    cells[run.optimizer.lr, run.optimizer.weight_decay] = value
            if len(cells) == len(runs):
                found[seed] = cells
        return found

    def numbers(self, setting: str, name: str) -> Finals:
        """A number of ``result.json`` of a study that was carried out with every seed."""
        chosen, found = self.settings[setting], {}
        for seed, study in chosen.studies().items():
            if (result := self.places.result(chosen, study, seed)) is not None:
                found[seed] = result.get(name)
        return found


def _damaged(file: Path, why: str) -> ValueError:
    return ValueError(
        f"{file} is missing or damaged; without its folder that training is made again: {why}"
    )
