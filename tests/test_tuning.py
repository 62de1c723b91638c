import dataclasses
import json
import math
import multiprocessing
import random
import signal
import time

import pytest
from test_comparison import in_this_process
from tiny_training import Fragile, Gone, assert_same_training, go, tiny_run, to_be_killed

from nomadam.cli import main
from nomadam.experiments import tuning
from nomadam.experiments.child_process import Outcome
from nomadam.experiments.comparison import plan_comparison, train_arm
from nomadam.experiments.configuration import Run, override, short_hash
from nomadam.experiments.search_spaces import zoomed
from nomadam.experiments.trial_storage import sqlite_url
from nomadam.experiments.tuning import tune, work
from nomadam.experiments.tuning_plan import plan_tuning
from nomadam.experiments.tuning_summary import tuned_runs
from nomadam.runs import RunFolder
from nomadam.tune_command import NoProgress, edge_note, ranges_of, show_tuning

HERE = "test_tuning"
LR, DECAY = "optimizer.lr", "optimizer.weight_decay"
SEEN = []


def study(optimizer: str = "sgd_sai") -> Run:
    return tiny_run(optimizer, name=f"{HERE}.study", steps=4, evaluate_every=2)


def fragile(optimizer: str = "sgdm") -> Run:
    return tiny_run(optimizer, name=f"{HERE}.fragile", model=Fragile(), steps=6)


def without_data() -> Run:
    return tiny_run(name=f"{HERE}.without_data", data=Gone())


def long() -> Run:
    return dataclasses.replace(to_be_killed(), name=f"{HERE}.long")


def grid() -> list[Run]:
    cells = [
        (name, lr, decay)
        for name in ("adamw", "sgdm")
        for lr in (1e-3, 1e-2, 1e-1)
        for decay in (0, 0.1)
    ]
    made = [tiny_run(name, lr, name=f"{HERE}.grid", steps=2) for name, lr, _ in cells]
    return [override(run, {DECAY: decay}) for run, (_, _, decay) in zip(made, cells, strict=True)]


def uneven_grid() -> list[Run]:
    return grid()[1:]


@pytest.fixture
def tune_here(monkeypatch, tmp_path):
    """Tune with the trainings in this process, which is much faster, and note what is trained."""
    SEEN.clear()

    def in_child(function, *arguments):
        if function is tuning.train_beside:
            SEEN.append(arguments[0].label)
        return in_this_process(function, *arguments)

    monkeypatch.setattr(tuning, "run_in_child", in_child)
    lines = []

    def tune_it(name=f"{HERE}.study", *, storage=None, workers=1, **plan):
        lines.clear()
        planned = plan_tuning(name, **{"out": tmp_path / "out", **plan})
        options = {"device": "cpu", "cache": None}
        found = tune(
            planned,
            storage=storage,
            workers=workers,
            options=options,
            make_progress=NoProgress,
            tell=lines.append,
        )
        return found, list(lines)

    return tune_it


