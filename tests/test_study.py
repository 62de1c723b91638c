"""A study goes through the same commands as a Run: list, run, --set, --from, report."""

import dataclasses
import json
import sys

import pytest

from nomadam.cli import main
from nomadam.experiments.catalog import (
    catalog,
    default_folder,
    make_one,
    make_run,
    make_runs,
    read_run,
)
from nomadam.experiments.configuration import (
    differing_fields,
    from_json,
    override,
    short_hash,
    to_json,
)
from nomadam.experiments.memory_and_step_time import MemoryAndStepTime, demo
from nomadam.experiments.study import Findings, Study, Table, parts_of
from nomadam.reports import summary_rows, write_report
from nomadam.reports.study_pages import only_studies, study_tables
from nomadam.runs import AnotherRunError, RunFolder, RunFolderError

HERE = "test_study"
calls = []


@dataclasses.dataclass(frozen=True, kw_only=True)
class Squares(Study):
    """Squares of the numbers up to a limit, each a part."""

    limit: int = 4
    stop_at: int | None = None

    def measure(self, home, *, device, cache, make_progress, tell):
        for number in range(1, self.limit + 1):
            if number == self.stop_at:
                raise KeyboardInterrupt
            if not parts_of(home).read_object(f"{number}.json"):
                calls.append(number)
                parts_of(home).write_json(f"{number}.json", {"square": number**2})
        squares = [
            parts_of(home).read_json(f"{n}.json")["square"] for n in range(1, self.limit + 1)
        ]
        table = Table(title="Squares <b>", heads=("n", "its | square"),
                      rows=[(f"{n + 1}", square) for n, square in enumerate(squares)],
                      note="Of *whole* numbers.")  # fmt: skip
        return Findings(numbers={"sum": float(sum(squares)), "unknown": None}, tables=(table,))


def squares() -> Study:
    """The first four squares."""
    return Squares(name=f"{HERE}.squares")


def own_type() -> Squares:
    return Squares(name=f"{HERE}.own_type", limit=2)


@pytest.fixture(autouse=True)
def nobody_called():
    calls.clear()


def execute(study, folder, **options):
    return study.execute(folder, make_progress=None, device="cpu", **options)


@pytest.fixture
def nomadam(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["nomadam"])

    def call(*words):
        code = main(words)
        return code, *capsys.readouterr()

    return call


class TestConfiguration:
    def test_it_comes_back_from_json(self):
        study = override(demo(), {"timed": "vit_s_16,gpt2_xl", "rounds": "3"})
        written = json.loads(json.dumps(to_json(study)))
        assert written["class"].endswith("memory_and_step_time.MemoryAndStepTime")
        assert from_json(written) == study and isinstance(study, MemoryAndStepTime)
        assert short_hash(from_json(written)) == short_hash(study) != short_hash(demo())
        assert differing_fields(demo(), study).keys() == {"timed", "rounds"}

    def test_a_run_in_it_is_changed_by_field(self):
        from nomadam.experiments.gsnr_over_training import gpt2

        changes = {"run.steps": "7", "run.optimizer.arguments.gain": "sqrt_numel"}
        study = override(gpt2(), changes)
        assert (study.run.steps, study.run.optimizer.arguments["gain"]) == (7, "sqrt_numel")
        assert from_json(json.loads(json.dumps(to_json(study)))) == study

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"round": "3"}, "nearest: rounds"),
            ({"name": "x"}, "it says what made"),
            ({"rounds.gain": "3"}, "unknown field"),
            ({"rounds": "0"}, "at least 1"),
            ({"timed": "gpt9"}, "some of vit_s_16"),
            ({"models": ""}, "one or several"),
            ({"seconds": "0"}, "above 0"),
        ],
    )
    def test_wrong_changes_are_refused(self, changes, words):
        with pytest.raises(ValueError, match=words):
            override(demo(), changes)

    @pytest.mark.parametrize(
        "cls",
        [
            "os.system",
            "nomadam.experiments.language_model.GPT2Model",
            "nomadam.experiments.study.Nothing",
            "nomadam.experiments.configuration.Run",
            f"{HERE}.Squares",
            7,
        ],
    )
    def test_other_classes_are_refused(self, cls):
        with pytest.raises(ValueError, match="class = .*must be a"):
            from_json({"class": cls, "name": "x", "layers": 1, "heads": 1, "width": 1})

    def test_names_are_dotted_paths(self):
        with pytest.raises(ValueError, match="name = '../x'"):
            Squares(name="../x")


