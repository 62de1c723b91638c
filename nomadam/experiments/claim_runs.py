"""Carry out the trainings behind the claims, by several processes, over several sittings.

A training lives in a folder of the work folder until it has ended. Then what is small of it is
kept, and the rest goes. What is kept is not trained again.
"""

import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nomadam.experiments.child_process import explain, run_in_children
from nomadam.experiments.claim_plan import (
    AT_THE_VALUES_OF,
    CANDIDATES,
    SECOND_SEED,
    SEEDED,
    SEEDS,
    Job,
    Setting,
    folder_name,
    jobs,
    with_seed,
)
from nomadam.experiments.configuration import Run, override, to_json
from nomadam.experiments.kept_runs import keep_run
from nomadam.experiments.search_spaces import Search, Values, shown, zoomed
from nomadam.experiments.study import Study
from nomadam.runs import FolderInUseError, RunFolder

POLL_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where the trainings live.

    Args:
        kept: folder of what is kept, a folder for each setting in it.
        work: folder of what is in training, and of the first stages.
    """

    kept: Path
    work: Path

    def folder(self, setting: Setting, made: Run | Study, seed: int | None = None) -> Path:
        """Where a Run is kept, or a measurement with a seed."""
        return self.kept / setting.name / folder_name(made, seed)

    def result(
        self, setting: Setting, made: Run | Study, seed: int | None = None
    ) -> dict[str, Any] | None:
        """What it has come to, None where it has not ended."""
        folder = RunFolder(self.folder(setting, made, seed))
        try:
            header, result = folder.read_header(), folder.read_result()
        except ValueError:
            return None
        if header is None or header["run"] != to_json(made) or result is None:
            return None
        whole = isinstance(made, Study) or result["status"] == "diverged"
        return result if whole or result.get("validation_loss") is not None else None

    def loss(self, setting: Setting, run: Run) -> float | None:
        """The final validation loss, inf where it diverged, None where it has not ended."""
        result = self.result(setting, run)
        if result is None:
            return None
        return result["validation_loss"] if setting.has_learnt(result) else math.inf


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """How far the tuning of an arm has come.

    Args:
        trials: values and loss of those that have ended, in their order, inf where one diverged.
        again: values and mean loss with both tuning seeds, of the best that were repeated.
        following: the Run that comes next, None where all have ended.
    """

    trials: list[tuple[Values, float]]
    again: list[tuple[Values, float]]
    following: Run | None

    @property
    def best(self) -> Values | None:
        """The values of the best mean; None where none is finite, or not all have ended."""
        finished = [each for each in self.again if math.isfinite(each[1])]
        if self.following is not None or not finished:
            return None
        return min(finished, key=lambda each: each[1])[0]


def tuned(places: Places, setting: Setting, optimizer: str) -> Tuned:
    """How far an arm's tuning has come: of each search trials with one seed, the best with two."""
    found = Tuned(trials=[], again=[], following=None)
    for search in setting.searches(optimizer):
        part = _searched(places, setting, search)
        found = Tuned(
            trials=found.trials + part.trials,
            again=found.again + part.again,
            following=part.following,
        )
        if part.following is not None:
            break
    return found


def _searched(places: Places, setting: Setting, search: Search) -> Tuned:
    trials: list[tuple[Values, float]] = []
    for index in range(setting.trials):
        values = zoomed(search, index, setting.trials, trials)
        run = search.run(values)
        loss = places.loss(setting, run)
        if loss is None:
            return Tuned(trials=trials, again=[], following=run)
        trials.append((values, loss))
    finished = [trial for trial in trials if math.isfinite(trial[1])]
    again: list[tuple[Values, float]] = []
    for values, first in sorted(finished, key=lambda trial: trial[1])[:CANDIDATES]:
        run = seeded(search.run(values), SECOND_SEED)
        second = places.loss(setting, run)
        if second is None:
            return Tuned(trials=trials, again=again, following=run)
        again.append((values, (first + second) / 2))
    return Tuned(trials=trials, again=again, following=None)