class TestPlans:
    def test_each_optimizer_has_its_own_space_and_the_same_budget(self):
        plan = plan_tuning(f"{HERE}.study", optimizers=["adamw", "sgd_sai"], budget=5)
        assert [search.label for search in plan.searches] == ["adamw", "sgd_sai"]
        assert plan.searches[0].space == {LR: [3e-5, 3e-2], DECAY: [1e-3, 1.0]}
        assert plan.searches[1].space == {LR: [3e-4, 3e-1], DECAY: [1e-3, 1.0]}
        assert (plan.budget, plan.sampler) == (5, "qmc")
        assert len(plan.comparison().arms) == 10
        assert plan.folder.parent == plan.beside and plan.folder.name.startswith("tune-test_tuning")

    def test_defaults_and_other_arguments(self):
        assert len(plan_tuning(f"{HERE}.study", budget=1).searches) == 3
        plan = plan_tuning(f"{HERE}.study", optimizers=["prodigy"], budget=1)
        assert set(plan.searches[0].space) == {"optimizer.arguments.d_coef", DECAY}

    def test_the_same_command_finds_the_same_folder(self):
        def folder(**changes):
            return plan_tuning(f"{HERE}.study", **{"budget": 2, **changes}).folder

        # Neither more trials nor more optimizers are another tuning.
        assert folder() == folder(budget=9) == folder(optimizers=["adamw"])
        others = [
            {"sampler": "tpe"},
            {"ranges": {"lr": (1e-3, 1.0)}},
            {"overrides": {"steps": "3"}},
        ]
        assert len({folder(), *(folder(**each) for each in others)}) == 4

    def test_what_is_set_is_not_searched_and_ranges_replace_the_declared_ones(self):
        plan = plan_tuning(
            f"{HERE}.study",
            optimizers=["adamw", "sgd_sai"],
            budget=1,
            overrides={DECAY: "0.5"},
            ranges={"sgd_sai.lr": (1e-3, 10.0), "eps": (1e-9, 1e-6)},
        )
        adamw, sgd_sai = plan.searches
        assert adamw.space == {LR: [3e-5, 3e-2], "optimizer.arguments.eps": [1e-9, 1e-6]}
        assert sgd_sai.space[LR] == [1e-3, 10.0]
        assert sgd_sai.run(sgd_sai.values(0)).optimizer.weight_decay == 0.5

    def test_a_grid_is_its_own_budget(self):
        plan = plan_tuning(f"{HERE}.grid")
        assert [len(search.runs) for search in plan.searches] == [6, 6]
        assert (plan.budget, plan.sampler) == (6, "grid")
        assert plan_tuning(f"{HERE}.grid", optimizers=["sgdm"]).searches == plan.searches[1:]

    @pytest.mark.parametrize(
        ("name", "changes", "words"),
        [
            ("study", {}, "budget = None: must be at least 1"),
            ("study", {"budget": 0}, "budget = 0: must be at least 1"),
            ("study", {"budget": 1, "optimizers": ["adamm"]}, "unknown optimizer 'adamm'"),
            ("study", {"budget": 1, "sampler": "magic"}, "one of qmc, zoom, tpe, grid"),
            ("study", {"budget": 1, "sampler": "grid"}, "returns one Run, and no grid"),
            ("study", {"budget": 1, "ranges": {"lr": (1.0, 0.1)}}, "0 < low < high"),
            ("study", {"budget": 1, "ranges": {"depth": (1.0, 2.0)}}, "has only lr, weight_decay"),
            ("study", {"budget": 1, "ranges": {"lion.lr": (1.0, 2.0)}}, "one of adamw, sgdm"),
            (
                "study",
                {"budget": 1, "overrides": {LR: "1", DECAY: "1"}},
                "nothing is left to search",
            ),
            ("study", {"budget": 1, "overrides": {"optimizer.rl": "1"}}, "nearest: optimizer.lr"),
            ("grid", {"budget": 5}, "must be 6, the cells of the grid"),
            ("grid", {"sampler": "qmc"}, "returns a grid"),
            ("grid", {"sampler": "zoom"}, "returns a grid"),
            ("grid", {"ranges": {"lr": (1.0, 2.0)}}, "no range of lr"),
            ("grid", {"optimizers": ["lion"]}, "no Run of 'lion'; it has some of adamw, sgdm"),
            ("uneven_grid", {}, "not of one size.*adamw 5, sgdm 6"),
            ("nothing", {"budget": 1}, "no run named"),
        ],
    )
    def test_wrong_plans(self, name, changes, words):
        with pytest.raises(ValueError, match=words):
            plan_tuning(f"{HERE}.{name}", **changes)

    def test_ranges_in_words(self):
        assert ranges_of(["lr=1e-3,1", "adamw.eps=1e-9,1e-6"]) == {
            "lr": (1e-3, 1.0),
            "adamw.eps": (1e-9, 1e-6),
        }
        for text in ("lr", "lr=1", "lr=1,2,3", "lr=low,high"):
            with pytest.raises(ValueError, match="FIELD=LOW,HIGH"):
                ranges_of([text])


