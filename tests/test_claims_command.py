"""The command `nomadam claims`: what it would train, what it refuses, and damage that it names."""

import json
import re
import shutil

import pytest
from claim_folders import BY_NAME, found, keep, plant, with_arms

from nomadam.cli import main
from nomadam.experiments.claim_runs import Places, ended_and_left, final_runs
from nomadam.experiments.claim_settings import SETTINGS
from nomadam.experiments.claims import CLAIMS, verdicts


@pytest.fixture
def places(tmp_path):
    return Places(kept=tmp_path / "kept", work=tmp_path / "work")


def test_the_command_says_what_it_would_train(tmp_path, capsys):
    assert main(["claims", "--dry-run", "--json", "--out", str(tmp_path)]) == 0
    planned = json.loads(capsys.readouterr().out)
    beforehand = {each.name for each in SETTINGS if not each.afterwards}
    assert {row["setting"] for row in planned["rows"]} == beforehand
    assert {row["kept"] for row in planned["rows"]} == {0}
    assert 0 < planned["core_seconds"] <= planned["allowed"]
    again = (9 + 3) * 2 * 71 + (25 + 3) * 6 * 10  # second searches of gpt2_long and resnet18
    longer = 5 * (17 * (105 - 55) + 2 * (130 - 71) + 2 * (190 - 116))
    assert planned["afterwards"] == again + longer
    assert list(tmp_path.iterdir()) == []


def test_what_was_asked_afterwards_is_trained_where_it_is_named(tmp_path, capsys):
    options = ["claims", "--dry-run", "--setting", "gpt2_prose", "--out", str(tmp_path)]
    assert main([*options, "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert [row["setting"] for row in planned["rows"]] == ["gpt2_prose"]
    assert planned["afterwards"] == BY_NAME["gpt2_prose"].seconds
    assert main(options) == 0
    assert "0.8 hours of one core, of which 0.8 are left" in capsys.readouterr().out


def test_what_is_kept_is_not_trained_again(places):
    clock, lora, gpt2 = BY_NAME["clock"], with_arms("lora", "adamw"), with_arms("gpt2", "adamw")
    assert ended_and_left(places, clock) == (0, 5 * 6)
    assert ended_and_left(places, lora) == (0, 100 + 17 * 22)
    assert ended_and_left(places, gpt2) == (0, 12 * 55 + 5 * 105)
    keep(places, clock, clock.studies()[3], {}, seed=3)
    plant(places, lora, {"adamw": 5.0})
    plant(places, gpt2, {"adamw": 5.0})
    assert ended_and_left(places, clock) == (1, 4 * 6)
    assert ended_and_left(places, lora) == (17, 0)
    shutil.rmtree(places.folder(gpt2, final_runs(places, gpt2, "adamw")[0]))
    assert ended_and_left(places, gpt2) == (16, 105)


def test_a_dry_run_tells_what_is_kept_and_what_is_left(places, capsys):
    clock = BY_NAME["clock"]
    for seed, study in clock.studies().items():
        keep(places, clock, study, {}, seed=seed)
    options = ["claims", "--dry-run", "--out", str(places.kept)]
    assert main([*options, "--setting", "clock"]) == 0
    told = capsys.readouterr().out
    assert "0.0 hours of one core, of which 0.0 are left" in told and "not among them" not in told
    assert main(options) == 0
    told = capsys.readouterr().out
    assert "12.3 hours of one core, of which 12.3 are left" in told
    assert "unless named by --setting: gpt2_prose, gpt2_bytes\n" in told
    assert main([*options, "--json", "--setting", "clock"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert (row["kept"], row["left_seconds"]) == (5, 0)
    assert main([*options, "--decide"]) == 2
    assert "--decide trains nothing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [(["--setting", "nope"], "must be one of gpt2"), (["--page", "none.md"], "is no file")],
)
def test_the_command_refuses_what_is_not_there(options, words, capsys):
    assert main(["claims", *options]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--page", "--pictures", "--work", "--out"])
def test_what_could_not_be_written_is_refused_before_any_training(option, tmp_path, capsys):
    file = tmp_path / "notes.md"
    file.write_text("no marks\n")
    assert main(["claims", "--setting", "clock", option, str(file)]) == 2
    assert ("has no part" if option == "--page" else "is a file") in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [file] and file.read_text() == "no marks\n"


def test_the_command_decides_all_of_what_is_there(tmp_path, capsys):
    assert main(["claims", "--decide", "--setting", "vit"]) == 2
    assert "leave out --setting" in capsys.readouterr().err
    assert main(["claims", "--decide", "--out", str(tmp_path / "elsewhere")]) == 2
    assert "keeps no trainings of gpt2" in capsys.readouterr().err
    assert not (tmp_path / "elsewhere").exists()


def test_the_command_decides_what_is_kept(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("nomadam.experiments.claim_runs.train_all", lambda *a, **k: None)
    page = tmp_path / "page.md"
    page.write_text("<!-- begin claims -->\n<!-- end claims -->\n")
    assert main(["claims", "--out", str(tmp_path / "kept"), "--page", str(page)]) == 0
    kept = json.loads((tmp_path / "kept" / "claims.json").read_text())
    assert len(kept["claims"]) == len(CLAIMS)
    assert "The paper's claims" in page.read_text()
    assert "undecided" in capsys.readouterr().out


EVALUATION = '{"step": 50, "validation_loss": %s, "grad_norm": %s}'


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metrics.jsonl", None),
        ("metrics.jsonl", ""),
        ("metrics.jsonl", '{"step": 50, "validation_lo'),
        ("metrics.jsonl", "[1]"),
        ("metrics.jsonl", "1"),
        ("metrics.jsonl", '{"a": 1}'),
        ("metrics.jsonl", '{"step": 50, "grad_norm": 1.0}'),
        ("metrics.jsonl", EVALUATION % ("NaN", 1.0)),
        ("metrics.jsonl", EVALUATION % ("null", 1.0)),
        ("metrics.jsonl", EVALUATION % (6.5, '"1"')),
        ("gains.json", '{"format": 1, "blocks": 3}'),
        ("run.json", "{"),
        ("result.json", '{"status": "finished", "validation_loss": 4.9}'),
    ],
)
def test_a_damaged_file_of_what_is_kept_is_named(places, name, content):
    gpt2 = with_arms("gpt2", "adamw", "sgd_sai")
    plant(places, gpt2, {"adamw": 5.0, "sgd_sai": 4.9}, early={"adamw": 6.0, "sgd_sai": 6.5})
    verdicts(found(places, gpt2)[1])
    file = places.folder(gpt2, final_runs(places, gpt2, "sgd_sai")[0]) / name
    file.unlink(missing_ok=True)
    if content is not None:
        file.write_text(content)
    with pytest.raises(ValueError, match=re.escape(str(file))):
        verdicts(found(places, gpt2)[1])


def test_a_number_that_is_lost_is_no_divergence(places):
    vit = with_arms("vit", "adamw", "sgd_sai")
    plant(places, vit, {"adamw": 0.5, "sgd_sai": 0.6})
    file = places.folder(vit, final_runs(places, vit, "sgd_sai")[0]) / "result.json"
    kept = json.loads(file.read_text())
    del kept["validation_accuracy"]
    file.write_text(json.dumps(kept))
    with pytest.raises(ValueError, match=f"{file} is .* no number validation_accuracy"):
        verdicts(found(places, vit)[1])
