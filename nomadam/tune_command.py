"""The command `nomadam tune`: the same number of trials for each optimizer, and what they found."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from nomadam import terminal
from nomadam.command_options import (
    DIVERGED,
    FAILED,
    FINISHED,
    NAME,
    Assignments,
    Cache,
    Device,
    DeviceOption,
    DryRun,
    Json,
    Traceback,
    assigned,
    option,
    out_option,
)
from nomadam.progress import NoProgress, Progress

EPILOG = """\b
Examples:
  nomadam tune gpt2_pretraining.demo --budget 16
  nomadam tune gpt2_pretraining.demo --optimizer adamw --optimizer sgd_sai --budget 16 --workers 2
  nomadam tune gpt2_pretraining.demo --optimizer sgd_sai --budget 16 --range lr=1e-3,10
  nomadam compare gpt2_pretraining.demo --tuned runs/tune-gpt2_pretraining.demo-* --seeds 5

"""


def tune(
    name: Annotated[str, NAME],
    optimizers: Annotated[
        list[str] | None,
        option(
            "--optimizer",
            metavar="NAME",
            help="What to tune; repeatable.  [default: adamw, sgdm, sgd_sai]",
        ),
    ] = None,
    budget: Annotated[
        int | None,
        option("--budget", metavar="N", help="Trials of each optimizer; of a grid its cells."),
    ] = None,
    sampler: Annotated[
        str | None,
        option(
            "--sampler",
            metavar="qmc|zoom|tpe|grid",
            help="Quasi-random, the same and at last around the best, optuna's TPE, or all Runs "
            "of NAME.  "
            "[default: grid where NAME returns a list of Runs, else qmc]",
        ),
    ] = None,
    ranges: Annotated[
        list[str] | None,
        option(
            "--range",
            metavar="[OPTIMIZER.]FIELD=LOW,HIGH",
            help="Search lr, weight_decay or an argument here, log-uniformly, and not in the "
            "declared range; repeatable.  A field that is --set is not searched.",
        ),
    ] = None,
    storage: Annotated[
        str | None,
        option(
            "--storage",
            metavar="URL",
            help="Database for several machines, such as postgresql://HOST/NAME.  "
            "[default: an SQLite file in the folder]",
        ),
    ] = None,
    workers: Annotated[
        int, typer.Option("--workers", metavar="N", help="Trainings at a time, here.", min=1)
    ] = 1,
    assignments: Assignments = None,
    out: Annotated[
        Path | None,
        out_option(
            "The folder of the tuning, with the run folders in it.  "
            "[default: runs/tune-NAME-HASH, with the run folders beside it]"
        ),
    ] = None,
    device: DeviceOption = Device.auto,
    cache: Cache = None,
    dry_run: DryRun = False,
    as_json: Json = False,
    traceback: Traceback = False,
) -> int:
    """Train the same number of trials for each optimizer, and find the best values of each.

    All trials have one seed, which the finals leave out: nomadam compare NAME --tuned FOLDER.
    Started again, by one or by several at once, it goes on: what has ended is not trained again,
    and what was killed is taken up at its checkpoint. Other optimizers can be added to a folder,
    with the same budget.
    """
    from nomadam.experiments.estimate import estimate_arms
    from nomadam.experiments.tuning import tune as train_trials
    from nomadam.experiments.tuning_plan import plan_tuning

    planned = plan_tuning(
        name,
        optimizers=optimizers or (),
        budget=budget,
        sampler=sampler,
        ranges=ranges_of(ranges or ()),
        overrides=assigned(assignments),
        out=out,
    )
    options = {"device": device.value, "cache": cache}
    if dry_run:
        comparison = planned.comparison()
        costs = estimate_arms(comparison.arms, options, Progress)
        terminal.show_estimates(comparison, costs, as_json=as_json)
        return FINISHED
    labels = ", ".join(search.label for search in planned.searches)
    terminal.say(f"{name}: {planned.budget} trials each of {labels}\nin {planned.folder}")
    found = train_trials(
        planned,
        storage=storage,
        workers=workers,
        options=options,
        # Several bars would be drawn over one another.
        make_progress=Progress if workers == 1 else NoProgress,
        tell=terminal.say,
    )
    if as_json:
        terminal.show_json({"folder": str(planned.folder), **found})
    else:
        show_tuning(found)
        terminal.show(f"summary: {planned.folder / 'tuning.json'}")
    # Not those that an earlier command has left in the folder.
    asked = {search.label for search in planned.searches}
    searches = [search for search in found["searches"] if search["label"] in asked]
    if any(search["failed"] for search in searches):
        return FAILED
    return FINISHED if all(search["best"] for search in searches) else DIVERGED


def ranges_of(texts: Sequence[str]) -> dict[str, tuple[float, float]]:
    """Read ``--range FIELD=LOW,HIGH``.

    Raises:
        ValueError: for another form.

    Example:
        >>> ranges_of(["sgd_sai.lr=1e-3,10"])
        {'sgd_sai.lr': (0.001, 10.0)}
    """
    found = {}
    for text in texts:
        field, _, ends = text.partition("=")
        try:
            low, high = map(float, ends.split(","))
        except ValueError:
            raise ValueError(
                f"--range {text!r} should be FIELD=LOW,HIGH, as in lr=1e-4,1"
            ) from None
        found[field.strip()] = (low, high)
    return found


def show_tuning(found: Mapping[str, Any]) -> None:
    """Print the best values of each optimizer, and where the search was too narrow."""
    from nomadam.experiments.search_spaces import shown

    heads = ["optimizer", "trials", "diverged", "failed", "validation\nloss", "best values"]
    rows, notes = [], []
    for search in found["searches"]:
        best = search["best"]
        counts = [str(search[key]) for key in ("diverged", "failed")]
        trials = str(search["finished"] + search["diverged"] + search["failed"])
        values = [f"{best['validation_loss']:.4f}", shown(best["values"])] if best else None
        rows.append([search["label"], trials, *counts, *(values or [terminal.NONE] * 2)])
        notes += [edge_note(search, field) for field in search["edges"] or ()]
        errors = {each["error"] for each in search["trials"] if each["status"] == "failed"}
        notes += [f"{search['label']} failed: {error}" for error in sorted(errors)]
    terminal.show_table(heads, rows)
    for note in notes:
        terminal.show(note)


def edge_note(search: Mapping[str, Any], field: str) -> str:
    """Say that a best value lies at an edge, and whether to widen its range or to try more."""
    from nomadam.experiments.search_spaces import outer_edge, short

    name, label, is_grid = short(field), search["label"], search["is_grid"]
    value, edge = search["best"]["values"][field], search["edges"][field]
    # A grid may have cells beside them that are no numbers, and have failed.
    numbers = [each for each in search["space"][field] if isinstance(each, (int, float))]
    low, high = min(numbers), max(numbers)
    if is_grid and value in (low, high):
        return f"{label}: the best {name} {value:g} lies at the {edge} edge of the grid: widen it"
    if not is_grid and (outer := outer_edge(value, low, high)) is not None:
        wider = (low / 10, high) if outer == "lower" else (low, high * 10)
        return (
            f"{label}: the best {name} {value:g} lies at the {outer} edge of its range, "
            f"{low:g} to {high:g}: widen it (--range {label}.{name}={wider[0]:g},{wider[1]:g})"
        )
    beyond = "below" if edge == "lower" else "above"
    where = "" if is_grid else " (a larger --budget, in another --out)"
    return (
        f"{label}: no {name} {beyond} the best one, {value:g}, was tried in {low:g} to {high:g}: "
        f"take more trials{where}"
    )
