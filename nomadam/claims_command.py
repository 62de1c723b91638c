"""The command `nomadam claims`: the trainings behind the claims, and the verdict on each."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from nomadam import terminal
from nomadam.command_options import FAILED, FINISHED, Cache, Json, Traceback, option, out_option
from nomadam.durable_files import write_atomically, write_json
from nomadam.progress import NoProgress
from nomadam.runs import refuse_file

EPILOG = """\b
Examples:
  nomadam claims --dry-run
  nomadam claims --workers 4 --out runs/my_claims
  nomadam claims --setting vit --setting resnet18

"""


def claims(
    chosen: Annotated[
        list[str] | None,
        option(
            "--setting",
            metavar="NAME",
            help="Train for this one only; repeatable.  [default: all that was planned]",
        ),
    ] = None,
    workers: Annotated[
        int, typer.Option("--workers", metavar="N", help="Trainings at a time.", min=1)
    ] = 2,
    out: Annotated[
        Path | None,
        out_option(
            "What is kept of ended trainings, claims.json and claims.md.  [default: results/claims]"
        ),
    ] = None,
    work: Annotated[
        Path | None,
        option("--work", metavar="FOLDER", help="What is in training.  [default: runs/claims]"),
    ] = None,
    page: Annotated[
        Path | None,
        option("--page", metavar="FILE", help="A page whose marked part becomes the tables."),
    ] = None,
    pictures: Annotated[
        Path | None,
        option("--pictures", metavar="FOLDER", help="Draw what is kept, a folder a setting."),
    ] = None,
    cache: Cache = None,
    decide: Annotated[
        bool, typer.Option("--decide", help="Train nothing; decide from what is kept.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what is trained and how long; train nothing.")
    ] = False,
    as_json: Json = False,
    traceback: Traceback = False,
) -> int:
    """Train what the claims rest on, as far as it is not kept already, and decide them.

    Each arm is tuned in as many trials and trained with five other seeds; grids and measurements
    are made with the same five. Whatever has ended is kept, so that the command goes on where it
    was interrupted. What is missing leaves a claim undecided.
    """
    from nomadam.experiments.claim_budget import budget
    from nomadam.experiments.claim_evidence import Evidence
    from nomadam.experiments.claim_plan import SEEDS
    from nomadam.experiments.claim_runs import Places, ended_and_left, train_all
    from nomadam.experiments.claim_settings import SETTINGS
    from nomadam.experiments.claims import verdicts
    from nomadam.reports.claim_pages import check_markers, claims_page, with_claims
    from nomadam.reports.claim_pictures import draw_claims

    known = [setting.name for setting in SETTINGS]
    for name in chosen or ():
        if name not in known:
            raise ValueError(f"--setting {name!r}: must be one of {', '.join(known)}")
    if decide and chosen:
        raise ValueError("--decide takes all that is kept: leave out --setting, or train")
    if decide and dry_run:
        raise ValueError("--decide trains nothing: --dry-run has nothing to tell")
    if page is not None:
        if not page.is_file():
            raise ValueError(f"--page {page} is no file")
        check_markers(page.read_text(encoding="utf-8"))
    settings = tuple(
        each for each in SETTINGS if (each.name in chosen if chosen else not each.afterwards)
    )
    places = Places(kept=out or Path("results/claims"), work=work or Path("runs/claims"))
    for folder in (places.kept, places.work, *([] if pictures is None else [pictures])):
        refuse_file(folder)
    if decide and not any((places.kept / name).is_dir() for name in known):
        raise ValueError(f"--decide: {places.kept} keeps no trainings of {', '.join(known)}")
    if dry_run:
        planned = budget(settings)
        for row, setting in zip(planned["rows"], settings, strict=True):
            row["kept"], row["left_seconds"] = ended_and_left(places, setting)
        later = [] if chosen else [each.name for each in SETTINGS if each.afterwards]
        show_budget(planned, later, as_json=as_json)
        return FINISHED
    failure = None
    try:
        if not decide:
            train_all(
                places,
                settings,
                workers=workers,
                cache=cache,
                make_progress=NoProgress,
                tell=terminal.say,
            )
    except RuntimeError as error:
        # What has ended is decided all the same.
        failure = error
    found = verdicts(Evidence(places))
    places.kept.mkdir(parents=True, exist_ok=True)
    write_json(places.kept / "claims.json", found)
    write_atomically(places.kept / "claims.md", claims_page(found).encode())
    if page is not None:
        filled = with_claims(page.read_text(encoding="utf-8"), found)
        write_atomically(page, filled.encode())
    if pictures is not None:
        draw_claims(places.kept, SEEDS, pictures)
    if as_json:
        terminal.show_json(found)
    else:
        show_claims(found)
        terminal.show(f"tables: {places.kept / 'claims.md'}")
    if failure is not None:
        terminal.say(f"error: {failure}")
        return FAILED
    return FINISHED


def show_budget(planned: Mapping[str, Any], later: Sequence[str], *, as_json: bool) -> None:
    """Print what is trained, how much of it is kept already, and how long the rest takes."""
    if as_json:
        terminal.show_json(planned)
        return
    columns = {"arms": "arms", "trials": "trials", "seeds": "seeds", "runs": "runs", "kept": "kept"}
    columns |= {"run_seconds": "s each", "final_seconds": "s a final", "core_seconds": "s in all"}
    rows = [
        [row["setting"], *(f"{row[key]:g}" if row[key] else terminal.NONE for key in columns)]
        for row in planned["rows"]
    ]
    terminal.show_table(["setting", *columns.values()], rows)
    for row in planned["rows"]:
        terminal.show(f"{row['setting']}: {row['form']}")
    if later:
        terminal.show(f"not among them, unless named by --setting: {', '.join(later)}")
    left = sum(row["left_seconds"] for row in planned["rows"])
    seconds = planned["core_seconds"] + planned["afterwards"]
    terminal.show(f"{seconds / 3600:.1f} hours of one core, of which {left / 3600:.1f} are left")


def show_claims(found: Mapping[str, Any]) -> None:
    """Print the claims and their verdicts."""
    for row in found["claims"]:
        terminal.show(
            f"{row['verdict']:<10} {row['statement']}\n{'':<10} {row['ours']}, n = {row['n']}"
        )
