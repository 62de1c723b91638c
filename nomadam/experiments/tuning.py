"""Fair tuning: for each optimizer the same number of trials of its own search space, on optuna.

Every trial is an ordinary run folder with the tuning seed, trained to its end: early leaders are
not final leaders, so none is pruned. The finals take other seeds (``nomadam compare --tuned``).
"""

import contextlib
import functools
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nomadam.experiments.child_process import Outcome, run_in_child, run_in_children
from nomadam.experiments.comparison import Arm, check_arms, ended_result, train_arm
from nomadam.experiments.search_spaces import Search, Values, shown, suggested, zoomed
from nomadam.experiments.shared_trials import Claim, SharedTrials, Worker, forget_dead_workers
from nomadam.experiments.trial_storage import open_storage, open_study, quiet, sqlite_url
from nomadam.experiments.tuning_plan import Tuning
from nomadam.experiments.tuning_summary import (
    SUMMARY,
    check_shared,
    earlier_searches,
    shared_by_all,
    summary_of,
)
from nomadam.runs import FolderInUseError, RunFolder, refuse_file

POLL_SECONDS = 2.0


def tune(
    tuning: Tuning,
    *,
    storage: str | None = None,
    workers: int = 1,
    options: Mapping[str, Any],
    make_progress: Callable[[str, int], Any],
    tell: Callable[[str], None],
) -> dict[str, Any]:
    """Train all trials, each in a fresh process, and write the summary.

    Started again, or on several machines at once with one database, it goes on: a trial that has
    ended is not trained again, and one whose process has died is taken up at its checkpoint.

    Args:
        tuning: from `plan_tuning`.
        storage: URL of the database; default an SQLite file in the tuning's folder.
        workers: processes that train side by side here, at least 1.
        options: keyword arguments of ``train``: device, cache.
        make_progress: makes a progress line from label and steps; a picklable callable.
        tell: takes a line about a trial that has ended; a picklable callable.

    Returns:
        The content of ``tuning.json``: the searches of this tuning, and those of other optimizers
        that were tuned in the folder before.

    Raises:
        ValueError: before any training: what can not be trained, a storage that can not be opened,
            a study that holds another search, a folder that holds a tuning of another budget,
            sampler or study.
        RuntimeError: a worker failed.
        KeyboardInterrupt: interrupted; the trials in training have written their checkpoints.
    """
    if workers < 1:
        raise ValueError(f"workers = {workers}: must be at least 1")
    refuse_file(tuning.folder)
    _check_folder(tuning)
    earlier_searches(tuning)  # refuses those of another tuning
    first = [tuning.arm(each, 0, each.values(0)) for each in tuning.searches]
    if new := [arm for arm in first if ended_result(arm) is None]:
        _raise_first([run_in_child(check_arms, new, dict(options))])
    tuning.folder.mkdir(parents=True, exist_ok=True)
    url = storage or sqlite_url(tuning.folder / "tuning.db")
    with quiet():
        with _alone(tuning.folder, "opening its database"):
            studies = _studies(tuning, url)
        outcomes = []
        rest = (uuid.uuid4().hex, workers, dict(options), make_progress, tell)
        if workers == 1:
            _work_off(tuning, studies, *rest)
        else:
            outcomes = run_in_children(work, [(tuning, url, *rest)] * workers)
        summary = summary_of(tuning, studies)
    ended = sum(search["finished"] + search["diverged"] for search in summary["searches"])
    if ended < tuning.budget * len(tuning.searches):
        # Else the others have done what a worker that died has left.
        _raise_first(outcomes)
    with _alone(tuning.folder, "summing up"):
        # Read now, since a command that tunes other optimizers may have ended in the meantime.
        searches = (*earlier_searches(tuning), *summary["searches"])
        summary["searches"] = list({each["label"]: each for each in searches}.values())
        RunFolder(tuning.folder).write_json(SUMMARY, summary)
        forget_dead_workers(tuning.folder)
    return summary


def _check_folder(tuning: Tuning) -> None:
    if (tuning.folder / "run.json").exists():
        raise ValueError(f"{tuning.folder} holds a run, so a tuning can not be put there")


def _raise_first(outcomes: Sequence[Outcome]) -> None:
    for outcome in outcomes:
        if outcome.error is not None:
            raise (ValueError if outcome.bad_input else RuntimeError)(outcome.error)