def final_runs(places: Places, setting: Setting, optimizer: str) -> list[Run]:
    """The Runs of an arm's best values with the other seeds; none before these are known."""
    source = optimizer if setting.is_tuned(optimizer) else AT_THE_VALUES_OF[optimizer]
    best = tuned(places, setting, source).best
    if best is None:
        return []
    run = override(setting.search(optimizer).run(best), setting.finals)
    return [seeded(run, seed) for seed in SEEDS]


def seeded(run: Run, seed: int) -> Run:
    """The same Run with another seed, which is also that of an arm that draws its gains."""
    run = with_seed(run, seed)
    if run.optimizer.name not in SEEDED:
        return run
    return override(run, {"optimizer.arguments.seed": str(seed)})


def runs_of(places: Places, job: Job) -> list[Run]:
    """The Runs of a job as far as they are known, in the order in which they are trained."""
    if job.optimizer is None:
        assert job.seed is not None
        return [with_seed(run, job.seed) for run in job.setting.cells()]
    finals = final_runs(places, job.setting, job.optimizer)
    if not job.setting.is_tuned(job.optimizer):
        return finals
    search, found = job.setting.search(job.optimizer), tuned(places, job.setting, job.optimizer)
    runs = [search.run(values) for values, _ in found.trials]
    runs += [seeded(search.run(values), SECOND_SEED) for values, _ in found.again]
    return [*runs, found.following] if found.following is not None else [*runs, *finals]


def next_run(places: Places, job: Job) -> Run | None:
    """The Run that a job trains next, None where it is done."""
    runs = runs_of(places, job)
    return next((run for run in runs if places.result(job.setting, run) is None), None)


def ended_and_left(places: Places, setting: Setting) -> tuple[int, float]:
    """How many trainings or measurements of a setting have ended, and seconds of the others."""
    if setting.measured:
        studies = setting.studies()
        ended = sum(places.result(setting, studies[seed], seed) is not None for seed in studies)
        return ended, setting.seconds - ended * setting.run_seconds
    runs = [run for job in jobs((setting,)) for run in runs_of(places, job)]
    ended = [run for run in runs if places.result(setting, run) is not None]
    finals = sum(run.seed in SEEDS for run in ended)
    spent = (len(ended) - finals) * setting.run_seconds
    spent += finals * (setting.final_seconds or setting.run_seconds)
    spent += setting.first_stage_seconds * bool(ended)
    return len(ended), setting.seconds - spent


def is_ready(places: Places, job: Job) -> bool:
    """Whether the values are known at which an arm without trials of its own is trained."""
    if job.optimizer is None or job.setting.is_tuned(job.optimizer):
        return True
    return tuned(places, job.setting, AT_THE_VALUES_OF[job.optimizer]).following is None


def is_done(places: Places, job: Job) -> bool:
    """Whether all trainings or measurements of a job have ended."""
    if not job.setting.measured:
        return is_ready(places, job) and next_run(places, job) is None
    assert job.seed is not None
    study = job.setting.studies()[job.seed]
    return places.result(job.setting, study, job.seed) is not None


def work_off(
    places: Places,
    settings: Sequence[Setting],
    cache: Path | None,
    make_progress: Callable[[str, int], Any],
    tell: Callable[[str], None],
) -> None:
    """Take jobs that no other process is at until all are done; called in a worker's process.

    Raises:
        RuntimeError: some trainings failed; all others have been made.
    """
    import torch

    if not any(setting.alone for setting in settings):
        torch.set_num_threads(1)
    left, failures = jobs(tuple(settings)), []
    while left:
        busy = []
        for job in left:
            if not is_ready(places, job):
                # Its source is at work elsewhere, or comes later here; else it has failed.
                if any(other.serves(job) for other in left):
                    busy.append(job)
                continue
            lock = RunFolder(places.work / job.setting.name / job.label)
            try:
                with lock.locked("working"):
                    _do(places, job, cache, make_progress, tell)
            except FolderInUseError:
                busy.append(job)
            except Exception as error:
                failures.append(f"{job.setting.name} {job.label}: {explain(error)}")
                tell(f"failed: {failures[-1]}")
        left = busy
        if left:
            time.sleep(POLL_SECONDS)
    if failures:
        raise RuntimeError("; ".join(failures))


