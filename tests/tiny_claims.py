"""Settings of trainings of milliseconds, ways to work them off, and kills at chosen places."""

import json
import os

from tiny_training import Fragile, Gone, tiny_run

from nomadam.experiments import claim_runs
from nomadam.experiments.claim_plan import Setting
from nomadam.experiments.claim_runs import Places, work_off
from nomadam.experiments.configuration import Run
from nomadam.progress import NoProgress
from nomadam.runs import TIMINGS

HERE = "tiny_claims"
UNLIKE = {*TIMINGS, "first_optimizer_ms", "baseline_memory_mb"}


def tiny(optimizer: str = "sgd_sai") -> Run:
    return tiny_run(optimizer, name=f"{HERE}.tiny", steps=9, evaluate_every=2)


def fragile(optimizer: str = "sgdm") -> Run:
    return tiny_run(optimizer, name=f"{HERE}.fragile", model=Fragile(), steps=6)


def hopeless(optimizer: str = "sgdm") -> Run:
    return tiny_run(optimizer, name=f"{HERE}.hopeless", model=Fragile(limit=0.0), steps=6)


def broken(optimizer: str = "adamw") -> Run:
    return tiny_run(optimizer, name=f"{HERE}.broken", data=Gone(), steps=2)


def grid() -> list[Run]:
    return [tiny_run("sgdm", lr, name=f"{HERE}.grid", steps=9) for lr in (1e-3, 1e-2, 1e-1)]


def setting(name: str, *optimizers: str, **changes) -> Setting:
    return Setting(
        **{
            "name": f"short_{name}",
            "study": f"{HERE}.{name}",
            "optimizers": optimizers,
            "run_seconds": 1,
            **changes,
        }
    )


TINY = setting("tiny", "adamw", "sgd_sai", overrides={"steps": "4"})
GRID = setting("grid", overrides={"steps": "2"})
SQUARES = setting("squares", study="test_study.squares", measured=True)


def work_in_one_process(places, settings, log, barrier=None):
    """Work settings off as a worker does, and log every training that has ended."""
    claim_runs.POLL_SECONDS = 0.05
    file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    if barrier is not None:
        barrier.wait(600)
    claim_runs.work_off(
        places, settings, None, NoProgress, lambda line: os.write(file, f"{line}\n".encode())
    )


def places_in(folder):
    return Places(kept=folder / "kept", work=folder / "work")


def work(places, *settings):
    """Work settings off in this process; the lines that were told."""
    lines = []
    work_off(places, settings, None, NoProgress, lines.append)
    return lines


def kept(places):
    """What is kept, without what differs from one time to the next."""
    found = {}
    for path in sorted(each for each in places.kept.rglob("*") if each.is_file()):
        if path.name != "environment.json":
            text = path.read_text()
            lines = text.splitlines() if path.suffix == ".jsonl" else [text]
            contents = [json.loads(line) for line in lines]
            found[str(path.relative_to(places.kept))] = [
                {key: value for key, value in each.items() if key not in UNLIKE}
                for each in contents
            ]
    return found


def left(places):
    """Run folders that are still in the work folder, whole or in parts."""
    return [path for path in places.work.glob("*/*") if "-" in path.name.removeprefix("seed-")]


class Killed(BaseException):
    """What a kill is to a process: nothing catches it."""


def killed(*arguments, **options):
    raise Killed


def after(calls, function):
    """The function, and a kill in the place of its next call."""
    count = 0

    def counted(*arguments, **options):
        nonlocal count
        count += 1
        if count > calls:
            raise Killed
        return function(*arguments, **options)

    return counted


def not_removed(folder, **options):
    if folder.exists():
        raise Killed


def half_removed(folder, **options):
    if folder.exists():
        for name in ("result.json", "run.json", "metrics.jsonl"):
            (folder / name).unlink()
        raise Killed
