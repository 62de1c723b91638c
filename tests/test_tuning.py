import json
import math
import signal

import pytest
from tiny_tunings import DECAY, HERE, LR, TuneHere, grid

from nomadam.cli import main
from nomadam.experiments import tuning
from nomadam.experiments.child_process import Outcome
from nomadam.experiments.comparison import train_arm
from nomadam.experiments.configuration import short_hash
from nomadam.experiments.search_spaces import zoomed
from nomadam.experiments.tuning_plan import plan_tuning
from nomadam.experiments.tuning_summary import tuned_runs
from nomadam.runs import RunFolder
from nomadam.tune_command import show_tuning


@pytest.fixture
def tune_here(monkeypatch, tmp_path):
    return TuneHere(monkeypatch, tmp_path / "out")


class TestTuning:
    def test_all_trials_are_run_folders_with_the_tuning_seed(self, tune_here, tmp_path):
        found, lines = tune_here(optimizers=["adamw", "sgd_sai"], budget=3)
        assert json.loads((tmp_path / "out" / "tuning.json").read_text()) == found
        # In turn, so that what is interrupted has tried as much of each.
        assert tune_here.trained == [
            f"{name} {n}/3" for n in (1, 2, 3) for name in ("adamw", "sgd_sai")
        ]
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

    def test_it_goes_on_and_trains_nothing_twice(self, tune_here):
        first, _ = tune_here(optimizers=["adamw"], budget=2)
        again, lines = tune_here(optimizers=["adamw"], budget=2)
        assert again == first and lines == [] and len(tune_here.trained) == 2
        more, _ = tune_here(optimizers=["sgd_sai", "adamw"], budget=2)
        assert tune_here.trained[2:] == ["sgd_sai 1/2", "sgd_sai 2/2"]
        assert more["searches"][0] == first["searches"][0]

    def test_what_was_tuned_before_in_the_folder_is_kept(self, tune_here, tmp_path):
        first, _ = tune_here(optimizers=["adamw"], budget=2)
        more, _ = tune_here(optimizers=["sgd_sai"], budget=2, ranges={"lr": (1e-3, 1.0)})
        assert json.loads((tmp_path / "out" / "tuning.json").read_text()) == more
        assert [search["label"] for search in more["searches"]] == ["adamw", "sgd_sai"]
        assert more["searches"][0] == first["searches"][0]
        # Tuned anew it stands in the same place, and once.
        assert tune_here(optimizers=["adamw"], budget=2)[0] == more
        _, runs = tuned_runs(f"{HERE}.study", tmp_path / "out")
        assert [run.optimizer.name for run in runs] == ["adamw", "sgd_sai"]

    def test_what_ends_meanwhile_in_the_folder_is_kept(self, tune_here, monkeypatch):
        def beside(arm, options, make_progress):
            monkeypatch.setattr(tuning, "train_arm", train_arm)
            tune_here(optimizers=["adamw"], budget=1)
            return train_arm(arm, options, make_progress)

        monkeypatch.setattr(tuning, "train_arm", beside)
        found, _ = tune_here(optimizers=["sgd_sai"], budget=1)
        assert tune_here.trained == ["sgd_sai 1/1", "adamw 1/1"]
        assert [search["label"] for search in found["searches"]] == ["adamw", "sgd_sai"]

    def test_another_budget_in_the_folder_is_refused_before_any_work(
        self, tune_here, tmp_path, monkeypatch
    ):
        tune_here(optimizers=["adamw"], budget=2)
        held = (tmp_path / "out" / "tuning.json").read_bytes()
        monkeypatch.setattr(tuning, "check_arms", None)
        for optimizer, budget in (("adamw", 1), ("adamw", 3), ("sgd_sai", 1)):
            words = rf"out holds another tuning.*\n  budget: 2 there, {budget} here"
            with pytest.raises(ValueError, match=words):
                tune_here(optimizers=[optimizer], budget=budget)
        assert len(tune_here.trained) == 2
        assert (tmp_path / "out" / "tuning.json").read_bytes() == held

    def test_another_budget_than_that_of_an_interrupted_tuning(
        self, tune_here, tmp_path, monkeypatch
    ):
        def stopped(arm, options, make_progress):
            raise KeyboardInterrupt

        monkeypatch.setattr(tuning, "train_arm", stopped)
        with pytest.raises(KeyboardInterrupt):
            tune_here(optimizers=["adamw"], budget=1)
        monkeypatch.setattr(tuning, "train_arm", train_arm)
        for optimizer in ("adamw", "sgd_sai"):
            with pytest.raises(ValueError, match=r"out/adamw holds .*\n  budget: 1 there, 2 here"):
                tune_here(optimizers=[optimizer], budget=2)
        assert not (tmp_path / "out" / "tuning.json").exists()
        # What was refused has left nothing that would be in the way of the same budget.
        assert len(tune_here(optimizers=["sgd_sai"], budget=1)[0]["searches"]) == 1

    def test_another_study_in_the_folder_is_refused(self, tune_here):
        tune_here(optimizers=["adamw"], budget=1)
        for changes, words in (
            ({"name": f"{HERE}.fragile"}, r"name: 'tiny_tunings\.study' there"),
            ({"sampler": "tpe"}, "sampler: 'qmc' there, 'tpe' here"),
            ({"overrides": {"steps": "3"}}, r"overrides\.steps: '\(absent\)' there, '3' here"),
        ):
            with pytest.raises(ValueError, match=f"holds another tuning.*\n  {words}"):
                tune_here(**{"optimizers": ["sgd_sai"], "budget": 1, **changes})
        assert len(tune_here.trained) == 1

    def test_a_damaged_summary_is_not_written_over(self, tune_here, tmp_path):
        tune_here(optimizers=["adamw"], budget=1)
        (tmp_path / "out" / "tuning.json").write_text("{}")
        with pytest.raises(ValueError, match="damaged"):
            tune_here(optimizers=["sgd_sai"], budget=1)
        assert (tmp_path / "out" / "tuning.json").read_text() == "{}"

    def test_a_lost_database_costs_no_training(self, tune_here, tmp_path):
        first, _ = tune_here(optimizers=["adamw"], budget=2)
        (tmp_path / "out" / "tuning.db").unlink()
        assert tune_here(optimizers=["adamw"], budget=2)[0] == first and len(tune_here.trained) == 2

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
            tune_here(optimizers=["sgd_sai"], budget=1, workers=2)

    def test_another_search_in_the_folder_is_refused_before_any_training(self, tune_here):
        tune_here(optimizers=["adamw"], budget=1)
        with pytest.raises(ValueError, match=r"another search(.*\n)+  space\.optimizer\.lr"):
            tune_here(optimizers=["adamw"], budget=1, ranges={"lr": (1e-3, 1.0)})
        assert len(tune_here.trained) == 1

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
        assert tune_here.trained == []

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
        assert tune_here.trained == ["adamw 1/2"] + 3 * ["adamw 2/2"]
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
        assert main(words) == 0 and len(tune_here.trained) == 7

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
        assert len(tune_here.trained) == 12
        made = {short_hash(run) for run in grid()}
        for search in found["searches"]:
            assert search["space"] == {LR: [1e-3, 1e-2, 1e-1], DECAY: [0.0, 0.1]}
            assert search["finished"] == 6
            assert {trial["folder"][-8:] for trial in search["trials"]} <= made
        _, runs = tuned_runs(f"{HERE}.grid", tmp_path / "out")
        assert [run.optimizer.name for run in runs] == ["adamw", "sgdm"]
        assert all(short_hash(run) in made for run in runs)
