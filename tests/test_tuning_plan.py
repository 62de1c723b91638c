import pytest
from tiny_tunings import DECAY, HERE, LR

from nomadam.experiments.tuning_plan import plan_tuning
from nomadam.optimizers.baselines import BASELINES


class TestPlans:
    def test_each_optimizer_has_its_own_space_and_the_same_budget(self):
        plan = plan_tuning(f"{HERE}.study", optimizers=["adamw", "sgd_sai"], budget=5)
        assert [search.label for search in plan.searches] == ["adamw", "sgd_sai"]
        for search in plan.searches:
            declared = BASELINES[search.label].search_space
            assert search.bounds == {LR: declared["lr"], DECAY: declared["weight_decay"]}
        assert (plan.budget, plan.sampler) == (5, "qmc")
        assert len(plan.comparison().arms) == 10
        assert plan.folder.parent == plan.beside and plan.folder.name.startswith(
            "tune-tiny_tunings"
        )

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
        assert adamw.space.keys() == {LR, "optimizer.arguments.eps"}
        assert adamw.space["optimizer.arguments.eps"] == [1e-9, 1e-6]
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
            (
                "study",
                {"budget": 1, "optimizers": ["adamw"], "overrides": {"optimizer.name": "sgdm"}},
                "optimizer.name = 'sgdm': can not be set in a tuning.* by --optimizer",
            ),
            ("grid", {"overrides": {"optimizer.name": "sgdm"}}, "can not be set in a tuning"),
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
