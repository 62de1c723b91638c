import multiprocessing
import random
import time

import pytest
from test_comparison import in_this_process
from tiny_training import assert_same_training, go
from tiny_tunings import HERE, TuneHere

from nomadam.experiments import tuning
from nomadam.experiments.trial_storage import sqlite_url
from nomadam.experiments.tuning import work
from nomadam.experiments.tuning_plan import plan_tuning
from nomadam.tune_command import NoProgress

METHODS = multiprocessing.get_all_start_methods()
# A server that has loaded torch once makes the processes, where the system has such.
CONTEXT = multiprocessing.get_context("forkserver" if "forkserver" in METHODS else "spawn")

# What a worker would import before its first step, most of it inside functions.
LOADED = [
    "nomadam.experiments.training",
    "accelerate",
    "torch._dynamo",
    "optuna",
    "alembic.command",
]


@pytest.fixture
def tune_here(monkeypatch, tmp_path):
    return TuneHere(monkeypatch, tmp_path / "out")


def work_in_one_process(plan, url, log):
    """What a worker does, with the trainings in its own process: a kill ends both at once."""

    def in_child(function, arm, *arguments):
        with open(log, "a") as file:
            file.write(f"{arm.label}\n")
        return in_this_process(function, arm, *arguments)

    tuning.run_in_child = in_child
    options = {"device": "cpu", "cache": None}
    work(plan, url, "session", 2, options, NoProgress, print)


def test_workers_killed_at_random_instants_lose_no_trial(tune_here, tmp_path):
    plan = plan_tuning(f"{HERE}.long", budget=3, out=tmp_path / "out")
    url, log = sqlite_url(tmp_path / "shared.db"), tmp_path / "log"
    plan.folder.mkdir()
    draw = random.Random(1)

    def start():
        if "forkserver" in METHODS:
            CONTEXT.set_forkserver_preload(LOADED)
        process = CONTEXT.Process(target=work_in_one_process, args=(plan, url, log))
        process.start()
        return process

    workers = [start(), start()]
    search, folders = plan.searches[0], []
    for slot in range(3):
        folders.append(plan.arm(search, slot, search.values(slot)).folder)
    deadline = time.monotonic() + 600
    while not (folders[0] / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(draw.random())
    workers[0].kill()
    workers[0].join()
    workers[0] = start()
    for worker in workers:
        worker.join(600)
        assert worker.exitcode == 0
    # All is done, and finds its way into the summary without any training.
    found, lines = tune_here(f"{HERE}.long", budget=3, storage=url)
    assert tune_here.trained == [] and lines == []
    assert found["searches"][0]["finished"] == 3
    begun = log.read_text().split("\n")[:-1]
    assert len(begun) in (3, 4) and len(set(begun)) == 3
    twice = [label for label in begun if begun.count(label) > 1]
    slot = int(twice[0].split()[1].split("/")[0]) - 1 if twice else 0
    run = plan.arm(search, slot, search.values(slot)).run
    go(run, tmp_path / "whole")
    assert_same_training(tmp_path / "whole", folders[slot], run.steps)
