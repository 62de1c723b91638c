import dataclasses
import json
import signal

import pytest
from tiny_training import TinyData, tiny_run

from nomadam.experiments import comparison as comparing
from nomadam.experiments.catalog import (
    catalog,
    default_folder,
    find_study,
    make_all,
    make_run,
)
from nomadam.experiments.child_process import Outcome, explain
from nomadam.experiments.comparison import plan_comparison, run_arms
from nomadam.experiments.configuration import OptimizerChoice, Run, to_json
from nomadam.runs import FolderInUseError, RunFolder


@dataclasses.dataclass(frozen=True, kw_only=True)
class Missing(TinyData):
    def load(self, cache_folder=None):
        raise ValueError("data source '/nowhere': no such folder")


RATES = {"adamw": 1e-3, "sgdm": 3e-1, "sgd_sai": 3e-2}
HERE = "test_comparison"


def study(optimizer: str = "sgd_sai") -> Run:
    return tiny_run(optimizer, RATES[optimizer], name=f"{HERE}.study")


def single() -> Run:
    return tiny_run("sgdm", name=f"{HERE}.single")


def grid() -> list[Run]:
    rates = {"adamw": (1e-3, 5e-4), "sgd_sai": (0.01,)}
    return [tiny_run(name, lr, name=f"{HERE}.grid") for name in rates for lr in rates[name]]


def seeded_grid() -> list[Run]:
    return [tiny_run("adamw", name=f"{HERE}.seeded_grid", seed=seed) for seed in (0, 7)]


def nothing() -> list[Run]:
    return []


def number() -> int:
    return 3


def needs_more(width) -> Run:
    return single()


CONSTANT = 3


class TestNames:
    def test_catalog_lists_public_functions_that_return_runs(self, tmp_path):
        (tmp_path / "family").mkdir()
        (tmp_path / "family" / "near.py").write_text(
            "import a_library_that_is_not_installed\n"
            "def one() -> 'configuration.Run':\n"
            "    '''First line.\n\n    Not this.'''\n"
            "def many() -> list[Run]: ...\n"
            "def _hidden() -> Run: ...\n"
            "def needs(width) -> Run: ...\n"
            "def other() -> list[int]: ...\n"
            "class Shape:\n    def method(self) -> Run: ...\n"
        )
        (tmp_path / "_private.py").write_text("def one() -> Run: ...")
        entries = [vars(entry) for entry in catalog(tmp_path)]
        assert entries == [
            {"name": "family.near.many", "summary": "", "grid": True},
            {"name": "family.near.one", "summary": "First line.", "grid": False},
        ]

    def test_everything_listed_can_be_made(self):
        for entry in catalog():
            made = make_all(entry.name)
            assert entry.summary
            assert all(run.name == entry.name for run in made)
            assert (len(made) > 1) == entry.grid

    @pytest.mark.parametrize(
        ("name", "words"),
        [
            ("gpt2_pretraining.dmo", "did you mean gpt2_pretraining.demo"),
            ("demo", r"did you mean \w+\.demo"),
            ("gpt2.demo", "did you mean gpt2_pretraining.demo"),
            ("no.such.thing", "nomadam list"),
            ("../etc/passwd", "not a dotted name"),
            ("", "not a dotted name"),
            (f"{HERE}.CONSTANT", "int"),
        ],
    )
    def test_unknown_names_are_answered(self, name, words):
        with pytest.raises(ValueError, match=words):
            find_study(name)

    @pytest.mark.parametrize(
        ("source", "words"),
        [
            ("import a_library_that_is_not_installed", "a_library_that_is_not_installed"),
            ("def f(:", "SyntaxError"),
            ("1 / 0", "ZeroDivisionError"),
        ],
    )
    def test_a_file_that_does_not_import_is_explained(self, source, words, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        name = f"broken_{words[:4].lower()}"
        (tmp_path / f"{name}.py").write_text(source)
        with pytest.raises(ValueError, match=f"{name} can not be imported.*{words}"):
            find_study(f"{name}.run")

    @pytest.mark.parametrize(
        ("name", "words"),
        [
            ("nothing", "an empty list"),
            ("number", "returned int"),
            ("needs_more", "width"),
            ("grid", f"nomadam compare {HERE}.grid"),
        ],
    )
    def test_functions_that_make_no_single_run(self, name, words):
        with pytest.raises(ValueError, match=words):
            make_run(f"{HERE}.{name}")

    def test_an_optimizer_that_the_function_does_not_take(self):
        with pytest.raises(ValueError, match="takes no argument named optimizer"):
            make_run(f"{HERE}.single", optimizer="adamw")


class TestPlans:
    def test_each_optimizer_has_its_own_learning_rate(self):
        planned = plan_comparison(f"{HERE}.study")
        assert planned.labels == ["adamw", "sgdm", "sgd_sai"]
        assert {arm.label: arm.run.optimizer.lr for arm in planned.arms} == RATES
        assert planned.reference == "adamw"

    def test_chosen_optimizers_overrides_and_seeds(self):
        planned = plan_comparison(
            f"{HERE}.study",
            optimizers=["sgd_sai", "sgdm", "sgd_sai"],
            num_seeds=2,
            overrides={"seed": "5", "steps": "6"},
        )
        arms = [(arm.label, arm.run.seed, arm.run.steps) for arm in planned.arms]
        # Seed by seed, so that what is interrupted has compared something.
        assert arms == [("sgd_sai", 5, 6), ("sgdm", 5, 6), ("sgd_sai", 6, 6), ("sgdm", 6, 6)]
        assert planned.reference == "sgd_sai"
        assert planned.arms[0].title == "sgd_sai seed 5"

    def test_a_grid_is_labelled_by_what_differs(self):
        labels = plan_comparison(f"{HERE}.grid").labels
        assert labels == ["adamw lr=0.001", "adamw lr=0.0005", "sgd_sai lr=0.01"]

    def test_seeds_of_a_grid_share_a_label(self):
        planned = plan_comparison(f"{HERE}.seeded_grid")
        assert [(arm.label, arm.run.seed) for arm in planned.arms] == [("adamw", 0), ("adamw", 7)]

    def test_equal_runs_are_one_arm(self):
        planned = plan_comparison(f"{HERE}.grid", overrides={"optimizer.lr": "0.1"})
        assert planned.labels == ["adamw", "sgd_sai"]

    def test_folders_are_found_again_and_are_those_of_single_runs(self):
        planned, again = (plan_comparison(f"{HERE}.study") for _ in range(2))
        assert planned.folder == again.folder
        assert planned.folder.name.startswith(f"compare-{HERE}.study-")
        assert planned.arms[0].folder == default_folder(study("adamw"))
        assert plan_comparison(f"{HERE}.study", num_seeds=2).folder != planned.folder

    def test_out_holds_everything(self, tmp_path):
        planned = plan_comparison(f"{HERE}.single", out=tmp_path / "all")
        assert planned.folder == tmp_path / "all"
        assert planned.arms[0].folder.parent == tmp_path / "all"

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"num_seeds": 0}, "number of seeds is 0"),
            ({"overrides": {"optimizer.rl": "1"}}, "optimizer.lr"),
            ({"overrides": {"steps": "few"}}, "integer"),
        ],
    )
    def test_wrong_plans(self, options, words):
        with pytest.raises(ValueError, match=words):
            plan_comparison(f"{HERE}.study", **options)