class TestTuning:
    def test_all_trials_are_run_folders_with_the_tuning_seed(self, tune_here, tmp_path):
        found, lines = tune_here(optimizers=["adamw", "sgd_sai"], budget=3)
        assert json.loads((tmp_path / "out" / "tuning.json").read_text()) == found
        # In turn, so that what is interrupted has tried as much of each.
        assert SEEN == [f"{name} {n}/3" for n in (1, 2, 3) for name in ("adamw", "sgd_sai")]
        assert len(lines) == 6 and all("validation loss" in line for line in lines)
        for search in found["searches"]:
            assert (search["finished"], search["diverged"], search["failed"]) == (3, 0, 0)
            losses = []
            for trial in search["trials"]:
                folder = RunFolder(tmp_path / "out" / trial["folder"])
                assert folder.read_header()["run"]["seed"] == 0
                losses.append(folder.read_result()["validation_loss"])
                assert losses[-1] == trial["validation_loss"]
            assert search["best"]["validation_loss"] == min(losses)
            assert search["best"]["trial"] == losses.index(min(losses))

    def test_it_goes_on_and_trains_nothing_twice(self, tune_here, tmp_path):
        first, _ = tune_here(optimizers=["adamw"], budget=2)
        again, lines = tune_here(optimizers=["adamw"], budget=2)
        assert again == first and lines == [] and len(SEEN) == 2
        more, _ = tune_here(optimizers=["adamw", "sgd_sai"], budget=3)
        assert SEEN[2:] == ["sgd_sai 1/3", "sgd_sai 2/3", "adamw 3/3", "sgd_sai 3/3"]
        assert more["searches"][0]["trials"][:2] == first["searches"][0]["trials"]

    def test_a_lost_database_costs_no_training(self, tune_here, tmp_path):
        first, _ = tune_here(optimizers=["adamw"], budget=2)
        (tmp_path / "out" / "tuning.db").unlink()
        assert tune_here(optimizers=["adamw"], budget=2)[0] == first and len(SEEN) == 2

    def test_what_a_worker_that_died_has_left_is_done_by_the_others(
        self, tune_here, tmp_path, monkeypatch
    ):
        def in_children(function, calls):
            function(*calls[0])
            return [Outcome(), Outcome(error="the process was killed by SIGKILL")]

        monkeypatch.setattr(tuning, "run_in_children", in_children)
        found, _ = tune_here(optimizers=["adamw"], budget=1, workers=2)
        assert found["searches"][0]["finished"] == 1
        monkeypatch.setattr(tuning, "run_in_children", lambda *_: [Outcome(error="killed")])
        with pytest.raises(RuntimeError, match="killed"):
            tune_here(optimizers=["adamw"], budget=2, workers=2)

    def test_another_search_in_the_folder_is_refused_before_any_training(self, tune_here):
        tune_here(optimizers=["adamw"], budget=1)
        with pytest.raises(ValueError, match=r"another search.*\n.*run\.steps: 4 there, 3 here"):
            tune_here(optimizers=["adamw"], budget=1, overrides={"steps": "3"})
        with pytest.raises(ValueError, match=r"space\.optimizer\.lr"):
            tune_here(optimizers=["adamw"], budget=1, ranges={"lr": (1e-3, 1.0)})
        assert len(SEEN) == 1

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"storage": "postgres//host"}, "no database URL"),
            ({"storage": "sqlite:////no/such/folder/x.db"}, "can not be opened"),
            ({"overrides": {"optimizer.arguments.gain": "loudest"}}, "gain"),
            ({"name": f"{HERE}.without_data"}, "/nowhere"),
        ],
    )
    def test_what_is_wrong_is_found_before_any_training(self, tune_here, options, words):
        with pytest.raises(ValueError, match=words):
            tune_here(**{"optimizers": ["sgd_sai"], "budget": 1, **options})
        assert SEEN == []

    def test_a_run_folder_is_refused(self, tune_here, tmp_path):
        RunFolder(tmp_path / "out").write_json("run.json", {"run": {}})
        with pytest.raises(ValueError, match="holds a run"):
            tune_here(budget=1)

    def test_diverged_trials_count_as_the_worst(self, tune_here, capsys):
        found, lines = tune_here(f"{HERE}.fragile", optimizers=["sgdm"], budget=6, sampler="tpe")
        search = found["searches"][0]
        lost = [trial for trial in search["trials"] if trial["status"] == "diverged"]
        assert 0 < len(lost) == search["diverged"] < 6
        assert search["finished"] == 6 - len(lost)
        assert all(trial["validation_loss"] is None for trial in lost)
        assert search["best"]["trial"] not in [trial["trial"] for trial in lost]
        assert sum("diverged" in line for line in lines) == len(lost)
        show_tuning(found)
        assert f"6         {len(lost)}       0" in capsys.readouterr().out

    def test_where_all_diverge_there_is_no_best(self, tune_here, tmp_path, capsys):
        ranges = {"lr": (1e5, 1e6)}
        found, _ = tune_here(f"{HERE}.fragile", optimizers=["sgdm"], budget=2, ranges=ranges)
        assert found["searches"][0]["best"] is None and found["searches"][0]["diverged"] == 2
        show_tuning(found)
        assert "sgdm" in capsys.readouterr().out
        with pytest.raises(ValueError, match="no trial of sgdm has finished"):
            tuned_runs(f"{HERE}.fragile", tmp_path / "out")

    def test_a_failure_is_tried_again_counted_and_left_to_the_next_command(
        self, tune_here, tmp_path, monkeypatch, capsys
    ):
        def broken(arm, options, make_progress):
            if arm.label == "adamw 2/2":
                raise RuntimeError("out of memory")
            return train_arm(arm, options, make_progress)

        monkeypatch.setattr(tuning, "train_arm", broken)
        found, lines = tune_here(optimizers=["adamw"], budget=2)
        search = found["searches"][0]
        assert (search["finished"], search["failed"]) == (1, 1)
        assert SEEN == ["adamw 1/2"] + 3 * ["adamw 2/2"]
        assert sum("failed: RuntimeError: out of memory" in line for line in lines) == 3
        show_tuning(found)
        assert "adamw failed: RuntimeError: out of memory" in capsys.readouterr().out
        with pytest.warns(UserWarning, match="adamw was tuned with less: 1 of 2 trials failed"):
            tuned_runs(f"{HERE}.study", tmp_path / "out")
        monkeypatch.setattr(tuning, "train_arm", train_arm)
        assert tune_here(optimizers=["adamw"], budget=2)[0]["searches"][0]["finished"] == 2

    def test_what_is_interrupted_is_free_at_once(self, tune_here, monkeypatch):
        def stopped(arm, options, make_progress):
            signal.raise_signal(signal.SIGINT)

        monkeypatch.setattr(tuning, "train_arm", stopped)
        with pytest.raises(KeyboardInterrupt):
            tune_here(optimizers=["adamw"], budget=1)
        monkeypatch.setattr(tuning, "train_arm", train_arm)
        assert tune_here(optimizers=["adamw"], budget=1)[0]["searches"][0]["finished"] == 1

    def test_a_folder_that_another_process_trains_in_is_waited_for(
        self, tune_here, tmp_path, monkeypatch
    ):
        plan = plan_tuning(f"{HERE}.study", optimizers=["adamw"], budget=1, out=tmp_path / "out")
        arm = plan.arm(plan.searches[0], 0, plan.searches[0].values(0))
        held = RunFolder(arm.folder).locked()
        held.__enter__()
        monkeypatch.setattr(tuning.time, "sleep", lambda seconds: held.__exit__(None, None, None))
        assert tune_here(optimizers=["adamw"], budget=1)[0]["searches"][0]["finished"] == 1

    def test_the_last_trials_of_a_zoom_are_around_the_best_one(self, tune_here, tmp_path, capsys):
        words = ["tune", f"{HERE}.study", "--optimizer", "adamw", "--sampler", "zoom"]
        words += ["--budget", "7", "--device", "cpu", "--out", str(tmp_path / "out"), "--json"]
        assert main(words) == 0
        found = json.loads(capsys.readouterr().out)
        (search,) = found["searches"]
        assert (found["sampler"], search["finished"]) == ("zoom", 7)
        planned = plan_tuning(f"{HERE}.study", optimizers=["adamw"], budget=7, sampler="zoom")
        before = []
        for index, trial in enumerate(search["trials"]):
            assert trial["values"] == zoomed(planned.searches[0], index, 7, before)
            before.append((trial["values"], trial["validation_loss"]))
        best = min(before[:5], key=lambda each: each[1])[0]
        # A fourth of three decades, to either side of the best or from the end of the range.
        assert all(abs(math.log10(values[LR] / best[LR])) < 0.75 for values, _ in before[5:])
        assert main(words) == 0 and len(SEEN) == 7

    def test_a_zoom_where_all_diverge(self, tune_here):
        ranges = {"lr": (1e5, 1e6)}
        found, _ = tune_here(
            f"{HERE}.fragile", optimizers=["sgdm"], budget=4, sampler="zoom", ranges=ranges
        )
        search = found["searches"][0]
        assert search["best"] is None and search["diverged"] == 4
        even = plan_tuning(f"{HERE}.fragile", optimizers=["sgdm"], budget=4, ranges=ranges)
        values = [trial["values"] for trial in search["trials"]]
        assert values == [even.searches[0].values(index) for index in range(4)]

    def test_a_grid_is_trained_whole(self, tune_here, tmp_path):
        found, _ = tune_here(f"{HERE}.grid")
        assert len(SEEN) == 12
        made = {short_hash(run) for run in grid()}
        for search in found["searches"]:
            assert search["space"] == {LR: [1e-3, 1e-2, 1e-1], DECAY: [0.0, 0.1]}
            assert search["finished"] == 6
            assert {trial["folder"][-8:] for trial in search["trials"]} <= made
        _, runs = tuned_runs(f"{HERE}.grid", tmp_path / "out")
        assert [run.optimizer.name for run in runs] == ["adamw", "sgdm"]
        assert all(short_hash(run) in made for run in runs)


