"""The options that several commands have in common."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

# What a command ends with.
FINISHED, FAILED, BAD_INPUT, DIVERGED, INTERRUPTED = 0, 1, 2, 3, 130


class Device(StrEnum):
    """Where to train."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"
    mps = "mps"


def option(*names: str, help: str, metavar: str | None = None) -> Any:
    """An option by its names, its help and what stands for its value."""
    return typer.Option(*names, help=help, metavar=metavar)


NAME = typer.Argument(
    metavar="NAME", help="Dotted name from `nomadam list`, or of any function that returns a Run"
)
Again = Annotated[
    bool, option("--again", help="Train from the start, though the folder has a result.")
]
Assignments = Annotated[
    list[str] | None,
    option(
        "--set",
        metavar="FIELD=VALUE",
        help="Change a field of the Run, such as optimizer.lr=3e-4; repeatable.",
    ),
]
Cache = Annotated[
    Path | None,
    option(
        "--cache",
        metavar="FOLDER",
        help="Where prepared data is kept.  [default: nomadam in the user's cache folder]",
    ),
]
DeviceOption = Annotated[Device, option("--device", help="Where to train.")]
DryRun = Annotated[
    bool,
    option("--dry-run", help="Show what would run, its size, and its time from a few steps."),
]
Json = Annotated[bool, option("--json", help="Print the result as JSON.")]
Tensorboard = Annotated[bool, option("--tensorboard", help="Write TensorBoard event files too.")]
Traceback = Annotated[bool, option("--traceback", help="Show the traceback of an error.")]


def out_option(what: str) -> Any:
    """The option ``--out``, by what it is the folder of."""
    return option("--out", metavar="FOLDER", help=what)


def assigned(assignments: list[str] | None) -> dict[str, str]:
    """Read ``--set FIELD=VALUE``.

    Raises:
        ValueError: for another form.

    Example:
        >>> assigned(["steps=50", "optimizer.lr=3e-4"])
        {'steps': '50', 'optimizer.lr': '3e-4'}
    """
    pairs = {}
    for assignment in assignments or []:
        field, equals, value = assignment.partition("=")
        if not equals or not field.strip():
            raise ValueError(f"--set {assignment!r} should be FIELD=VALUE, as in optimizer.lr=3e-4")
        pairs[field.strip()] = value
    return pairs
