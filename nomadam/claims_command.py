"""The command `nomadam claims`: the trainings behind the claims, and the verdict on each."""

from pathlib import Path
from typing import Annotated

import typer

from nomadam import terminal
from nomadam.command_options import Cache, Traceback, option, out_option

EPILOG = """\b
Examples:
  nomadam claims --dry-run
  nomadam claims --workers 2
  nomadam claims --setting vit --setting resnet18

"""


def claims(
    chosen: Annotated[
        list[str] | None,
        option("--setting", metavar="NAME", help="Train for this one only; repeatable."),
    ] = None,
    workers: Annotated[
        int, typer.Option("--workers", metavar="N", help="Trainings at a time.", min=1)
    ] = 2,
    out: Annotated[
        Path | None,
        out_option("Where ended trainings are kept, small.  [default: results/claims]"),
    ] = None,
    work: Annotated[
        Path | None,
        option("--work", metavar="FOLDER", help="What is in training.  [default: runs/claims]"),
    ] = None,
    cache: Cache = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be trained, and how long.")
    ] = False,
    traceback: Traceback = False,
) -> int:
    """Train what the claims rest on, as far as it is not kept already.

    Whatever has ended is kept, so that an interrupted command goes on.
    """
    from nomadam.experiments.claim_runs import Places, train_all
    from nomadam.experiments.claim_settings import SETTINGS

    settings = [each for each in SETTINGS if not chosen or each.name in chosen]
    places = Places(kept=out or Path("results/claims"), work=work or Path("runs/claims"))
    if not dry_run:
        train_all(places, settings, workers=workers, cache=cache, tell=terminal.say)
    return 0
