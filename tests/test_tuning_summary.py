import json

import pytest
from tiny_tunings import DECAY, HERE, LR, TuneHere

from nomadam.experiments.comparison import plan_comparison
from nomadam.experiments.configuration import to_json
from nomadam.experiments.tuning_summary import tuned_runs

BETA2 = "optimizer.arguments.beta2"


@pytest.fixture
def tune_here(monkeypatch, tmp_path):
    return TuneHere(monkeypatch, tmp_path / "out")


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

    def test_what_only_given_ranges_were_searched_in(self, tune_here, tmp_path):
        found, _ = tune_here(
            optimizers=["adamw"],
            budget=2,
            overrides={LR: "0.01", DECAY: "0"},
            ranges={"adamw.beta2": (0.9, 0.99)},
        )
        (search,) = found["searches"]
        assert search["space"] == {BETA2: [0.9, 0.99]}
        _, (run,) = tuned_runs(f"{HERE}.study", tmp_path / "out")
        assert to_json(run) == search["best"]["run"]
        assert run.optimizer.arguments == {"beta2": search["best"]["values"][BETA2]}

    def test_the_tuning_seed_is_left_out(self, tune_here, tmp_path):
        tune_here(optimizers=["adamw"], budget=1, overrides={"seed": "2"})
        plan = plan_comparison(
            f"{HERE}.study", tuned=tmp_path / "out", num_seeds=4, overrides={"seed": "1"}
        )
        assert [arm.run.seed for arm in plan.arms] == [1, 3, 4, 5]

    def test_what_is_no_tuning_of_this_study(self, tune_here, tmp_path):
        out = tmp_path / "out"
        with pytest.raises(ValueError, match="holds no tuning.json"):
            tuned_runs(f"{HERE}.study", tmp_path / "nothing")
        tune_here(optimizers=["adamw"], budget=1)
        with pytest.raises(ValueError, match=r"the tuning of tiny_tunings\.study, not of"):
            tuned_runs(f"{HERE}.fragile", out)
        with pytest.raises(ValueError, match="lion was not tuned in .*, which has adamw"):
            tuned_runs(f"{HERE}.study", out, optimizers=["lion"])
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

    def test_a_damaged_range(self, tune_here, tmp_path):
        found, _ = tune_here(optimizers=["adamw"], budget=1)
        for ends in (3, [1], [1, 2, 3], ["low", "high"], None):
            found["searches"][0]["space"][LR] = ends
            (tmp_path / "out" / "tuning.json").write_text(json.dumps(found))
            with pytest.raises(ValueError, match="damaged"):
                tuned_runs(f"{HERE}.study", tmp_path / "out")
