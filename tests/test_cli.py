import dataclasses
import io
import json
import os
import re
import signal
import subprocess
import sys
import warnings

import pytest
import torch
from tiny_training import TinyData, TinyModel, tiny_run

from nomadam import cli, reports, terminal
from nomadam.cli import main
from nomadam.experiments import joint_calls
from nomadam.experiments.catalog import make_run
from nomadam.experiments.child_process import Outcome
from nomadam.experiments.configuration import Run, to_json
from nomadam.experiments.resources import environment
from nomadam.progress import Progress
from nomadam.runs import RunFolder

HERE = "test_cli"
COMMANDS = ("run", "compare", "list", "report", "profile")
SMALL_GPT2 = {
    "model.layers": 1,
    "model.heads": 2,
    "model.width": 16,
    "data.max_bytes": 200_000,
    "data.vocab_size": 300,
    "steps": 3,
    "batch_size": 2,
    "evaluation_batches": 1,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class FailingModel(TinyModel):
    def loss(self, module, batch):
        raise RuntimeError("the device is on fire")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MissingData(TinyData):
    def load(self, cache_folder=None):
        raise ValueError("data source '/nowhere': no such folder")


def study(optimizer: str = "sgd_sai") -> Run:
    rate = {"adamw": 1e-3, "sgdm": 1e12}.get(optimizer, 3e-2)
    return tiny_run(optimizer, rate, name=f"{HERE}.study")


def failing() -> Run:
    return tiny_run(name=f"{HERE}.failing", model=FailingModel())


def without_data() -> Run:
    return tiny_run(name=f"{HERE}.without_data", data=MissingData())


def grid() -> list[Run]:
    return [failing(), tiny_run("adamw", 1e-3, name=f"{HERE}.grid"), study("sgdm")]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def nomadam(capsys, monkeypatch):
    """Run a command in this process; its exit code, standard output and standard error."""

    def command(*words):
        words = [str(word) for word in words]
        monkeypatch.setattr(sys, "argv", ["nomadam", *words])
        code = main()
        out, err = capsys.readouterr()
        return code, out, err

    return command


def settings(fields):
    return [word for field, value in fields.items() for word in ("--set", f"{field}={value}")]


@pytest.mark.parametrize("command", [(), *((name,) for name in COMMANDS)])
def test_help_has_examples_and_exit_codes(nomadam, command):
    code, out, _ = nomadam(*command, "--help")
    assert code == 0
    assert "Examples:\n" in out
    assert all(re.search(rf"^ +{number}  +\w", out, re.MULTILINE) for number in (0, 1, 2, 3, 130))
    # The examples are commands that exist.
    shown = out.partition("Examples:\n")[2]
    for example in re.findall(r"^ +nomadam (\w+)", shown, re.MULTILINE):
        assert example in COMMANDS


def test_help_says_where_a_first_stage_is_put(nomadam):
    text = " ".join(nomadam("run", "--help")[1].split())
    assert "The run folder; a first stage and what a study trains are put beside it." in text


def test_list_is_one_whole_line_a_run_at_any_width(nomadam):
    done = subprocess.run(
        [sys.executable, "-m", "nomadam", "list"],
        env={**os.environ, "COLUMNS": "20"},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    lines = done.stdout.splitlines()
    _, out, _ = nomadam("list", "--json")
    entries = json.loads(out)
    assert [line.split()[0] for line in lines] == [entry["name"] for entry in entries]
    assert all(entry["summary"] in line for line, entry in zip(lines, entries, strict=True))
    assert "gpt2_pretraining.demo" in [entry["name"] for entry in entries]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run"], "NAME"),
        (["run", f"{HERE}.study", "--from", "x"], "either a NAME"),
        (["run", "gpt2_pretraining.dmo"], "gpt2_pretraining.demo"),
        (["run", f"{HERE}.grid"], "nomadam compare"),
        (["run", f"{HERE}.study", "--set", "optimizer.rl=1"], "optimizer.lr"),
        (["run", f"{HERE}.study", "--set", "steps=few"], "must be an integer"),
        (["run", f"{HERE}.study", "--set", "steps"], "FIELD=VALUE"),
        (["run", f"{HERE}.study", "--set", "=3"], "FIELD=VALUE"),
        (["run", f"{HERE}.study", "--optimizer", "adamm"], "adamw"),
        (["run", f"{HERE}.failing", "--optimizer", "adamw"], "no argument named optimizer"),
        (["run", f"{HERE}.without_data"], "/nowhere"),
        (["run", "--from", "missing"], "no run folder"),
        (["run", f"{HERE}.study", "--device", "toaster"], "toaster"),
        (["run", f"{HERE}.study", "--stpes", "3"], "No such option"),
        (["compare", f"{HERE}.study", "--seeds", "0"], "--seeds"),
        (["compare", "nothing.there"], "nothing.there"),
        (["report", "missing"], "does not exist"),
        (["report"], "FOLDER"),
        (["trian"], "trian"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(nomadam, words, message):
    code, out, err = nomadam(*words)
    assert code == 2
    assert message in err
    assert "Traceback" not in err + out
    assert out == ""


class TestRun:
    def test_trains_once_and_then_prints_its_result(self, nomadam):
        code, out, err = nomadam("run", f"{HERE}.study")
        assert code == 0
        assert out.startswith("finished: 12 steps")
        assert "step 12/12" in err
        folder = RunFolder(re.search(r"run folder +(\S+)", out)[1])
        assert folder.path.parts[0] == "runs"
        before = (folder.path / "metrics.jsonl").read_bytes()
        code, out, err = nomadam("run", f"{HERE}.study")
        assert code == 0
        assert "had ended before" in out
        assert err == ""
        assert (folder.path / "metrics.jsonl").read_bytes() == before
        code, out, err = nomadam("run", f"{HERE}.study", "--again", "--json")
        assert code == 0
        assert json.loads(out) == {"folder": str(folder.path), **folder.read_json("result.json")}
        assert "step 12/12" in err

    def test_divergence_is_exit_code_3(self, nomadam):
        code, out, _ = nomadam("run", f"{HERE}.study", "--optimizer", "sgdm")
        assert code == 3
        assert out.startswith("diverged at step")

    def test_failure_is_exit_code_1_and_shows_its_traceback_on_demand(self, nomadam):
        code, out, err = nomadam("run", f"{HERE}.failing")
        assert (code, out) == (1, "")
        assert err == "error: RuntimeError: the device is on fire\n"
        code, _, err = nomadam("run", f"{HERE}.failing", "--traceback")
        assert code == 1
        assert "Traceback" in err
        assert "in loss" in err

    def test_folders_of_others_are_refused(self, nomadam):
        assert nomadam("run", f"{HERE}.study", "--out", "one")[0] == 0
        code, _, err = nomadam("run", f"{HERE}.study", "--out", "one", "--set", "seed=3")
        assert code == 2
        assert "seed: 0 there, 3 here" in err
        RunFolder("two").write_json("comparison.json", {"arms": []})
        assert nomadam("run", f"{HERE}.study", "--out", "two")[0] == 2

    def test_a_run_is_not_repeated_onto_itself(self, nomadam, tmp_path):
        RunFolder("one").write_json("run.json", {"run": to_json(make_run("gpt2_pretraining.demo"))})
        (tmp_path / "two").symlink_to("one")
        for out in ("one", "./one/", "two"):
            code, out, err = nomadam("run", "--from", "one", "--out", out)
            assert (code, out) == (2, "")
            assert "is to repeat" in err
        assert [path.name for path in (tmp_path / "one").iterdir()] == ["run.json"]

    def test_interrupted_it_says_how_to_go_on(self, nomadam, monkeypatch):
        class Interrupting(Progress):
            def __call__(self, record):
                super().__call__(record)
                if record["step"] == 5:
                    signal.raise_signal(signal.SIGINT)

        words = ["run", f"{HERE}.study", "--again", "--out", "a folder"]
        with monkeypatch.context() as patched:
            patched.setattr(cli, "Progress", Interrupting)
            code, out, err = nomadam(*words)
        assert (code, out) == (130, "")
        assert "of 12" in err
        # Without --again, which would begin anew.
        assert err.endswith(f"to go on:\n  nomadam run {HERE}.study --out 'a folder'\n")
        code, _, err = nomadam("run", f"{HERE}.study", "--out", "a folder")
        assert code == 0
        assert "step 1/12" not in err
        assert [record["step"] for record in RunFolder("a folder").metrics()] == [*range(1, 13)]

    def test_a_folder_can_not_name_code_of_its_own(self, nomadam):
        # The classes of this file are none of nomadam's.
        RunFolder("planted").write_json("run.json", {"run": to_json(study())})
        code, _, err = nomadam("run", "--from", "planted")
        assert code == 2
        assert "must be a dataclass of nomadam.experiments" in err

    def test_real_run_is_estimated_trained_and_repeated(self, nomadam, tmp_path):
        words = ["gpt2_pretraining.demo", *settings(SMALL_GPT2), "--cache", tmp_path / "cache"]
        code, out, _ = nomadam("run", *words, "--dry-run", "--json")
        assert code == 0
        planned = json.loads(out)
        assert planned["run"]["steps"] == 3
        assert planned["estimate"]["num_params"] == 300 * 16 + 64 * 16 + 12 * 16**2 + 3 * 16
        assert planned["estimate"]["state_bytes_per_param"] == pytest.approx(4, abs=0.1)
        assert 0 < planned["estimate"]["seconds"] < 60
        assert not (tmp_path / "runs").exists()
        assert "about" in nomadam("run", *words, "--dry-run")[1]
        code, out, _ = nomadam("run", *words, "--json")
        assert code == 0
        folder = json.loads(out)["folder"]
        assert folder == planned["folder"]
        code, out, err = nomadam("run", "--from", folder, "--cache", tmp_path / "cache", "--json")
        repeated = json.loads(out)
        assert repeated["folder"] == f"{folder}-repeated"
        first = RunFolder(folder).read_json("result.json")
        assert repeated["validation_loss"] == first["validation_loss"]
        assert "the data is not the same" not in err


def loud() -> Run:
    warnings.warn("the model\nis loud", stacklevel=1)
    return study()


def test_a_warning_is_one_plain_line(nomadam):
    before = warnings.showwarning
    code, _, err = nomadam("run", f"{HERE}.loud", "--set", "steps=0")
    assert code == 2
    assert err == "warning: the model is loud\nerror: steps = 0: must be at least 1\n"
    assert warnings.showwarning is before


@pytest.mark.parametrize(
    "words",
    [
        ["run", f"{HERE}.study", "--out", "file"],
        ["run", f"{HERE}.study", "--out", "file/x"],
        ["run", f"{HERE}.study", "--out", "file/x", "--again"],
        ["run", "--from", "file"],
        ["run", "--from", "file/x"],
        ["compare", f"{HERE}.grid", "--out", "file"],
        ["compare", f"{HERE}.grid", "--out", "file/x/y", "--again"],
        ["report", "whole", "--out", "file"],
        ["report", "whole", "--out", "file/x"],
    ],
)
def test_a_file_in_the_place_of_a_folder_is_named(nomadam, tmp_path, words):
    (tmp_path / "file").write_text("kept")
    RunFolder("whole").write_json("run.json", {"run": to_json(study())})
    code, out, err = nomadam(*words)
    assert code == 2
    assert err.endswith("file is a file, not a folder; choose another folder\n")
    assert "Traceback" not in err
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("command", [["list"], ["run", f"{HERE}.study"]])
def test_sigterm_is_an_interruption(nomadam, monkeypatch, command):
    before = signal.getsignal(signal.SIGTERM)

    def terminated(*_, **__):
        signal.raise_signal(signal.SIGTERM)

    # Before a training answers the signal by itself.
    monkeypatch.setattr("nomadam.experiments.catalog.catalog", terminated)
    monkeypatch.setattr("nomadam.experiments.catalog.make_one", terminated)
    code, out, err = nomadam(*command)
    assert (code, out) == (130, "")
    assert err.startswith("interrupted\nto go on:\n  nomadam ")
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_run_that_diverges_at_once_is_not_estimated(nomadam):
    code, out, err = nomadam(
        "run", f"{HERE}.study", "--optimizer", "sgdm", "--set", "optimizer.lr=1e38", "--dry-run"
    )
    assert (code, out) == (2, "")
    assert re.search(r"not finite at step \d already.*lower optimizer.lr = 1e\+38", err)


@pytest.mark.parametrize(
    ("program", "name"),
    [
        ("/a/bin/nomadam", "nomadam"),
        ("/a/nomadam/__main__.py", "nomadam"),
        ("study.py", "study.py"),
    ],
)
def test_the_recorded_command_can_be_typed(monkeypatch, program, name):
    monkeypatch.setattr(sys, "argv", [program, "run", "x"])
    assert environment(torch.device("cpu"))["command"] == [name, "run", "x"]


class TestCompare:
    def test_arms_fail_and_diverge_and_the_others_are_reported(
        self, nomadam, tmp_path, monkeypatch
    ):
        code, out, err = nomadam("compare", f"{HERE}.grid", "--out", "all")
        assert code == 1
        assert re.search(r"^adamw +\d+\.\d{3} ", out, re.MULTILINE)
        assert re.search(r"^sgdm +diverged ", out, re.MULTILINE)
        assert "sgd_sai, seed 0: failed: RuntimeError: the device is on fire\n" in out
        assert out.endswith("report: all/report.html\n")
        assert (tmp_path / "all" / "report.md").exists()
        assert "the comparison goes on" in err
        # The same command tries again only what failed; no need for a process or pictures here.
        monkeypatch.setattr(joint_calls, "run_in_child", lambda *_: Outcome(error="still on fire"))
        monkeypatch.setattr(reports, "write_report", lambda folders, out: [out / "report.html"])
        code, out, err = nomadam("compare", f"{HERE}.grid", "--out", "all", "--json")
        assert code == 1
        assert err.count("trained before") == 2
        values = json.loads(out)
        assert values["failed"] == [{"label": "sgd_sai", "seed": 0, "error": "still on fire"}]
        finished = {row["label"]: row["num_finished"] for row in values["rows"]}
        assert finished == {"sgd_sai": 0, "adamw": 1, "sgdm": 0}
        assert values["report"] == ["all/report.html"]
        code, out, _ = nomadam("report", "all", "--out", "elsewhere")
        assert code == 0
        assert out.endswith("report: elsewhere/report.html\n")

    def test_bad_input_in_every_arm_is_exit_code_2(self, nomadam):
        code, out, err = nomadam("compare", f"{HERE}.without_data")
        assert code == 2
        assert "/nowhere" in err
        assert "report" not in out


class Terminal(io.StringIO):
    def isatty(self):
        return True


def records(steps, **more):
    for step in range(1, steps + 1):
        yield {"step": step, "tokens": 100 * step, "seconds": 0.5 * step, "step_ms": 500.0, **more}


class TestProgress:
    def test_plain_lines_are_few(self):
        stream = io.StringIO()
        with Progress("adamw", 1000, stream) as progress:
            for record in records(1000, train_loss=2.0):
                progress(record)
        lines = stream.getvalue().splitlines()
        assert len(lines) == 11
        assert lines[0].startswith("adamw  step 1/1000  loss 2.000  200 tokens/s  ")
        assert lines[0].endswith(" left")
        assert "step 1000/1000" in lines[-1]
        assert "left" not in lines[-1]
        assert "\x1b" not in stream.getvalue()

    def test_losses_that_are_not_numbers_are_shown(self):
        stream = io.StringIO()
        with Progress("adamw", 2, stream) as progress:
            for record in records(2, train_loss=None, validation_loss=float("nan")):
                progress(record)
        assert "loss not finite  val nan" in stream.getvalue()

    @pytest.mark.parametrize("width", [50, 80, 120])
    def test_terminal_line_fits_and_keeps_what_matters(self, width, monkeypatch):
        monkeypatch.setenv("COLUMNS", str(width))
        monkeypatch.setenv("TERM", "xterm")
        stream = Terminal()
        with Progress("adamw lr=0.001", 400, stream) as progress:
            for record in records(400, train_loss=9.5, validation_loss=8.25):
                progress(record)
        text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
        last = re.split(r"[\r\n]", text.rstrip())[-1]
        assert len(last) <= width
        assert all(words in last for words in ("adamw lr=0.001", "400/400", "loss 9.500", "took"))
        assert ("val 8.250" in last) == (width >= 80)


def test_tables_fold_labels_in_a_terminal_and_never_elsewhere(monkeypatch):
    rows = [["schedule_free_adamw lr=0.001", "5.318 ± 0.012"], ["[red]x", "diverged"]]
    piped = io.StringIO()
    monkeypatch.setattr(sys, "stdout", piped)
    terminal.show_table(["arm", "validation\nloss"], rows)
    assert "schedule_free_adamw lr=0.001  5.318 ± 0.012\n" in piped.getvalue()
    assert "[red]x " in piped.getvalue()
    monkeypatch.setenv("COLUMNS", "36")
    folded = Terminal()
    monkeypatch.setattr(sys, "stdout", folded)
    terminal.show_table(["arm", "validation\nloss"], rows)
    assert max(map(len, folded.getvalue().splitlines())) <= 36
    assert "5.318 ± 0.012\n" in folded.getvalue()