def _studies(tuning: Tuning, url: str) -> list[Any]:
    """Open the optuna study of each search."""
    storage = open_storage(url)
    import optuna

    # Of the folder's own name, so that the same command finds them on every machine.
    name = tuning.folder.resolve().name
    for held in optuna.get_all_study_names(storage):
        if held.startswith(f"{name}/"):
            attrs = optuna.load_study(study_name=held, storage=storage).user_attrs
            check_shared(tuning, attrs.get("tuning", shared_by_all(tuning)), held)
    studies = [open_study(storage, f"{name}/{each.label}", each.plan) for each in tuning.searches]
    for study in studies:
        if "tuning" not in study.user_attrs:
            study.set_user_attr("tuning", shared_by_all(tuning))
    return studies


def work(tuning: Tuning, url: str, *rest: Any) -> None:
    """Work trials off until all have ended; called in a process of its own, a worker's."""
    with quiet():
        _work_off(tuning, _studies(tuning, url), *rest)


def _work_off(
    tuning: Tuning,
    studies: Sequence[Any],
    session: str,
    workers: int,
    options: dict[str, Any],
    make_progress: Callable[[str, int], Any],
    tell: Callable[[str], None],
) -> None:
    """Take trials until all have ended, here or elsewhere."""
    with Worker(tuning.folder, session) as worker:
        shared = [
            SharedTrials(
                search=search,
                budget=tuning.budget,
                study=study,
                worker=worker,
                suggest=functools.partial(_suggest, tuning, search),
            )
            for search, study in zip(tuning.searches, studies, strict=True)
        ]
        train = functools.partial(_train, tuning, options, make_progress, workers)
        waiting = False
        while unfinished := [trials for trials in shared if trials.open_slots()]:
            # The one that is least far first, so that what is interrupted can be compared.
            unfinished.sort(key=lambda trials: len(trials.current()))
            claims = ((trials, trials.claim()) for trials in unfinished)
            taken = next(((trials, claim) for trials, claim in claims if claim is not None), None)
            if taken is not None:
                tell(_train_claim(*taken, train))
                waiting = False
                continue
            if not waiting:
                count = sum(len(trials.open_slots()) for trials in unfinished)
                tell(f"waiting for {count} trial{'s' * (count != 1)} in training elsewhere")
            waiting = True
            time.sleep(POLL_SECONDS)


def _suggest(tuning: Tuning, search: Search, slot: int, trials: Sequence[Any]) -> Values:
    if tuning.sampler == "tpe":
        return suggested(search, slot, tuning.budget, trials)
    if tuning.sampler == "zoom":
        ended = [(each.params, each.value) for each in trials if each.state.name == "COMPLETE"]
        return zoomed(search, slot, tuning.budget, ended)
    return search.values(slot)


def _train(
    tuning: Tuning,
    options: dict[str, Any],
    make_progress: Callable[[str, int], Any],
    workers: int,
    search: Search,
    claim: Claim,
) -> Outcome:
    """Train the Run of a claim in a fresh process, unless it has ended before."""
    arm = tuning.arm(search, claim.slot, claim.values)
    # The process that had it before may still be writing its checkpoint.
    with _alone(arm.folder, "training"):
        result = ended_result(arm)
    if result is not None:
        return Outcome(value=result)
    return run_in_child(train_beside, arm, options, make_progress, workers)


def train_beside(
    arm: Arm, options: dict[str, Any], make_progress: Callable[[str, int], Any], workers: int
) -> dict[str, Any]:
    """Train an arm in this process with its share of the processor; called in a child process."""
    import torch

    torch.set_num_threads(max(1, torch.get_num_threads() // workers))
    return train_arm(arm, options, make_progress)


def _train_claim(
    trials: SharedTrials, claim: Claim, train: Callable[[Search, Claim], Outcome]
) -> str:
    """Train a claim, record what became of it, and put that into a line."""
    search = trials.search
    title = f"{search.label} {claim.slot + 1}/{trials.budget} ({shown(claim.values)})"
    try:
        with trials.kept_alive():
            outcome = train(search, claim)
    except BaseException:
        with contextlib.suppress(Exception):
            trials.give_back(claim)
        raise
    if outcome.error is not None:
        trials.give_back(claim, outcome.error, last=outcome.bad_input)
        return f"{title}: failed: {outcome.error}"
    loss = outcome.value["validation_loss"] if outcome.value["status"] == "finished" else None
    counts = trials.finish(claim, loss)
    words = f"validation loss {loss:.4f}" if loss is not None else "diverged"
    return f"{title}: {words}" + ("" if counts else ", recorded by another process")


@contextlib.contextmanager
def _alone(folder: Path, doing: str) -> Iterator[None]:
    """A context in which this process has a folder's lock; it waits for it."""
    with contextlib.ExitStack() as stack:
        while True:
            try:
                stack.enter_context(RunFolder(folder).locked(doing))
                break
            except FolderInUseError:
                time.sleep(POLL_SECONDS / 4)
        yield