class TestEdges:
    def test_a_best_value_at_an_edge_asks_for_more(self, tune_here):
        # The loss of so short a training falls with the rate.
        found, _ = tune_here(optimizers=["adamw"], budget=5, overrides={DECAY: "0"})
        search = found["searches"][0]
        assert search["edges"] == {LR: "upper"}
        note = edge_note(search, LR)
        assert note.startswith("adamw: the best lr ")
        assert "at the upper edge of what was tried, in 3e-05 to 0.03: widen it" in note
        assert "(--range adamw.lr=3e-05,0.3)" in note


class TestFinals:
    def test_the_best_values_on_other_seeds(self, tune_here, tmp_path):
        found, _ = tune_here(optimizers=["adamw", "sgd_sai"], budget=2, overrides={"steps": "3"})
        out = tmp_path / "out"
        plan = plan_comparison(f"{HERE}.study", tuned=out, num_seeds=3)
        assert plan.labels == ["adamw", "sgd_sai"] and plan.reference == "adamw"
        seeds = [(arm.label, arm.run.seed) for arm in plan.arms]
        assert seeds == [(name, seed) for seed in (1, 2, 3) for name in ("adamw", "sgd_sai")]
        for search in found["searches"]:
            arm = next(arm for arm in plan.arms if arm.label == search["label"])
            assert arm.run.optimizer.lr == search["best"]["values"][LR]
            assert arm.run.optimizer.weight_decay == search["best"]["values"][DECAY]
            assert arm.run.steps == 3
        # The tuning seed is left out wherever the seeds begin.
        later = plan_comparison(
            f"{HERE}.study", tuned=out, optimizers=["adamw"], num_seeds=2, overrides={"seed": "7"}
        )
        assert [arm.run.seed for arm in later.arms] == [7, 8]

    def test_the_tuning_seed_is_left_out(self, tune_here, tmp_path):
        tune_here(optimizers=["adamw"], budget=1, overrides={"seed": "2"})
        plan = plan_comparison(
            f"{HERE}.study", tuned=tmp_path / "out", num_seeds=4, overrides={"seed": "1"}
        )
        assert [arm.run.seed for arm in plan.arms] == [1, 3, 4, 5]

    def test_what_is_no_tuning_of_this_study(self, tune_here, tmp_path, monkeypatch):
        out = tmp_path / "out"
        with pytest.raises(ValueError, match="holds no tuning.json"):
            tuned_runs(f"{HERE}.study", tmp_path / "nothing")
        tune_here(optimizers=["adamw"], budget=1)
        with pytest.raises(ValueError, match=r"the tuning of test_tuning\.study, not of"):
            tuned_runs(f"{HERE}.fragile", out)
        with pytest.raises(ValueError, match="lion was not tuned in .*, which has adamw"):
            tuned_runs(f"{HERE}.study", out, optimizers=["lion"])
        monkeypatch.setattr(f"{HERE}.study.__defaults__", None, raising=False)
        held = json.loads((out / "tuning.json").read_text())
        held["searches"][0]["best"]["run"]["steps"] = 99
        (out / "tuning.json").write_text(json.dumps(held))
        with pytest.raises(ValueError, match="has changed since.*\n  steps: 99 then, 4 now"):
            tuned_runs(f"{HERE}.study", out)

    @pytest.mark.parametrize(
        "damage", ["{", "[]", "{}", '{"name": 3}', '{"searches": [{"label": "a", "best": {}}]}']
    )
    def test_a_damaged_summary(self, tmp_path, damage):
        whole = {"name": "x", "sampler": "qmc", "budget": 1, "seed": 0, "overrides": {}}
        text = json.dumps({**whole, **json.loads(damage)}) if damage.startswith('{"') else damage
        (tmp_path / "tuning.json").write_text(text)
        with pytest.raises(ValueError, match="damaged"):
            tuned_runs("x", tmp_path)


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
        context = multiprocessing.get_context("spawn")
        process = context.Process(target=work_in_one_process, args=(plan, url, log))
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
    assert SEEN == [] and lines == []
    assert found["searches"][0]["finished"] == 3
    begun = log.read_text().split("\n")[:-1]
    assert len(begun) in (3, 4) and len(set(begun)) == 3
    twice = [label for label in begun if begun.count(label) > 1]
    slot = int(twice[0].split()[1].split("/")[0]) - 1 if twice else 0
    run = plan.arm(search, slot, search.values(slot)).run
    go(run, tmp_path / "whole")
    assert_same_training(tmp_path / "whole", folders[slot], run.steps)