class TestCatalog:
    def test_functions_that_return_a_study_are_listed(self, tmp_path):
        (tmp_path / "near.py").write_text(
            "class Own(Study): ...\nclass Other: ...\n"
            "def one() -> Study:\n    '''First.'''\n"
            "def two() -> Own: ...\n"
            "def three() -> Other: ...\n"
        )
        assert [entry.name for entry in catalog(tmp_path)] == ["near.one", "near.two"]

    def test_it_is_one_and_no_run(self):
        assert make_one(f"{HERE}.squares").name == f"{HERE}.squares"
        for make in (make_run, make_runs):
            with pytest.raises(ValueError, match=f"nomadam run {HERE}.squares"):
                make(f"{HERE}.squares")


class TestExecution:
    def test_its_folder_is_that_of_a_run(self, tmp_path):
        result = execute(squares(), tmp_path)
        assert result == {"status": "finished", "sum": 30.0, "unknown": None}
        home = RunFolder(tmp_path)
        assert home.read_header()["run"] == to_json(squares())
        assert home.read_json("environment.json")["device"] == "cpu"
        assert home.read_result() == result

    def test_what_has_ended_is_not_done_again_unless_asked_for(self, tmp_path):
        first = execute(squares(), tmp_path)
        assert execute(squares(), tmp_path) == first and calls == [1, 2, 3, 4]
        assert execute(squares(), tmp_path, again=True) == first and len(calls) == 8
        assert "resumed" not in RunFolder(tmp_path).read_json("environment.json")

    def test_interrupted_it_goes_on(self, tmp_path):
        with pytest.raises(KeyboardInterrupt):
            execute(Squares(name="s", stop_at=3), tmp_path)
        assert not (tmp_path / "result.json").exists() and calls == [1, 2]
        # The same study, which nothing stops now.
        header = RunFolder(tmp_path).read_json("run.json")
        header["run"]["stop_at"] = None
        RunFolder(tmp_path).write_json("run.json", header)
        assert execute(Squares(name="s"), tmp_path)["sum"] == 30
        assert calls == [1, 2, 3, 4]
        assert len(RunFolder(tmp_path).read_json("environment.json")["resumed"]) == 1

    def test_another_studys_folder_is_refused(self, tmp_path):
        execute(squares(), tmp_path)
        with pytest.raises(AnotherRunError, match="limit: 4 there, 2 here"):
            execute(Squares(name=f"{HERE}.squares", limit=2), tmp_path)

    def test_a_folder_in_use_and_a_device_that_is_not_there_are_refused(self, tmp_path):
        with RunFolder(tmp_path).locked("working"):
            with pytest.raises(RunFolderError, match="another process is working"):
                execute(squares(), tmp_path)
        with pytest.raises(ValueError, match="device = 'tpu'"):
            squares().execute(tmp_path, make_progress=None, device="tpu")
        assert not calls


class TestCommands:
    def test_run_from_and_report(self, nomadam, tmp_path):
        code, out, _ = nomadam("run", f"{HERE}.squares", "--set", "limit=3", "--device", "cpu")
        folder = default_folder(override(squares(), {"limit": 3}))
        assert code == 0 and "Squares <b>" in out and str(folder) in out
        code, out, _ = nomadam("run", f"{HERE}.squares", "--set", "limit=3", "--json")
        assert code == 0 and json.loads(out)["sum"] == 14 and calls == [1, 2, 3]
        code, out, _ = nomadam("report", str(folder))
        assert code == 0 and "report.html" in out
        assert "Squares \\&lt;b" in (text := (folder / "report.md").read_text()) or "&lt;b" in text
        assert "its \\| square" in text and "Of \\*whole\\* numbers" in text
        html = (folder / "report.html").read_text()
        assert "Squares &lt;b&gt;" in html and "<b>" not in html and "limit" in html

    def test_a_study_of_the_package_is_repeated_from_its_folder(self, nomadam):
        words = ["--set", "timed=", "--set", "models=vit_s_16"]
        assert nomadam("run", "memory_and_step_time.demo", *words, "--out", "one")[0] == 0
        code, out, err = nomadam("run", "--from", "one", "--json")
        assert code == 0, err
        assert json.loads(out)["vit_s_16.adamw.state_bytes"] == 2 * 4 * 22_050_664
        assert read_run(json.loads(out)["folder"]) == read_run("one")
        assert nomadam("run", "--from", "one", "--out", "one")[0] == 2

    def test_dry_run_shows_it_and_does_nothing(self, nomadam, tmp_path):
        code, out, _ = nomadam("run", f"{HERE}.squares", "--dry-run")
        assert code == 0 and '"limit": 4' in out and not calls and not list(tmp_path.iterdir())

    @pytest.mark.parametrize(
        ("words", "told"),
        [
            (["run", f"{HERE}.squares", "--tensorboard"], "is for trainings"),
            (["run", f"{HERE}.squares", "--optimizer", "adamw"], "no argument named optimizer"),
            (["run", f"{HERE}.squares", "--set", "limits=3"], "nearest: limit"),
            (["compare", f"{HERE}.squares"], "is a study and no training"),
        ],
    )
    def test_what_is_for_trainings_is_refused(self, nomadam, tmp_path, words, told):
        code, out, err = nomadam(*words)
        assert (code, out) == (2, "") and told in err and not calls

    def test_interrupted_it_says_how_to_go_on(self, nomadam):
        code, _, err = nomadam("run", f"{HERE}.squares", "--set", "stop_at=2")
        assert code == 130 and "to go on:" in err and calls == [1]