def pretend(arm, options, make_progress):
    """Train nothing, but leave what a training leaves."""
    if arm.run.optimizer.name == "sgdm":
        raise ImportError("no such package")
    folder = RunFolder(arm.folder)
    status = "diverged" if arm.run.optimizer.name == "sgd_sai" else "finished"
    folder.write_json("run.json", {"run": to_json(arm.run)})
    folder.write_json("result.json", {"status": status, "validation_loss": 1.5})
    return folder.read_json("result.json")


def in_this_process(function, *arguments):
    try:
        return Outcome(value=function(*arguments))
    except Exception as error:
        return Outcome(error=explain(error), bad_input=isinstance(error, ValueError))


@pytest.fixture
def run_here():
    told = []

    def run_arms_here(planned, train=pretend, *, again=False, options=None):
        told.clear()
        run_arms(
            planned,
            options=options or {},
            make_progress=print,
            tell=lambda arm, outcome: told.append((arm.label, outcome.status, outcome.trained)),
            train=train,
            call=in_this_process,
            again=again,
        )
        return list(told)

    return run_arms_here


class TestRunning:
    def test_goes_on_after_failures_and_trains_nothing_twice(self, run_here, tmp_path):
        planned = plan_comparison(f"{HERE}.study", out=tmp_path / "out")
        told = [
            ("adamw", "finished", True),
            ("sgdm", "failed", True),
            ("sgd_sai", "diverged", True),
        ]
        assert run_here(planned) == told
        links = json.loads((tmp_path / "out" / "comparison.json").read_text())
        assert links["reference"] == "adamw"
        assert [arm["status"] for arm in links["arms"]] == ["finished", "failed", "diverged"]
        assert links["arms"][1]["error"] == "no such package"
        for arm in links["arms"]:
            if arm["status"] != "failed":
                assert (tmp_path / "out" / arm["folder"] / "run.json").exists()
        # Again: only what failed is tried.
        told = [(label, status, status == "failed") for label, status, _ in told]
        assert run_here(planned) == told

    def test_another_run_in_an_arms_folder_is_not_taken_for_it(self, run_here, tmp_path):
        planned = plan_comparison(f"{HERE}.study", optimizers=["adamw"], out=tmp_path)
        arm = planned.arms[0]
        other = dataclasses.replace(arm, run=dataclasses.replace(arm.run, steps=99))
        pretend(other, {}, None)
        assert run_here(planned) == [("adamw", "finished", True)]

    def test_damaged_result_is_trained_again(self, run_here, tmp_path):
        planned = plan_comparison(f"{HERE}.study", optimizers=["adamw"], out=tmp_path)
        run_here(planned)
        (planned.arms[0].folder / "result.json").write_text("{")
        assert run_here(planned) == [("adamw", "finished", True)]

    def test_with_again_everything_is_trained_again(self, run_here, tmp_path):
        planned = plan_comparison(f"{HERE}.study", optimizers=["adamw"], out=tmp_path)
        run_here(planned)
        assert run_here(planned, again=True) == [("adamw", "finished", True)]

    @pytest.mark.parametrize(
        ("changes", "options", "words"),
        [
            ({}, {"device": "toaster"}, "device = 'toaster'"),
            ({"data": Missing()}, {}, "/nowhere"),
            ({"optimizer": OptimizerChoice(name="adamw", lr=1, arguments={"eps": -1})}, {}, "eps"),
            ({"optimizer": OptimizerChoice(name="adamm", lr=1)}, {}, "nearest: adam"),
        ],
    )
    def test_nothing_is_forgotten_before_all_is_found_to_be_there(
        self, run_here, tmp_path, changes, options, words
    ):
        planned = plan_comparison(f"{HERE}.study", optimizers=["adamw", "sgd_sai"], out=tmp_path)
        arms = [planned.arms[0], dataclasses.replace(planned.arms[1], label="other")]
        arms[1] = dataclasses.replace(arms[1], run=dataclasses.replace(arms[1].run, **changes))
        planned = dataclasses.replace(planned, arms=tuple(arms))
        for arm in arms:
            pretend(arm, {}, None)
        with pytest.raises(ValueError, match=words):
            run_here(planned, again=True, options=options)
        assert all(comparing.ended_result(arm) for arm in arms)

    def test_a_wrong_argument_is_refused_before_any_arm_is_trained(self, run_here, tmp_path):
        planned = plan_comparison(f"{HERE}.study", out=tmp_path / "out")
        choice = OptimizerChoice(name="adamw", lr=1, arguments={"beta2": 2})
        last = dataclasses.replace(planned.arms[2].run, optimizer=choice)
        arms = (*planned.arms[:2], dataclasses.replace(planned.arms[2], run=last))
        planned = dataclasses.replace(planned, arms=arms)
        with pytest.raises(ValueError, match="sgd_sai: beta2 must be"):
            run_here(planned, lambda *_: pytest.fail("an arm was trained"))
        assert not (tmp_path / "out").exists()

    def test_one_process_at_a_time_compares_in_a_folder(self, run_here, tmp_path):
        planned = plan_comparison(f"{HERE}.study", optimizers=["adamw"], out=tmp_path)
        refused = []

        def in_the_meantime(arm, options, make_progress):
            before = (tmp_path / "comparison.json").read_bytes()
            for again in (False, True):
                with pytest.raises(FolderInUseError, match="another process is comparing in"):
                    fixed = {"options": {}, "make_progress": print, "tell": print}
                    run_arms(planned, **fixed, call=in_this_process, again=again)
                refused.append(again)
            assert (tmp_path / "comparison.json").read_bytes() == before
            return pretend(arm, options, make_progress)

        assert run_here(planned, in_the_meantime) == [("adamw", "finished", True)]
        assert refused == [False, True]

    def test_interrupted_comparison_has_linked_what_it_will_do(self, run_here, tmp_path):
        planned = plan_comparison(f"{HERE}.study", out=tmp_path)

        def stopped(arm, options, make_progress):
            if arm.label == "sgdm":
                signal.raise_signal(signal.SIGINT)
            return pretend(arm, options, make_progress)

        with pytest.raises(KeyboardInterrupt):
            run_here(planned, stopped)
        links = json.loads((tmp_path / "comparison.json").read_text())
        assert [arm.get("status") for arm in links["arms"]] == ["finished", None, None]

    @pytest.mark.parametrize(
        "content",
        [
            "[]",
            "{",
            '{"arms": "abc"}',
            '{"arms": [{}]}',
            '{"arms": [3]}',
            '{"arms": {"folder": "x"}}',
        ],
    )
    def test_damaged_links_are_named(self, run_here, tmp_path, content):
        (tmp_path / "comparison.json").write_text(content)
        with pytest.raises(ValueError, match="comparison.json is damaged"):
            run_here(plan_comparison(f"{HERE}.study", out=tmp_path))

    @pytest.mark.parametrize("below", [".", "x"])
    def test_a_file_is_no_folder(self, run_here, tmp_path, below):
        (tmp_path / "file").touch()
        with pytest.raises(ValueError, match="file is a file, not a folder"):
            run_here(plan_comparison(f"{HERE}.study", out=tmp_path / "file" / below))

    def test_folders_of_others_are_refused(self, run_here, tmp_path):
        run_here(plan_comparison(f"{HERE}.study", out=tmp_path))
        # More arms in the same folder lose nothing; other arms would.
        run_here(plan_comparison(f"{HERE}.study", num_seeds=2, out=tmp_path))
        with pytest.raises(ValueError, match="another comparison"):
            run_here(plan_comparison(f"{HERE}.single", out=tmp_path))
        held = plan_comparison(f"{HERE}.study", out=tmp_path).arms[0].folder
        with pytest.raises(ValueError, match="holds a run"):
            run_here(plan_comparison(f"{HERE}.study", out=held))
