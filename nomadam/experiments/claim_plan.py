"""How a study is put to the test for the claims: its trials, its seeds, its jobs, its cost."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nomadam.experiments.catalog import make_one, make_runs
from nomadam.experiments.configuration import Run, override, short_hash
from nomadam.experiments.search_spaces import Search
from nomadam.experiments.study import Study
from nomadam.experiments.tuning_plan import plan_tuning

# Of each arm, with seed 0, where its setting says no other number. The best three are repeated with
# another seed, and the best mean of both is taken: at the edge of stability one seed flatters a
# rate. The finals have further seeds.
TRIALS = 9
CANDIDATES = 3
SECOND_SEED = 100
SEEDS = (1, 2, 3, 4, 5)

# Two cores for five hours.
MOST_SECONDS = 36_000

# Arms that are trained at what another one was tuned to, so that nothing but the gain differs.
AT_THE_VALUES_OF = {"sgd_sai_sqrt_numel": "sgd_sai", "sgd_sai_refreshed": "sgd_sai"}

# Their controls are random: another one for each seed.
SEEDED = ("sgd_sai_shuffled",)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A study in the form that the claims have of it.

    Arms that are tuned alike and then trained with the other seeds; or the cells of a grid, each
    trained with every seed; or, of what is no training, its measurements, one a seed.

    Args:
        name: of its folder.
        study: dotted name of the study function.
        overrides: fields in which the form differs from the study's.
        optimizers: the arms, each tuned alike but for those of `AT_THE_VALUES_OF`; none for a grid
            or measurements.
        own: fields that an arm alone has changed, by its name.
        finals: fields in which the trainings that decide differ from the trials.
        worst_loss: of knowing nothing; a final loss above it counts as diverged.
        trials: of each arm and search, with one seed.
        ranges: to search in the place of what an optimizer's row declares, as `plan_tuning` has it;
            one for each search, of which all but the first are beyond the budget.
        measured: whether the study is no training.
        alone: whether nothing else may run at that time, because the clock is read.
        afterwards: whether it was asked when the others had been decided: then it is beyond the
            budget, and trained where it is named.
        run_seconds: that one of them took on one core beside another one, the median.
        final_seconds: that a training which decides took, where it is longer.
        first_stage_seconds: of the training that all of them start from, made once.
        why: what is shorter than in the study, in a few words.
    """

    name: str
    study: str
    overrides: Mapping[str, str] = field(default_factory=dict)
    optimizers: tuple[str, ...] = ()
    own: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    finals: Mapping[str, str] = field(default_factory=dict)
    worst_loss: float = math.inf
    trials: int = TRIALS
    ranges: tuple[Mapping[str, tuple[float, float]], ...] = ({},)
    measured: bool = False
    alone: bool = False
    afterwards: bool = False
    run_seconds: float
    final_seconds: float | None = None
    first_stage_seconds: float = 0.0
    why: str = "as it stands"

    def has_learnt(self, result: Mapping[str, Any]) -> bool:
        """Whether a training has finished, and knows more than nothing."""
        return result["status"] == "finished" and result["validation_loss"] <= self.worst_loss

    @property
    def is_grid(self) -> bool:
        """Whether its Runs are the cells of a grid."""
        return not self.optimizers and not self.measured

    def searches(self, optimizer: str) -> list[Search]:
        """What is searched for an arm, one after another."""
        plans = [
            plan_tuning(
                self.study,
                optimizers=[optimizer],
                budget=self.trials,
                sampler="zoom",
                ranges={
                    key: ends for key, ends in ranges.items() if key.partition(".")[0] == optimizer
                },
                overrides={**self.overrides, **self.own.get(optimizer, {})},
                out=Path(),
            )
            for ranges in self.ranges
        ]
        return [plan.searches[0] for plan in plans]

    def search(self, optimizer: str) -> Search:
        """All that is searched for an arm, from the lowest to the highest value of each field."""
        searches = self.searches(optimizer)
        bounds = {
            field: (
                min(each.bounds[field][0] for each in searches),
                max(each.bounds[field][1] for each in searches),
            )
            for field in searches[0].bounds
        }
        return replace(searches[0], bounds=bounds)

    def is_tuned(self, optimizer: str) -> bool:
        """Whether an arm has trials of its own."""
        return AT_THE_VALUES_OF.get(optimizer) not in self.optimizers

    def runs_of(self, optimizer: str) -> int:
        """How many trainings an arm takes."""
        tuning = len(self.ranges) * (self.trials + CANDIDATES)
        return len(SEEDS) + tuning * self.is_tuned(optimizer)

    def cells(self) -> list[Run]:
        """The Runs of a grid, with seed 0."""
        return [override(run, self.overrides) for run in make_runs(self.study)]

    def studies(self) -> dict[int, Study]:
        """Seed to what is measured with it."""
        made = make_one(self.study)
        assert isinstance(made, Study)
        return {seed: _seeded(override(made, self.overrides), seed) for seed in SEEDS}

    @property
    def num_runs(self) -> int:
        """How many trainings or measurements it takes."""
        if self.optimizers:
            return sum(map(self.runs_of, self.optimizers))
        return len(SEEDS) * (1 if self.measured else len(self.cells()))

    @property
    def later_runs(self) -> int:
        """How many of them are beyond the budget."""
        if self.afterwards:
            return self.num_runs
        again = (len(self.ranges) - 1) * (self.trials + CANDIDATES)
        return again * sum(map(self.is_tuned, self.optimizers))

    @property
    def seconds(self) -> float:
        """Of one core."""
        planned = self.first_stage_seconds + self.num_runs * self.run_seconds
        return planned + self._longer_seconds

    @property
    def later_seconds(self) -> float:
        """Of them beyond the budget: of later runs, and by which finals are longer than planned."""
        if self.afterwards:
            return self.seconds
        return self.later_runs * self.run_seconds + self._longer_seconds

    @property
    def _longer_seconds(self) -> float:
        longer = (self.final_seconds or self.run_seconds) - self.run_seconds
        return len(SEEDS) * len(self.optimizers) * longer