class TestReports:
    def test_an_unfinished_study_says_so(self, tmp_path):
        with pytest.raises(KeyboardInterrupt):
            execute(Squares(name="s", stop_at=2), tmp_path)
        write_report([tmp_path], tmp_path)
        assert "not finished" in (tmp_path / "report.md").read_text()

    def test_studies_and_trainings_do_not_mix(self, tmp_path):
        execute(squares(), tmp_path / "study")
        RunFolder(tmp_path / "run").write_json("run.json", {"run": {"name": "x"}, "data": {}})
        assert only_studies([tmp_path / "run"]) == []
        with pytest.raises(ValueError, match="separately"):
            write_report([tmp_path / "study", tmp_path / "run"], tmp_path / "out")
        with pytest.raises(ValueError):
            summary_rows([tmp_path / "nowhere"])

    @pytest.mark.parametrize(
        "held",
        [
            {"tables": [{"title": "x"}]},
            {"tables": [{"title": "x", "heads": ["a"], "rows": [[1, 2]], "note": ""}]},
            {"tables": [{"title": 3, "heads": ["a"], "rows": [], "note": ""}]},
            {"tables": 3},
        ],
    )
    def test_damaged_tables_are_told(self, tmp_path, held):
        RunFolder(tmp_path).write_json("tables.json", held)
        with pytest.raises(ValueError, match="tables.json is damaged"):
            study_tables(tmp_path)


class TestMemoryAndStepTime:
    def test_the_state_is_beside_the_papers(self, tmp_path):
        study = override(demo(), {"timed": "", "models": "vit_s_16,llama2_7b"})
        numbers = execute(study, tmp_path)
        assert (
            numbers["llama2_7b.sgd_sai.state_bytes"] * 2 == numbers["llama2_7b.adamw.state_bytes"]
        )
        rows = {tuple(row[:2]): row[2:] for row in study_tables(tmp_path)[0].cells}
        assert rows["ViT-S/16", "adamw"] == ["0.16", "0.17", "1"]
        assert rows["Llama-2-7B", "sgd_sai"] == ["25.1", "25.15", "0.5"]
        assert study_tables(tmp_path)[1].cells == []

    def test_what_was_timed_is_kept_and_what_does_not_fit_is_named(self, tmp_path, monkeypatch):
        from nomadam.experiments.cost import timing

        timed = []

        def measured(make, contenders, device, **options):
            timed.append(options["rounds"])
            names = [each.name for each in contenders]
            middle = {"median": 2.0, "q1": 1.0, "q3": 3.0}
            rows = {
                name: {"step_ms": middle, "ratio": middle} for name in names if name != "prodigy"
            }
            return {"rows": rows, "skipped": {"prodigy": "needs 900.0 GiB"}}

        monkeypatch.setattr(timing, "measure_steps", measured)
        study = override(demo(), {"timed": "vit_s_16,gpt2_xl", "models": "vit_s_16,gpt2_xl"})
        numbers = execute(study, tmp_path)
        assert timed == [10, 10] and numbers["gpt2_xl.sgd_sai_fused.step_ms"] == 2.0
        assert "gpt2_xl.prodigy.step_ms" not in numbers
        (tmp_path / "result.json").unlink()
        (tmp_path / "parts" / "gpt2_xl.json").unlink()
        assert execute(study, tmp_path) == numbers and timed == [10, 10, 10]
        cells = study_tables(tmp_path)[1].cells
        assert ["needs 900.0 GiB"] * 2 == [row[-1] for row in cells if row[1] == "prodigy"]
        assert {row[5] for row in cells if row[:2] == ["ViT-S/16", "adamw"]} == {"45"}
