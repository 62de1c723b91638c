"""Trials that train nothing, for processes that start without torch."""

import dataclasses
import os
import random
import time

from nomadam.experiments.configuration import OptimizerChoice, Run
from nomadam.experiments.search_spaces import Search
from nomadam.experiments.shared_trials import SharedTrials, Worker
from nomadam.experiments.trial_storage import open_storage, open_study, quiet, sqlite_url

LR = "optimizer.lr"
BUDGET = 12


@dataclasses.dataclass(frozen=True)
class Bare:
    """What a Run takes for a model and for data."""

    size: int = 1

    def build(self, *arguments, **options):
        raise NotImplementedError

    loss = tokens_per_row = load = shape = train_batch = validation_batches = build


def bare_run(**changes) -> Run:
    fields = {"name": "bare", "model": Bare(), "data": Bare(), "steps": 12, "batch_size": 1}
    optimizer = OptimizerChoice(name="sgd_sai", lr=1e-2)
    return Run(**{**fields, "optimizer": optimizer, **changes})


def searched(**changes) -> Search:
    return Search(label="sgd_sai", runs=(bare_run(**changes),), bounds={LR: (1e-4, 1e-1)})


def shared(folder, worker, *, budget=BUDGET, search=None, grace_seconds=1e6) -> SharedTrials:
    search = search or searched()
    storage = open_storage(sqlite_url(folder / "tuning.db"))
    return SharedTrials(
        search=search,
        budget=budget,
        study=open_study(storage, "study", search.plan),
        worker=worker,
        suggest=lambda slot, trials: search.values(slot),
        grace_seconds=grace_seconds,
    )


def work_off(folder, name):
    """Work trials off, each some milliseconds long, and log what is begun and what counts."""
    log = os.open(folder / "log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    with quiet(), Worker(folder, name) as worker:
        trials = shared(folder, worker)
        while trials.open_slots():
            if (claim := trials.claim()) is None:
                time.sleep(0.05)
                continue
            os.write(log, f"begun {claim.slot}\n".encode())
            with trials.kept_alive():
                time.sleep(random.random() * 0.05)
            if trials.finish(claim, float(claim.slot)):
                os.write(log, f"counts {claim.slot}\n".encode())
