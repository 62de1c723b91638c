"""The command line: nomadam run | compare | tune | claims | list | report | profile."""

import functools
import hashlib
import json
import shlex
import signal
import sys
import threading
import traceback as traceback_module
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

try:
    import typer
except ImportError:
    sys.exit('the command line needs typer and rich: pip install "nomadam[lab]"')

from nomadam import claims_command, compare_command, profile_command, terminal, tune_command
from nomadam.command_options import (
    BAD_INPUT,
    DIVERGED,
    FAILED,
    FINISHED,
    INTERRUPTED,
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
    from nomadam.experiments.configuration import Run
    from nomadam.experiments.study import Study

EXIT_CODES = """\b
Exit codes:
  0    finished
  1    failed; of a comparison: an arm failed
  2    bad usage or input
  3    a training diverged
  130  interrupted (Ctrl-C, SIGTERM); the same command goes on"""

app = typer.Typer(
    name="nomadam",
    help="Train deep networks with SGD instead of Adam, and compare what it costs.",
    epilog="""\b
Examples:
  nomadam list
  nomadam compare gpt2_pretraining.demo
  nomadam run gpt2_pretraining.demo --set steps=50
  nomadam report runs/compare-gpt2_pretraining.demo-*

"""
    + EXIT_CODES,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _command(function: Callable[..., int], *, alone: bool = False) -> Callable[..., None]:
    """Turn the exceptions of a command into one message and an exit code.

    Several processes of a launcher may carry it out together, unless it is `alone`.
    """

    @functools.wraps(function)
    def wrapped(*args: Any, traceback: bool, **options: Any) -> None:
        try:
            if alone:
                processes.refuse_several(f"nomadam {function.__name__}")
            code = function(*args, traceback=traceback, **options)
        except KeyboardInterrupt as error:
            if processes.is_first():
                terminal.say(f"{str(error) or 'interrupted'}\nto go on:\n  {_same_command()}")
            code = INTERRUPTED
        except Exception as error:
            from nomadam.experiments.child_process import explain

            if traceback:
                traceback_module.print_exc()
            terminal.say_error(explain(error))
            code = BAD_INPUT if isinstance(error, ValueError) else FAILED
        raise typer.Exit(code)

    return wrapped


def _same_command() -> str:
    """Give the command line that goes on; --again would begin anew."""
    return shlex.join(["nomadam", *(word for word in sys.argv[1:] if word != "--again")])


@app.command(
    short_help="Train one Run, or carry out one study.",
    epilog="""\b
Examples:
  nomadam run gpt2_pretraining.demo
  nomadam run gpt2_pretraining.demo --set steps=50 --set optimizer.lr=3e-2
  nomadam run gpt2_pretraining.demo --optimizer adamw --dry-run
  nomadam run my_studies.tiny --out /tmp/tiny
  nomadam run --from results/some_run

"""
    + EXIT_CODES,
)
@_command
def run(
    name: Annotated[str | None, NAME] = None,
    optimizer: Annotated[
        str | None,
        option(
            "--optimizer", metavar="NAME", help="Choose the optimizer, at its own learning rate."
        ),
    ] = None,
    assignments: Assignments = None,
    source: Annotated[
        Path | None,
        option("--from", metavar="FOLDER", help="Repeat the run of this folder, in another."),
    ] = None,
    out: Annotated[
        Path | None,
        out_option(
            "The run folder; a first stage and what a study trains are put beside it.  "
            "[default: runs/NAME-HASH, a hash of the whole Run]"
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
    """Train one Run, or carry out one study.

    Started again it goes on where it stopped, or prints its result.
    """
    from nomadam.experiments.catalog import default_folder, make_one, read_run
    from nomadam.experiments.configuration import override, to_json

    if name is not None and source is None:
        chosen = make_one(name, optimizer=optimizer)
    elif source is not None and name is None and optimizer is None:
        chosen = read_run(source)
    else:
        raise ValueError("give either a NAME, as `nomadam list` shows them, or --from FOLDER")
    made = override(chosen, assigned(assignments))
    folder = out or default_folder(made, repeats=source)
    if (folder / "comparison.json").exists():
        raise ValueError(f"{folder} holds a comparison, so a run can not be put there")
    if source is not None and folder.resolve() == source.resolve():
        raise ValueError(f"--out {folder} is the run that --from is to repeat; choose another")
    options = {"device": device.value, "cache": cache}
    if dry_run:
        processes.refuse_several("--dry-run")
        cost = _estimate(made, folder, options)
        terminal.show_estimate(folder, to_json(made), cost, as_json=as_json)
        return FINISHED
    again = again and not processes.restarts()
    ended = (folder / "result.json").exists() and not again
    result = _execute(made, folder, options | {"again": again, "tensorboard": tensorboard})
    if processes.is_first():
        terminal.show_result(folder, result, ended=ended, as_json=as_json)
        if source is not None:
            terminal.show_repetition(source, folder)
    return FINISHED if result["status"] == "finished" else DIVERGED


def _estimate(made: "Run | Study", folder: Path, options: dict[str, Any]) -> dict[str, Any] | None:
    """What a Run would cost; of a study nothing is known beforehand."""
    from nomadam.experiments.comparison import Arm
    from nomadam.experiments.configuration import Run
    from nomadam.experiments.estimate import estimate_arm

    if not isinstance(made, Run):
        return None
    return estimate_arm(Arm(label=made.optimizer.name, run=made, folder=folder), options, Progress)


def _execute(made: "Run | Study", folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    from nomadam.experiments.comparison import Arm, train_arm
    from nomadam.experiments.configuration import Run

    if isinstance(made, Run):
        arm = Arm(label=made.optimizer.name, run=made, folder=folder)
        return train_arm(arm, options, Progress)
    if options.pop("tensorboard"):
        raise ValueError(f"--tensorboard is for trainings, and {made.name} is a study of its own")
    processes.refuse_several(f"the study {made.name}")
    return made.execute(folder, make_progress=Progress, tell=terminal.say, **options)


app.command(
    "compare", short_help=compare_command.SUMMARY, epilog=compare_command.EPILOG + EXIT_CODES
)(_command(compare_command.compare))


@app.command(
    "list",
    epilog="""\b
Examples:
  nomadam list
  nomadam list --json

"""
    + EXIT_CODES,
)
@_command
def list_runs(as_json: Json = False, traceback: Traceback = False) -> int:
    """List the runs by name, a line each."""
    from nomadam.experiments.catalog import catalog

    terminal.show_catalog(catalog(), as_json=as_json)
    return FINISHED


@app.command(
    short_help="Write the report on some folders.",
    epilog="""\b
Examples:
  nomadam report runs/compare-gpt2_pretraining.demo-*
  nomadam report runs/gpt2_pretraining.demo-* --out reports/all_demos

"""
    + EXIT_CODES,
)
@_command
def report(
    folders: Annotated[
        list[Path], typer.Argument(metavar="FOLDER", help="Run folders and comparison folders.")
    ],
    out: Annotated[
        Path | None, out_option("Where to write.  [default: FOLDER; of several, runs/report-HASH]")
    ] = None,
    as_json: Json = False,
    traceback: Traceback = False,
) -> int:
    """Write report.md, report.html and the figures on finished or unfinished runs."""
    if out is None and len(folders) == 1:
        out = folders[0]
    elif out is None:
        names = json.dumps(sorted(str(folder.resolve()) for folder in folders))
        out = Path("runs", f"report-{hashlib.sha256(names.encode()).hexdigest()[:8]}")
    rows, paths = terminal.show_report(folders, out, as_json=as_json)
    if as_json:
        terminal.show_json({"rows": rows, "report": paths})
    return FINISHED


app.command("tune", epilog=tune_command.EPILOG + EXIT_CODES)(
    _command(tune_command.tune, alone=True)
)
app.command("claims", epilog=claims_command.EPILOG + EXIT_CODES)(
    _command(claims_command.claims, alone=True)
)
app.command("profile", epilog=profile_command.EPILOG + EXIT_CODES)(
    _command(profile_command.profile, alone=True)
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code.

    Args:
        arguments: the words after ``nomadam``; default those of this process.

    Returns:
        0 finished, 1 failed, 2 bad usage or input, 3 a training diverged, 130 interrupted.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        processes.index()
    except ValueError as error:
        terminal.say(f"error: {error}")
        return BAD_INPUT
    before = None
    if threading.current_thread() is threading.main_thread():
        # While a training runs it answers SIGTERM itself; elsewhere, and for a comparison's
        # process, SIGTERM is a Ctrl-C.
        before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            app(args=words, prog_name="nomadam")
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else FAILED
    except KeyboardInterrupt:
        return INTERRUPTED
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)
    return FINISHED


def _show_warning(message: Warning | str, *where: Any, **more: Any) -> None:
    if processes.is_first():
        terminal.say(f"warning: {' '.join(str(message).split())}")


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt
