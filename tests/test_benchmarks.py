"""The benchmark scripts, the tables that are made from their results, and `nomadam profile`."""

import importlib
import json
import re
import sys
from pathlib import Path

import pytest

from nomadam.cli import main

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    """A benchmark's module, imported as Python runs it."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.fixture
def results(script):
    return script("sections").read_results(BENCHMARKS / "results")


def test_the_pages_say_what_the_committed_results_say(script, results):
    tables = script("tables")
    assert tables.stale(results) == [], "run `make tables`"
    for page in tables.PAGES:
        assert tables.MARKER.search(page.read_text()), f"{page.name} has no table"


def test_every_section_is_on_a_page(script):
    tables = script("tables")
    text = "".join(page.read_text() for page in tables.PAGES)
    assert {found[1] for found in tables.MARKER.finditer(text)} == set(tables.SECTIONS)


def test_every_picture_of_the_page_is_there():
    text = (ROOT / "docs" / "speed.md").read_text()
    pictures = re.findall(r"\]\((pictures/\S+)\)", text)
    assert len(pictures) >= 3
    assert all((ROOT / "docs" / picture).is_file() for picture in pictures)


def test_only_what_is_between_markers_is_made_anew(script, results):
    tables = script("tables")
    text = "before\n<!-- begin goals -->\nwas | here\n<!-- end goals -->\nafter <!-- note -->\n"
    filled = tables.filled(text, results)
    assert filled.startswith("before\n<!-- begin goals -->\n| ")
    assert filled.endswith("|\n<!-- end goals -->\nafter <!-- note -->\n")
    assert "was | here" not in filled and tables.filled(filled, results) == filled
    with pytest.raises(KeyError, match="nothing"):
        tables.filled("<!-- begin nothing -->\n<!-- end nothing -->", results)


def test_a_stale_page_is_noticed(script, results, tmp_path, monkeypatch):
    tables = script("tables")
    page = tmp_path / "page.md"
    page.write_text("<!-- begin goals -->\n<!-- end goals -->")
    monkeypatch.setattr(tables, "PAGES", (page,))
    assert tables.stale(results) == [page]


def test_the_newest_result_of_each_kind_and_device_is_taken(script, tmp_path):
    for name, number in (("a_b_cpu_202612", 2), ("a_b_cpu_202611", 1), ("a_b_cuda_202601", 3)):
        (tmp_path / f"{name}.json").write_text(json.dumps({"number": number}))
    found = script("sections").read_results(tmp_path)
    assert {key: value["number"] for key, value in found.items()} == {
        ("a_b", "cpu"): 2,
        ("a_b", "cuda"): 3,
    }


def rows(**times):
    return {"rows": {name: {"rounds_ms": values} for name, values in times.items()}}


def test_goals_hold_are_missed_or_were_not_measured(script):
    goals = script("goals")
    # The machine slows down from round to round; the reference ran in more of them.
    found = rows(sgd_sai_fused=[1.0, 20.0, 300.0], torch_sgd_fused=[1.0, 10.0, 100.0, 1.0])
    assert goals.in_the_same_rounds(found, "sgd_sai_fused", "torch_sgd_fused") == 2.0
    assert goals.in_the_same_rounds(found, "sgd_sai_fused", "released_sgd_sai") is None
    results = {("step_time", "cpu"): {"shapes": {"gpt2_small": found}}}
    lines = goals.goals_table(results, script("sections").table).splitlines()
    (line,) = [line for line in lines if "torch SGD fused |" in line]
    assert line.split(" | ")[1:] == ["≤ 1.1", "2.00", "missed |"]
    assert all("not measured" in line for line in lines[2:] if line != line_of(lines, "2.00"))


def line_of(lines, text):
    return next(line for line in lines if text in line)


def test_a_benchmark_prints_a_table_and_writes_a_result(script, tmp_path, monkeypatch, capsys):
    words = ["--shapes", "tiny", "--optimizers", "sgd_sai_foreach", "--rounds", "2"]
    words += ["--device", "cpu", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["step_time.py", *words])
    script("step_time").main()
    out, err = capsys.readouterr()
    assert "SGDSaI, foreach" in out and "written to" in err
    (path,) = tmp_path.glob("step_time_cpu_??????.json")
    record = json.loads(path.read_text())
    assert record["what"] == "step_time"
    assert record["environment"]["command"] == ["step_time.py", *words]
    assert {"device_name", "threads", "torch", "git_commit", "packages"} <= set(
        record["environment"]
    )
    assert set(record["shapes"]["tiny"]["rows"]) == {"torch_sgd_fused", "sgd_sai_foreach"}
    # It can be made into a table.
    assert "tiny" in script("sections").step_times(script("sections").read_results(tmp_path))


@pytest.mark.parametrize(
    "name",
    [
        "step_time",
        "first_step",
        "memory",
        "scaling",
        "cold_start",
        "keep_runs",
        "run_all",
        "tables",
    ],
)
def test_every_benchmark_has_help(script, name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as ended:
        script(name).main()
    assert ended.value.code == 0 and "--" in capsys.readouterr().out


def test_quick_results_are_not_put_among_the_kept_ones(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["run_all.py", "--quick"])
    with pytest.raises(SystemExit) as ended:
        script("run_all").main()
    assert ended.value.code == 2 and "--out" in capsys.readouterr().err


def test_pictures_are_drawn_from_what_there_is(script, results, tmp_path):
    pictures = script("pictures")
    drawn = pictures.draw_all({("step_time", "cpu"): results["step_time", "cpu"]}, tmp_path)
    assert [path.name for path in drawn] == ["speed_ratios_cpu.png"]
    assert drawn[0].read_bytes().startswith(b"\x89PNG")
    assert pictures.draw_all({}, tmp_path) == []


def profile(capsys, *words):
    code = main(["profile", *words])
    return code, *capsys.readouterr()


def test_profile_measures_this_machine(capsys):
    words = ["--shapes", "tiny", "--device", "cpu", "--rounds", "2"]
    words += ["--optimizer", "sgd_sai_for_loop"]
    code, out, err = profile(capsys, *words)
    assert code == 0 and "136,960 parameters in 28 tensors" in out
    assert "torch SGD, fused" in out and "SGDSaI, for-loop" in out
    assert "torch_sgd_fused" in err
    code, out, _ = profile(capsys, *words, "--json")
    found = json.loads(out)
    assert code == 0 and set(found["rows"]) == {"torch_sgd_fused", "sgd_sai_for_loop"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--shapes", "gpt5"], "gpt2_small"),
        (["--optimizer", "adamm"], "torch_adamw_fused"),
        (["--device", "toaster"], "auto, cpu or cuda"),
        (["--rounds", "0"], "--rounds"),
    ],
)
def test_profile_refuses_what_it_does_not_know(capsys, words, message):
    code, out, err = profile(capsys, *words)
    assert code == 2 and message in err and out == ""


def test_runs_are_kept_without_their_weights_and_with_their_evaluations(script, tmp_path):
    made = tmp_path / "runs" / "demo-1"
    (made / "checkpoints").mkdir(parents=True)
    for name in ("run", "environment", "result"):
        (made / f"{name}.json").write_text("{}")
    rows = [{"step": 1}, {"step": 2, "validation_loss": 0.5}, {"step": 3}]
    (made / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "runs" / "unfinished").mkdir()
    assert script("keep_runs").keep([tmp_path / "runs"], tmp_path / "kept") == 1
    (kept,) = (tmp_path / "kept").iterdir()
    names = {"run.json", "environment.json", "result.json", "metrics.jsonl"}
    assert {path.name for path in kept.iterdir()} == names
    assert json.loads((kept / "metrics.jsonl").read_text()) == rows[1]
