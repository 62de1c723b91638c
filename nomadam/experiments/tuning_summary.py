"""What a tuning has found: its summary file, and the Runs of the finals that are made from it."""

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nomadam.experiments.configuration import Run, differing_fields, to_json
from nomadam.experiments.search_spaces import Search, short
from nomadam.experiments.shared_trials import current_attempts
from nomadam.experiments.tuning_plan import Tuning, plan_tuning
from nomadam.runs import RunFolder

FORMAT = 1
SUMMARY = "tuning.json"


def summary_of(tuning: Tuning, studies: Sequence[Any]) -> dict[str, Any]:
    """Sum up what the trials of a tuning have found, as JSON.

    Args:
        tuning: from `plan_tuning`.
        studies: the optuna study of each search, in their order.

    Returns:
        ``name``, ``sampler``, ``budget``, ``seed`` (the tuning seed), ``overrides``, and
        ``searches``: for each its ``label``, ``is_grid``, ``space`` (field to the ends of its
        range, given or declared, or to its values in the grid), number of trials that
        ``finished``, ``diverged`` and ``failed``, ``best`` (its ``trial``, ``values``,
        ``validation_loss``, ``folder``, and the whole ``run``; None where no trial finished),
        ``edges`` (field to ``lower`` or ``upper``), and its ``trials``.
    """
    return {
        "format": FORMAT,
        **shared_by_all(tuning),
        "searches": [
            _search_summary(tuning, search, study)
            for search, study in zip(tuning.searches, studies, strict=True)
        ],
    }


def shared_by_all(tuning: Tuning) -> dict[str, Any]:
    """What the searches of a folder have in common, so that their optimizers can be compared."""
    return {
        "name": tuning.name,
        "sampler": tuning.sampler,
        "budget": tuning.budget,
        "seed": tuning.searches[0].runs[0].seed,
        "overrides": dict(tuning.overrides),
    }


def check_shared(tuning: Tuning, held: Mapping[str, Any], place: str | Path) -> None:
    """Refuse a place that holds a tuning of which this one would not be a part.

    Args:
        tuning: from `plan_tuning`.
        held: `shared_by_all` of the other one; other keys do not matter.
        place: where that is.

    Raises:
        ValueError: with the fields in which they differ.
    """
    asked = shared_by_all(tuning)
    differing = differing_fields({key: held.get(key) for key in asked}, asked)
    if differing:
        lines = [f"  {field}: {a!r} there, {b!r} here" for field, (a, b) in differing.items()]
        raise ValueError(
            f"{place} holds another tuning, choose another --out; they differ in\n"
            + "\n".join(lines)
        )


def earlier_searches(tuning: Tuning) -> list[dict[str, Any]]:
    """The searches in the summary that the folder has now, of any optimizers.

    Raises:
        ValueError: the summary is damaged, or of another tuning.
    """
    held = _read(tuning.folder)
    if held is None:
        return []
    check_shared(tuning, held, tuning.folder)
    return held["searches"]


def _search_summary(tuning: Tuning, search: Search, study: Any) -> dict[str, Any]:
    attrs = study.user_attrs
    current = current_attempts(study.get_trials(deepcopy=False), tuning.budget)
    trials = [_trial(tuning, search, slot, trial, attrs) for slot, trial in sorted(current.items())]
    by_status = {
        status: [each for each in trials if each["status"] == status]
        for status in ("finished", "diverged", "failed")
    }
    best = min(by_status["finished"], key=lambda each: each["validation_loss"], default=None)
    ended = by_status["finished"] + by_status["diverged"]
    return {
        "label": search.label,
        "is_grid": not search.bounds,
        "space": search.space,
        **{status: len(each) for status, each in by_status.items()},
        "best": best and {**best, "run": to_json(search.run(best["values"]))},
        "edges": best and search.edges(best["values"], [each["values"] for each in ended]),
        "trials": trials,
    }


def _trial(
    tuning: Tuning, search: Search, slot: int, trial: Any, attrs: Mapping[str, Any]
) -> dict[str, Any]:
    values = {field: trial.params[field] for field in search.space}
    found: dict[str, Any] = {"trial": slot, "values": values, "status": "unfinished"}
    found |= {"validation_loss": None, "folder": tuning.arm(search, slot, values).folder.name}
    if trial.state.name == "COMPLETE":
        finished = math.isfinite(trial.value)
        found["status"] = "finished" if finished else "diverged"
        found["validation_loss"] = trial.value if finished else None
    elif trial.state.name == "FAIL":
        error = attrs.get(f"error {slot} {trial.user_attrs['attempt']}", {})
        found |= {"status": "failed", "error": error.get("error", "interrupted")}
    return found


