"""The command `nomadam compare`: several optimizers on one study, side by side."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nomadam import terminal
from nomadam.command_options import (
    BAD_INPUT,
    DIVERGED,
    FAILED,
    FINISHED,
    NAME,
    Again,
    Assignments,
    Cache,
    Device,
    DeviceOption,
    DryRun,
    Json,
    Tensorboard,
    Traceback,
    assigned,
    option,
    out_option,
)
from nomadam.experiments import processes
from nomadam.progress import Progress

if TYPE_CHECKING:
    from nomadam.experiments.comparison import ArmOutcome

SUMMARY = "Train with several optimizers and report on them."
EPILOG = """\b
Examples:
  nomadam compare gpt2_pretraining.demo
  nomadam compare gpt2_pretraining.demo --optimizer adamw --optimizer lion --seeds 3
  nomadam compare gpt2_pretraining.demo --set steps=50
  nomadam compare gpt2_pretraining.demo_learning_rates
  nomadam compare gpt2_pretraining.demo --tuned runs/tune-gpt2_pretraining.demo-*

"""


def compare(
    name: Annotated[str, NAME],
    optimizers: Annotated[
        list[str] | None,
        option(
            "--optimizer",
            metavar="NAME",
            help="An arm, at its own learning rate; repeatable.  [default: adamw, sgdm, sgd_sai]",
        ),
    ] = None,
    tuned: Annotated[
        Path | None,
        option(
            "--tuned",
            metavar="FOLDER",
            help="The finals: each arm with the best values of `nomadam tune`, on other seeds.",
        ),
    ] = None,
    seeds: Annotated[
        int | None,
        typer.Option(
            "--seeds",
            metavar="N",
            help="Seeds an arm, one Run each.  [default: 1, or 5 with --tuned]",
            min=1,
        ),
    ] = None,
    assignments: Assignments = None,
    out: Annotated[
        Path | None,
        out_option(
            "The comparison folder, with the run folders in it.  "
            "[default: runs/compare-NAME-HASH, with the run folders beside it]"
        ),
    ] = None,
    device: DeviceOption = Device.auto,
    cache: Cache = None,
    again: Again = False,
    tensorboard: Tensorboard = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    traceback: Traceback = False,
) -> int:
    """Train one Run for each optimizer and seed, and report on them side by side.

    A function that returns a list of Runs is a grid: each of them is an arm. With --tuned each
    optimizer has the best values that were found for it, and seeds that follow the tuning's. Each
    arm is trained in a process of its own; one that diverges or fails is recorded and the next one
    starts. Started again it goes on where it stopped, and trains no arm twice.
    """
    from nomadam.experiments import comparison as comparing
    from nomadam.experiments import joint_calls
    from nomadam.experiments.estimate import estimate_arms

    if not processes.is_first():
        joint_calls.follow(terminal.say_error)
        return FINISHED

    planned = comparing.plan_comparison(
        name,
        optimizers=optimizers or (),
        tuned=tuned,
        num_seeds=seeds or (1 if tuned is None else 5),
        overrides=assigned(assignments),
        out=out,
    )
    options = {"device": device.value, "cache": cache}
    if dry_run:
        processes.refuse_several("--dry-run")
        costs = estimate_arms(planned.arms, options, Progress)
        terminal.show_estimates(planned, costs, as_json=as_json)
        return FINISHED
    terminal.say(terminal.plan_line(planned))
    with joint_calls.leading() as call:
        outcomes = comparing.run_arms(
            planned,
            options=options | {"tensorboard": tensorboard},
            make_progress=Progress,
            tell=functools.partial(terminal.tell_outcome, traceback=traceback),
            call=call,
            again=again and not processes.restarts(),
        )
    terminal.show_comparison(planned, outcomes, as_json=as_json)
    return _exit_code(outcomes)


def _exit_code(outcomes: "Sequence[ArmOutcome]") -> int:
    statuses = {outcome.status for outcome in outcomes}
    if statuses == {"failed"} and all(outcome.bad_input for outcome in outcomes):
        return BAD_INPUT
    if "failed" in statuses:
        return FAILED
    return DIVERGED if "diverged" in statuses else FINISHED
