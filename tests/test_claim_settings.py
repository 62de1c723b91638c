"""What is trained for the claims: affordable, without doubles, and of studies that exist."""

import math
import random
from pathlib import Path

import pytest

from nomadam.experiments.claim_plan import (
    MOST_SECONDS,
    SEEDS,
    folder_name,
    jobs,
    total_seconds,
)
from nomadam.experiments.claim_runs import Places, runs_of
from nomadam.experiments.claim_settings import SETTINGS
from nomadam.experiments.configuration import override, short_hash
from nomadam.experiments.search_spaces import zoomed
from nomadam.optimizers.baselines import BASELINES

by_name = pytest.mark.parametrize("chosen", SETTINGS, ids=lambda each: each.name)


def test_all_of_it_is_affordable():
    assert total_seconds(SETTINGS) <= MOST_SECONDS


def test_every_training_is_of_one_job():
    planned = jobs(SETTINGS)
    assert len({(job.setting.name, job.label) for job in planned}) == len(planned)
    for chosen in SETTINGS:
        own = [job for job in planned if job.setting == chosen]
        assert sum(job.num_runs for job in own) == chosen.num_runs
        if chosen.optimizers:
            assert [job.optimizer for job in own] == list(chosen.optimizers)
        else:
            assert [job.seed for job in own] == list(SEEDS)
    assert len({chosen.name for chosen in SETTINGS}) == len(SETTINGS)
    assert len(set(SEEDS)) == 5


@by_name
def test_optimizers_exist_and_the_form_is_that_of_the_study(chosen):
    assert set(chosen.optimizers) <= set(BASELINES)
    assert len(set(chosen.optimizers)) == len(chosen.optimizers)
    if chosen.measured:
        assert not chosen.optimizers and list(chosen.studies()) == list(SEEDS)
        names = {folder_name(study, seed) for seed, study in chosen.studies().items()}
        runs = [study.run for study in chosen.studies().values() if hasattr(study, "run")]
        assert [run.seed for run in runs] in ([], list(SEEDS))
        assert len(names) == len(SEEDS)
        return
    runs = chosen.cells()
    assert chosen.is_grid == (len(runs) > 1) == (not chosen.optimizers)
    for name, value in chosen.overrides.items():
        if "." not in name:
            assert all(getattr(run, name) == float(value) for run in runs)


def test_all_trials_of_an_arm_differ_and_the_finals_have_other_seeds():
    draw = random.Random(0)
    for chosen in SETTINGS:
        names = set()
        for optimizer in chosen.optimizers:
            search = chosen.search(optimizer)
            trials = []
            for index in range(chosen.trials):
                values = zoomed(search, index, chosen.trials, trials)
                trials.append((values, draw.choice([math.inf, draw.random()])))
            runs = [search.run(values) for values, _ in trials]
            assert {run.seed for run in runs}.isdisjoint(SEEDS)
            assert {run.optimizer.name for run in runs} == {optimizer}
            names |= {short_hash(run) for run in runs}
        assert len(names) == chosen.trials * len(chosen.optimizers)


def test_trials_on_gpt2_see_a_part_of_the_held_out_text_and_finals_all_of_it():
    for chosen in SETTINGS:
        if chosen.study.startswith("gpt2_pretraining"):
            trial = chosen.search("sgd_sai").run({"optimizer.lr": 0.01})
            assert trial.evaluation_batches == 16
            final = override(trial, chosen.finals)
            assert final.evaluation_batches is None and final.steps == trial.steps
            assert chosen.final_seconds is not None and chosen.final_seconds > chosen.run_seconds
            assert chosen.later_seconds > chosen.later_runs * chosen.run_seconds
        else:
            assert not chosen.finals and chosen.final_seconds is None


def test_cells_and_seeds_have_folders_of_their_own():
    for chosen in SETTINGS:
        if chosen.is_grid:
            places = Places(kept=Path("kept"), work=Path("work"))
            own = [job for job in jobs(SETTINGS) if job.setting == chosen]
            runs = [run for job in own for run in runs_of(places, job)]
            assert len({folder_name(run) for run in runs}) == chosen.num_runs == len(runs)
            assert {run.seed for run in runs} == set(SEEDS)