def tuned_runs(
    name: str,
    folder: Path,
    *,
    optimizers: Sequence[str] = (),
) -> tuple[int, list[Run]]:
    """The tuning seed, and for each optimizer the Run with the best values that were found.

    Args:
        name: of the study that was tuned.
        folder: of the tuning.
        optimizers: default all that were tuned.

    Warns:
        UserWarning: for each optimizer of which trials failed.

    Raises:
        ValueError: there is no whole summary in the folder, it is of another study, an optimizer
            was not tuned or none of its trials finished, or the study has changed since.
    """
    held = _read(folder)
    if held is None:
        raise ValueError(
            f"{folder} holds no {SUMMARY}: it is the folder of no tuning, or not yet of a whole one"
        )
    if held["name"] != name:
        raise ValueError(f"{folder} holds the tuning of {held['name']}, not of {name}")
    found = {search["label"]: search for search in held["searches"]}
    unknown = [each for each in optimizers if each not in found]
    if unknown:
        have = ", ".join(found)
        raise ValueError(f"{', '.join(unknown)} was not tuned in {folder}, which has {have}")
    runs = []
    for label in dict.fromkeys(optimizers) or found:
        best = found[label]["best"]
        if best is None:
            raise ValueError(f"no trial of {label} has finished in {folder}")
        if failed := found[label]["failed"]:
            told = f"{label} was tuned with less: {failed} of {held['budget']} trials failed"
            warnings.warn(told, stacklevel=2)
        run = _made_again(held, found[label])
        if changed := differing_fields(best["run"], to_json(run)):
            lines = [f"  {field}: {a!r} then, {b!r} now" for field, (a, b) in changed.items()]
            raise ValueError(
                f"{name} has changed since {label} was tuned in {folder}; tune again, in another "
                "folder; they differ in\n" + "\n".join(lines)
            )
        runs.append(run)
    return held["seed"], runs


def _made_again(held: Mapping[str, Any], search: Mapping[str, Any]) -> Run:
    """The Run with the best values of a search."""
    is_grid = held["sampler"] == "grid"
    # Made by the study, and not read: what a file names is not imported.
    plan = plan_tuning(
        held["name"],
        optimizers=[search["label"]],
        budget=None if is_grid else held["budget"],
        sampler=held["sampler"],
        # All that was searched, since some of it may have been given by ranges.
        ranges={} if is_grid else {short(field): ends for field, ends in search["space"].items()},
        overrides=held["overrides"],
    )
    return plan.searches[0].run(search["best"]["values"])


def _read(folder: Path) -> dict[str, Any] | None:
    """The summary of a tuning, with all that is needed of it; None where there is none."""
    held = RunFolder(folder).read_object(SUMMARY)
    if held is None:
        return None
    kinds = {"name": str, "sampler": str, "budget": int, "seed": int}
    kinds |= {"overrides": dict, "searches": list}
    whole = all(isinstance(held.get(key), kind) for key, kind in kinds.items())
    is_grid = held.get("sampler") == "grid"
    if not whole or not all(_is_search(each, is_grid=is_grid) for each in held["searches"]):
        raise ValueError(f"{folder / SUMMARY} is damaged: it is no summary of a tuning")
    return held


def _is_search(search: Any, *, is_grid: bool) -> bool:
    kinds = {"label": str, "space": dict, "finished": int, "diverged": int, "failed": int}
    kinds |= {"trials": list}
    if not isinstance(search, dict) or "best" not in search:
        return False
    if not all(isinstance(search.get(key), kind) for key, kind in kinds.items()):
        return False
    if not is_grid and not all(map(_is_range, search["space"].values())):
        return False
    best = search["best"]
    return best is None or (
        isinstance(best, dict) and all(isinstance(best.get(key), dict) for key in ("values", "run"))
    )


def _is_range(ends: Any) -> bool:
    return (
        isinstance(ends, list)
        and len(ends) == 2
        and all(isinstance(end, (int, float)) for end in ends)
    )
