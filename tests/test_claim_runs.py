"""The trainings behind the claims: all are made, once, whatever comes in between."""

import dataclasses
import json
import math
import multiprocessing
import random
import shutil
import sys
import time
from pathlib import Path

import pytest
from test_comparison import in_this_process
from tiny_claims import (
    GRID,
    SQUARES,
    TINY,
    Killed,
    after,
    half_removed,
    kept,
    killed,
    left,
    not_removed,
    places_in,
    setting,
    work,
    work_in_one_process,
)

from nomadam.experiments import claim_runs, kept_runs, training
from nomadam.experiments.child_process import Outcome
from nomadam.experiments.claim_plan import (
    CANDIDATES,
    SECOND_SEED,
    SEEDS,
    TRIALS,
    folder_name,
    jobs,
    with_seed,
)
from nomadam.experiments.claim_runs import (
    final_runs,
    is_done,
    next_run,
    runs_of,
    train_all,
    tuned,
    work_off,
)
from nomadam.experiments.kept_runs import keep_run
from nomadam.experiments.search_spaces import zoomed
from nomadam.progress import NoProgress
from nomadam.runs import RunFolder

OF_AN_ARM = TRIALS + CANDIDATES + len(SEEDS)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Two arms that were trained by one process without a break."""
    places = places_in(tmp_path_factory.mktemp("whole"))
    return places, work(places, TINY)


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    """A grid that was trained so."""
    places = places_in(tmp_path_factory.mktemp("cells"))
    return places, work(places, GRID)


@pytest.fixture
def copied(whole, tmp_path):
    """The same in a folder of its own, to be damaged."""
    places = places_in(tmp_path)
    shutil.copytree(whole[0].kept, places.kept)
    return places


@pytest.fixture
def trained(monkeypatch):
    """The folders in which trainings have begun since."""
    seen = []
    train = training.train

    def noted(run, folder, **options):
        seen.append(folder.name)
        return train(run, folder, **options)

    monkeypatch.setattr(training, "train", noted)
    return seen


class TestArms:
    def test_all_trials_and_finals_are_made(self, whole):
        places, lines = whole
        assert len(lines) == len(set(lines)) == TINY.num_runs == 2 * OF_AN_ARM
        assert lines[0].startswith("short_tiny adamw seed 0 (lr=")
        for job in jobs((TINY,)):
            assert is_done(places, job) and next_run(places, job) is None
            found = tuned(places, TINY, job.optimizer)
            trials = found.trials
            assert found.following is None and len(trials) == TRIALS
            search = TINY.search(job.optimizer)
            for index, (values, loss) in enumerate(trials):
                assert values == zoomed(search, index, TRIALS, trials[:index])
                assert loss == places.result(TINY, search.run(values))["validation_loss"]
            finals = final_runs(places, TINY, job.optimizer)
            first = sorted(trials, key=lambda trial: trial[1])[:CANDIDATES]
            again = [with_seed(search.run(values), SECOND_SEED) for values, _ in first]
            means = [
                (loss + places.loss(TINY, run)) / 2
                for (_, loss), run in zip(first, again, strict=True)
            ]
            assert found.again == [(each[0], m) for each, m in zip(first, means, strict=True)]
            best = search.run(first[means.index(min(means))][0])
            assert finals == [dataclasses.replace(best, seed=seed) for seed in SEEDS]
            losses = [places.loss(TINY, run) for run in finals]
            assert len(set(losses)) == len(SEEDS) and all(map(math.isfinite, losses))
        assert len(list((places.kept / "short_tiny").iterdir())) == 2 * OF_AN_ARM

    def test_what_is_kept_is_small_and_what_was_in_training_is_gone(self, whole):
        places, _ = whole
        names = {"run.json", "environment.json", "result.json", "metrics.jsonl", "gains.json"}
        for folder in (places.kept / "short_tiny").iterdir():
            files = list(folder.iterdir())
            assert {"gains.json", *(file.name for file in files)} == names
            assert sum(file.stat().st_size for file in files) < 10_000
            steps = [json.loads(line) for line in open(folder / "metrics.jsonl")]
            assert [record["step"] for record in steps] == [2, 4]
            assert all(math.isfinite(record["validation_loss"]) for record in steps)
        assert left(places) == []
        assert not list(places.work.rglob("*.safetensors"))

    def test_no_path_of_the_machine_is_kept(self, copied, tmp_path, monkeypatch):
        folder = copied.folder(TINY, runs_of(copied, jobs((TINY,))[0])[0])
        shutil.rmtree(folder)
        words = ["/somewhere/bin/nomadam", "claims", f"--out={tmp_path}", "--work", str(tmp_path)]
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(Killed), monkeypatch.context() as patch:
            patch.setattr(training, "write_result", killed)
            work(copied, TINY)
        assert len(work(copied, TINY)) == 1
        told = json.loads((folder / "environment.json").read_text())
        for each in (told, *told["resumed"]):
            assert each["command"] == ["nomadam", "claims", tmp_path.name, "--work", tmp_path.name]
        assert len(told["resumed"]) == 1
        foreign = {str(tmp_path), "/somewhere", sys.prefix, str(Path.home()), str(Path.cwd())}
        for file in copied.kept.rglob("*.json*"):
            assert not [path for path in foreign if path in file.read_text()]

    def test_started_again_it_trains_nothing(self, copied, monkeypatch, whole):
        monkeypatch.setattr(training, "train", killed)
        before = kept(copied)
        assert work(copied, TINY) == []
        assert kept(copied) == before == kept(whole[0])

    @pytest.mark.parametrize("which", ["trial", "final"])
    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("result.json", None),
            ("result.json", ""),
            ("result.json", '{"status": "fin'),
            ("result.json", '{"status": "finished"}'),
            ("result.json", '{"status": "finished", "validation_loss": null}'),
            ("run.json", None),
            ("run.json", '{"run": {"name": "another"}}'),
        ],
    )
    def test_a_torn_folder_is_made_again(self, copied, whole, trained, which, name, content):
        run = runs_of(copied, jobs((TINY,))[1])[3 if which == "trial" else -1]
        damaged = copied.folder(TINY, run) / name
        damaged.unlink()
        if content is not None:
            damaged.write_text(content)
        assert len(work(copied, TINY)) == 1
        assert trained == [folder_name(run)]
        assert kept(copied) == kept(whole[0])

    def test_what_another_process_is_at_is_left_to_it(self, copied, monkeypatch, whole):
        for job in jobs((TINY,)):
            shutil.rmtree(copied.folder(TINY, runs_of(copied, job)[-1]))
        lock = RunFolder(copied.work / TINY.name / "adamw").locked()
        lock.__enter__()
        monkeypatch.setattr(claim_runs.time, "sleep", lambda _: lock.__exit__(None, None, None))
        assert [line.split()[1] for line in work(copied, TINY)] == ["sgd_sai", "adamw"]
        assert kept(copied) == kept(whole[0])


class TestDiverged:
    def test_trials_that_diverge_are_kept_and_never_the_best(self, tmp_path, trained):
        places, fragile = places_in(tmp_path), setting("fragile", "sgdm")
        lines = work(places, fragile)
        trials = tuned(places, fragile, "sgdm").trials
        lost = [values for values, loss in trials if math.isinf(loss)]
        assert 0 < len(lost) < TRIALS == len(trials)
        assert sum("diverged" in line for line in lines[:TRIALS]) == len(lost)
        search = fragile.search("sgdm")
        for values in lost:
            assert places.result(fragile, search.run(values))["status"] == "diverged"
        finals = final_runs(places, fragile, "sgdm")
        assert len(finals) == len(SEEDS)
        assert finals[0].optimizer.lr not in [values["optimizer.lr"] for values in lost]
        assert work(places, fragile) == [] and len(trained) == OF_AN_ARM

    def test_where_all_trials_diverge_there_are_no_finals(self, tmp_path, trained):
        places, hopeless = places_in(tmp_path), setting("hopeless", "sgdm")
        assert len(work(places, hopeless)) == TRIALS
        assert final_runs(places, hopeless, "sgdm") == []
        assert is_done(places, jobs((hopeless,))[0])
        assert work(places, hopeless) == [] and len(trained) == TRIALS
        assert left(places) == []


class TestGrids:
    def test_every_cell_is_trained_with_every_seed(self, cells):
        places, lines = cells
        assert len(lines) == len(set(lines)) == GRID.num_runs == 3 * len(SEEDS)
        for cell in GRID.cells():
            for seed in SEEDS:
                result = places.result(GRID, dataclasses.replace(cell, seed=seed))
                assert result["status"] == "finished" and result["steps"] == 2
        assert left(places) == [] and work(places, GRID) == []


class TestMeasurements:
    def test_one_with_every_seed(self, tmp_path):
        places = places_in(tmp_path)
        assert len(work(places, SQUARES)) == SQUARES.num_runs == len(SEEDS)
        for seed, study in SQUARES.studies().items():
            assert places.result(SQUARES, study, seed)["sum"] == 30
            folder = places.folder(SQUARES, study, seed)
            names = {"run.json", "environment.json", "result.json", "tables.json"}
            assert {file.name for file in folder.iterdir()} == names
        assert left(places) == [] and work(places, SQUARES) == []

    def test_what_a_kill_has_left_goes(self, tmp_path, monkeypatch):
        places = places_in(tmp_path)
        with pytest.raises(Killed), monkeypatch.context() as patch:
            patch.setattr(claim_runs.shutil, "rmtree", not_removed)
            work(places, SQUARES)
        assert len(left(places)) == 1
        assert len(work(places, SQUARES)) == len(SEEDS) - 1
        assert left(places) == []


class TestFailures:
    def test_a_job_that_fails_stops_no_other(self, tmp_path):
        places = places_in(tmp_path)
        broken = setting("broken", "adamw", "sgdm")
        lines = []
        with pytest.raises(RuntimeError) as caught:
            work_off(places, (broken, SQUARES), None, NoProgress, lines.append)
        why = "data source '/nowhere': no such folder"
        told = [f"short_broken {name}: {why}" for name in ("adamw", "sgdm")]
        assert str(caught.value) == "; ".join(told)
        assert [line for line in lines if "failed" in line] == [f"failed: {each}" for each in told]
        assert all(is_done(places, job) for job in jobs((SQUARES,)))
        assert not any(is_done(places, job) for job in jobs((broken,)))

    def all_at_once(self, monkeypatch, outcomes=()):
        calls = []

        def in_children(function, arguments):
            calls.extend(arguments)
            return [*outcomes, *(in_this_process(function, *each) for each in arguments[:1])]

        monkeypatch.setattr(claim_runs, "run_in_children", in_children)
        return calls

    def train(self, places, *settings, **options):
        options = {"workers": 2, "cache": None, "make_progress": NoProgress, **options}
        train_all(places, settings, tell=lambda line: None, **options)

    def test_they_are_reported_once(self, tmp_path, monkeypatch):
        calls = self.all_at_once(monkeypatch)
        with pytest.raises(RuntimeError, match="^[^;]*broken adamw: data source[^;]*$"):
            self.train(places_in(tmp_path), setting("broken", "adamw"), SQUARES)
        assert len(calls) == 2

    def test_what_a_process_that_died_has_left_is_done_by_the_others(self, tmp_path, monkeypatch):
        self.all_at_once(monkeypatch, [Outcome(error="the process was killed by SIGKILL")])
        self.train(places_in(tmp_path), SQUARES)
        monkeypatch.setattr(claim_runs, "run_in_children", lambda *_: [Outcome(error="killed")])
        with pytest.raises(RuntimeError, match="killed"):
            self.train(places_in(tmp_path / "new"), SQUARES)

    def test_what_is_clocked_has_the_machine_to_itself(self, tmp_path, monkeypatch):
        calls = self.all_at_once(monkeypatch)
        clock = dataclasses.replace(SQUARES, name="clock", alone=True)
        self.train(places_in(tmp_path), clock, SQUARES)
        assert [each[1] for each in calls] == [(SQUARES,), (SQUARES,), (clock,)]
        calls.clear()
        self.train(places_in(tmp_path), clock)
        assert [each[1] for each in calls] == [(clock,)]
        with pytest.raises(ValueError, match="workers = 0: must be at least 1"):
            self.train(places_in(tmp_path), SQUARES, workers=0)


class TestKilled:
    @pytest.mark.parametrize(
        ("place", "name", "by"),
        [
            (training, "write_result", killed),
            (claim_runs, "keep_run", killed),
            (kept_runs, "write_atomically", after(2, kept_runs.write_atomically)),
            (kept_runs, "write_atomically", after(3, kept_runs.write_atomically)),
            (claim_runs.shutil, "rmtree", not_removed),
            (claim_runs.shutil, "rmtree", half_removed),
        ],
        ids=["trained", "ended", "keeping", "nearly kept", "kept", "removing"],
    )
    def test_between_two_steps_of_keeping(self, copied, whole, monkeypatch, place, name, by):
        run = runs_of(copied, jobs((TINY,))[0])[TRIALS - 1]
        shutil.rmtree(copied.folder(TINY, run))
        with pytest.raises(Killed), monkeypatch.context() as patch:
            patch.setattr(place, name, by)
            work(copied, TINY)
        assert len(left(copied)) == 1
        work(copied, TINY)
        assert kept(copied) == kept(whole[0])
        assert left(copied) == []

    def test_while_a_damaged_folder_is_kept_again(self, whole, tmp_path, monkeypatch):
        source = next((whole[0].kept / "short_tiny").iterdir())
        keep_run(source, tmp_path / "kept")
        monkeypatch.setattr(kept_runs, "write_atomically", after(1, kept_runs.write_atomically))
        with pytest.raises(Killed):
            keep_run(source, tmp_path / "kept")
        assert not (tmp_path / "kept" / "result.json").exists()

    def test_a_folder_without_all_of_its_files_is_not_kept(self, whole, tmp_path):
        source = next((whole[0].kept / "short_tiny").iterdir())
        for name in ("environment.json", "result.json"):
            shutil.copytree(source, tmp_path / name)
            (tmp_path / name / name).unlink()
            with pytest.raises(FileNotFoundError):
                keep_run(tmp_path / name, tmp_path / "kept")
        assert not (tmp_path / "kept").exists()


METHODS = multiprocessing.get_all_start_methods()
# A server that has loaded torch once makes the processes, where the system has such.
CONTEXT = multiprocessing.get_context("forkserver" if "forkserver" in METHODS else "spawn")


def start(*arguments):
    if "forkserver" in METHODS:
        CONTEXT.set_forkserver_preload(["nomadam.experiments.training", "accelerate"])
    process = CONTEXT.Process(target=work_in_one_process, args=arguments)
    process.start()
    return process


def test_processes_killed_at_random_instants_change_nothing(copied, whole, tmp_path):
    draw = random.Random(0)
    for run in runs_of(copied, jobs((TINY,))[1]):
        shutil.rmtree(copied.folder(TINY, run))
    for _ in range(3):
        before = len(list(copied.kept.glob("*/*")))
        process = start(copied, (TINY,), tmp_path / "log")
        deadline = time.monotonic() + 600
        # Not before it has kept something, else the kill meets only the start of the process.
        while len(list(copied.kept.glob("*/*"))) == before and process.is_alive():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(draw.random() * 0.2)
        process.kill()
        process.join()
    last = start(copied, (TINY,), tmp_path / "log")
    last.join(600)
    assert last.exitcode == 0 and left(copied) == []
    assert kept(copied) == kept(whole[0])


def test_two_processes_at_once_do_nothing_twice(tmp_path, cells):
    places, log, together = places_in(tmp_path), tmp_path / "log", CONTEXT.Barrier(2)
    processes = [start(places, (GRID,), log, together) for _ in range(2)]
    for process in processes:
        process.join(600)
        assert process.exitcode == 0
    ended = [line.split(":")[0] for line in log.read_text().splitlines()]
    assert len(ended) == len(set(ended)) == GRID.num_runs
    assert kept(places) == kept(cells[0]) and left(places) == []