@dataclass(frozen=True, kw_only=True)
class Job:
    """What one process does in one piece: an arm with its finals, or the rest with one seed.

    Args:
        setting: whose.
        optimizer: the arm, None for a grid or a measurement.
        seed: of a grid or a measurement, None for an arm.
    """

    setting: Setting
    optimizer: str | None = None
    seed: int | None = None

    @property
    def label(self) -> str:
        """For progress lines and the name of its lock."""
        return self.optimizer or f"seed-{self.seed}"

    def serves(self, other: "Job") -> bool:
        """Whether another job takes the values that this one finds."""
        source = AT_THE_VALUES_OF.get(other.optimizer or "")
        return source is not None and (self.setting, self.optimizer) == (other.setting, source)

    @property
    def num_runs(self) -> int:
        """How many trainings or measurements it takes."""
        if self.optimizer is not None:
            return self.setting.runs_of(self.optimizer)
        return self.setting.num_runs // len(SEEDS)


def jobs(settings: tuple[Setting, ...]) -> list[Job]:
    """All jobs, the ones that most of the claims need first.

    Example:
        >>> from nomadam.experiments.claim_settings import SETTINGS
        >>> [(job.setting.name, job.label) for job in jobs(SETTINGS)[:2]]
        [('gpt2', 'adamw'), ('vit', 'adamw')]
    """
    return [job for rank in range(_longest(settings)) for job in _of_rank(settings, rank)]


def _longest(settings: tuple[Setting, ...]) -> int:
    return max(len(setting.optimizers) or len(SEEDS) for setting in settings)


def _of_rank(settings: tuple[Setting, ...], rank: int) -> Iterator[Job]:
    for setting in settings:
        if rank < len(setting.optimizers):
            yield Job(setting=setting, optimizer=setting.optimizers[rank])
        elif not setting.optimizers and rank < len(SEEDS):
            yield Job(setting=setting, seed=SEEDS[rank])


def total_seconds(settings: tuple[Setting, ...]) -> float:
    """What all that was planned takes on one core, in seconds.

    Example:
        >>> from nomadam.experiments.claim_settings import SETTINGS
        >>> total_seconds(SETTINGS) <= MOST_SECONDS
        True
    """
    return sum(each.seconds - each.later_seconds for each in settings)


def with_seed(run: Run, seed: int) -> Run:
    """The same Run with another seed."""
    return replace(run, seed=seed)


def _seeded(study: Study, seed: int) -> Study:
    """A study of a training with that training's seed; others are measured again as they are."""
    run = getattr(study, "run", None)
    return replace(study, run=with_seed(run, seed)) if isinstance(run, Run) else study


def folder_name(made: Run | Study, seed: int | None = None) -> str:
    """Of a run folder, as `nomadam run` names it; of a measurement with the seed behind it.

    Example:
        >>> from nomadam.experiments.gpt2_pretraining import demo
        >>> folder_name(demo()).startswith("gpt2_pretraining.demo-")
        True
    """
    name = f"{made.name}-{short_hash(made)}"
    return name if seed is None else f"{name}-seed{seed}"