def _do(
    places: Places,
    job: Job,
    cache: Path | None,
    make_progress: Callable[[str, int], Any],
    tell: Callable[[str], None],
) -> None:
    if job.setting.measured:
        assert job.seed is not None
        _measure(places, job.setting, job.seed, cache, make_progress, tell)
        return
    from nomadam.experiments.training import train

    for run in runs_of(places, job):
        # A process that was killed may have left what it had kept.
        if places.result(job.setting, run) is not None:
            shutil.rmtree(places.work / job.setting.name / folder_name(run), ignore_errors=True)
    while (run := next_run(places, job)) is not None:
        began = time.monotonic()
        name = folder_name(run)
        folder = places.work / job.setting.name / name
        result = train(run, folder, device="cpu", cache=cache)
        keep_run(folder, places.folder(job.setting, run))
        shutil.rmtree(folder)
        values: Values = {"lr": run.optimizer.lr, "weight_decay": run.optimizer.weight_decay}
        values |= run.optimizer.arguments
        finished = result["status"] == "finished"
        loss = f"validation loss {result['validation_loss']:.4f}" if finished else "diverged"
        tell(
            f"{job.setting.name} {run.optimizer.name} seed {run.seed} ({shown(values)}): {loss}, "
            f"{time.monotonic() - began:.0f} s"
        )


def _measure(
    places: Places,
    setting: Setting,
    seed: int,
    cache: Path | None,
    make_progress: Callable[[str, int], Any],
    tell: Callable[[str], None],
) -> None:
    study = setting.studies()[seed]
    folder = places.work / setting.name / folder_name(study, seed)
    if places.result(setting, study, seed) is None:
        began = time.monotonic()
        study.execute(folder, make_progress=make_progress, device="cpu", cache=cache)
        keep_run(folder, places.folder(setting, study, seed))
        tell(f"{setting.name} seed {seed}: {time.monotonic() - began:.0f} s")
    # Of a process that was killed too. A study may have trained beside its folder.
    for left in folder.parent.glob(f"{folder.name}*"):
        shutil.rmtree(left)


def train_all(
    places: Places,
    settings: Sequence[Setting],
    *,
    workers: int,
    cache: Path | None,
    make_progress: Callable[[str, int], Any],
    tell: Callable[[str], None],
) -> None:
    """Train what has not ended yet, in several processes of one thread each.

    Args:
        places: where.
        settings: what.
        workers: how many processes, at least 1.
        cache: folder of prepared data, None for the user's.
        make_progress: makes a progress line of a measurement from label and steps; picklable.
        tell: takes a line about each training that has ended; a picklable callable.

    Raises:
        ValueError: for fewer workers.
        RuntimeError: some trainings failed; all others have been made.
        KeyboardInterrupt: interrupted; what was in training has written its checkpoint.
    """
    if workers < 1:
        raise ValueError(f"workers = {workers}: must be at least 1")
    together = tuple(setting for setting in settings if not setting.alone)
    clocked = tuple(setting for setting in settings if setting.alone)
    rest = (cache, make_progress, tell)
    outcomes = []
    if together:
        outcomes += run_in_children(work_off, [(places, together, *rest)] * workers)
    if clocked:
        outcomes += run_in_children(work_off, [(places, clocked, *rest)])
    errors = dict.fromkeys(each.error for each in outcomes if each.error is not None)
    # Else the others have done what a process that died or failed has left.
    if errors and not all(is_done(places, job) for job in jobs(tuple(settings))):
        raise RuntimeError("; ".join(errors))
