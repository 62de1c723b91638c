"""What to tune: a search of the same size for each optimizer, from a study's name and options."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nomadam.experiments.catalog import find_study, make_runs, takes_optimizer
from nomadam.experiments.comparison import DEFAULT_OPTIMIZERS, Arm, Comparison
from nomadam.experiments.configuration import Run, override, short_hash
from nomadam.experiments.search_spaces import Sampler, Search, Values, dotted, searched_fields

SAMPLERS = ("qmc", "zoom", "tpe", "grid")

Ranges = Mapping[str, tuple[float, float]]


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """What is to be tuned, and where.

    Args:
        name: dotted name of the study function.
        searches: one for each optimizer.
        sampler: ``qmc``, ``zoom``, ``tpe`` or ``grid``.
        budget: trials of each search.
        overrides: fields of every Run that were changed.
        folder: of the database and the summary.
        beside: folder of the run folders.
    """

    name: str
    searches: tuple[Search, ...]
    sampler: Sampler
    budget: int
    overrides: Mapping[str, str]
    folder: Path
    beside: Path

    def arm(self, search: Search, slot: int, values: Values) -> Arm:
        """The Run of a trial and its folder."""
        run = search.run(values)
        label = f"{search.label} {slot + 1}/{self.budget}"
        return Arm(label=label, run=run, folder=self.beside / f"{run.name}-{short_hash(run)}")

    def comparison(self) -> Comparison:
        """Arms that cost what the trials cost, for an estimate."""
        arms = []
        for search in self.searches:
            run = search.run(search.values(0))
            arms += [Arm(label=search.label, run=run, folder=self.beside)] * self.budget
        return Comparison(name=self.name, arms=tuple(arms), folder=self.folder)


def plan_tuning(
    name: str,
    *,
    optimizers: Sequence[str] = (),
    budget: int | None = None,
    sampler: str | None = None,
    ranges: Ranges | None = None,
    overrides: Mapping[str, str] | None = None,
    out: Path | None = None,
) -> Tuning:
    """Work out what to search for each optimizer; nothing is trained or written.

    A study function that returns one Run is searched in the ranges that the optimizer's row in the
    table of baselines declares. One that returns a list of Runs is a grid, and its Runs are the
    trials.

    Args:
        name: dotted path of a study function.
        optimizers: names of optimizers; default adamw, sgdm and sgd_sai where the function takes
            an optimizer, else what it returns.
        budget: trials of each optimizer, at least 1; of a grid its cells, which is the default.
        sampler: ``qmc``, ``zoom``, ``tpe`` or ``grid``; default ``grid`` for a grid, else ``qmc``.
        ranges: ``lr``, ``weight_decay`` or an argument, or the same after ``OPTIMIZER.``, to the
            ends of a log-uniform range in the place of the declared one.
        overrides: fields of every Run to change; a field that is set is not searched.
        out: folder of the tuning; the run folders then lie in it. Default
            ``runs/tune-<name>-<hash>``, with the run folders beside it.

    Raises:
        ValueError: an unknown name, optimizer, field or sampler, a budget below 1, an optimizer
            of which nothing is left to search, grids of different sizes, ``optimizer.name`` among
            the overrides.

    Example:
        >>> plan = plan_tuning("gpt2_pretraining.demo", optimizers=["adamw"], budget=8)
        >>> [(search.label, list(search.space)) for search in plan.searches]
        [('adamw', ['optimizer.lr', 'optimizer.weight_decay'])]
    """
    changes, ends = dict(overrides or {}), dict(ranges or {})
    if "optimizer.name" in changes:
        raise ValueError(
            f"optimizer.name = {changes['optimizer.name']!r}: can not be set in a tuning, whose "
            "searches bear their optimizers' names; choose them by --optimizer"
        )
    groups = _runs_by_optimizer(name, list(dict.fromkeys(optimizers)), changes)
    is_grid = any(len(runs) > 1 for runs in groups.values())
    chosen = sampler or ("grid" if is_grid else "qmc")
    if chosen not in SAMPLERS:
        raise ValueError(f"sampler = {chosen!r}: must be one of {', '.join(SAMPLERS)}")
    if (chosen == "grid") != is_grid:
        what = "a grid" if is_grid else "one Run, and no grid"
        raise ValueError(f"sampler = {chosen!r}: must be another one, for {name} returns {what}")
    if is_grid and ends:
        raise ValueError(f"{name} is a grid, so that no range of {', '.join(ends)} can be given")
    for key in ends:
        if "." in key and key.partition(".")[0] not in groups:
            raise ValueError(f"range of {key!r}: must be of one of {', '.join(groups)}")
    searches = tuple(
        Search(
            label=label, runs=tuple(runs), bounds={} if is_grid else _bounds(runs[0], changes, ends)
        )
        for label, runs in groups.items()
    )
    planned = _budget(budget, {search.label: len(search.runs) for search in searches}, is_grid)
    identity = [name, chosen, sorted(changes.items()), sorted(ends.items())]
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:8]
    folder = Path("runs", f"tune-{name}-{digest}") if out is None else out
    return Tuning(
        name=name,
        searches=searches,
        sampler=chosen,  # type: ignore[arg-type]
        budget=planned,
        overrides=changes,
        folder=folder,
        beside=folder.parent if out is None else folder,
    )


def _runs_by_optimizer(
    name: str, optimizers: Sequence[str], changes: Mapping[str, str]
) -> dict[str, list[Run]]:
    if takes_optimizer(find_study(name)):
        made = [
            run
            for optimizer in optimizers or DEFAULT_OPTIMIZERS
            for run in make_runs(name, optimizer=optimizer)
        ]
    else:
        made = make_runs(name)
    groups: dict[str, list[Run]] = {}
    for run in made:
        groups.setdefault(run.optimizer.name, []).append(override(run, changes))
    for optimizer in optimizers:
        if optimizer not in groups:
            have = ", ".join(groups)
            raise ValueError(f"{name} has no Run of {optimizer!r}; it has some of {have}")
    return {label: groups[label] for label in optimizers or groups}


def _bounds(run: Run, changes: Mapping[str, str], ends: Ranges) -> dict[str, tuple[float, float]]:
    """What is searched for a Run: what its optimizer declares, changed and left out as asked."""
    # Imported here, since it loads torch.
    from nomadam.optimizers.baselines import find_baseline

    row = find_baseline(run.optimizer.name, {})
    bounds = searched_fields(row.search_space)
    known = ("lr", "weight_decay", *row.arguments())
    for key, pair in ends.items():
        owner, _, argument = key.rpartition(".")
        if owner in ("", row.name):
            if argument not in known:
                raise ValueError(f"range of {key!r}: {row.name} has only {', '.join(known)}")
            bounds[dotted(argument)] = pair
    left = {field: pair for field, pair in bounds.items() if field not in changes}
    if not left:
        raise ValueError(f"{row.name}: nothing is left to search, for all of its fields are set")
    return left


def _budget(budget: int | None, sizes: Mapping[str, int], is_grid: bool) -> int:
    if not is_grid:
        if budget is None or budget < 1:
            raise ValueError(f"budget = {budget}: must be at least 1, the trials of each optimizer")
        return budget
    if len(set(sizes.values())) > 1:
        told = ", ".join(f"{label} {size}" for label, size in sizes.items())
        raise ValueError(f"the grids are not of one size, so that the budgets would differ: {told}")
    size = next(iter(sizes.values()))
    if budget not in (None, size):
        raise ValueError(f"budget = {budget}: must be {size}, the cells of the grid")
    return size
