"""Reports from made run folders: what is read, the numbers, damage and wrong folders."""

import errno
import json
import re
import statistics

import numpy as np
import pytest
from report_folders import (
    STATE_BYTES,
    demo_comparison,
    gpt2_blocks,
    grid_comparison,
    write_comparison,
    write_json,
    write_run,
)

from nomadam.durable_files import DiskFullError
from nomadam.reports import figures, summary_rows, write_report
from nomadam.reports.arms import read_comparison
from nomadam.reports.curves import curves, trailing_mean
from nomadam.reports.drawing import looks, shown
from nomadam.reports.gain_figures import rows_of_blocks
from nomadam.reports.reading import read_run
from nomadam.reports.tables import markdown, markdown_text


def test_summary_has_means_differences_and_the_ratio_of_states(tmp_path):
    folder = demo_comparison(tmp_path, seeds=3)
    rows = {row["label"]: row for row in summary_rows([folder])}
    assert list(rows) == ["adamw", "sgdm", "sgd_sai"]
    losses = {
        name: [
            json.loads((tmp_path / f"{name}-{seed}" / "result.json").read_text())["validation_loss"]
            for seed in range(3)
        ]
        for name in rows
    }
    row, reference = rows["sgd_sai"], rows["adamw"]
    assert row["validation_loss"] == pytest.approx(statistics.fmean(losses["sgd_sai"]))
    assert row["validation_loss_sd"] == pytest.approx(statistics.stdev(losses["sgd_sai"]))
    pairs = [a - b for a, b in zip(losses["sgd_sai"], losses["adamw"], strict=True)]
    assert row["difference"] == pytest.approx(statistics.fmean(pairs))
    assert row["difference_sd"] == pytest.approx(statistics.stdev(pairs))
    assert reference["is_reference"] and reference["difference"] is None
    assert (reference["state_bytes_per_param"], row["state_bytes_per_param"]) == (8, 4)
    assert (reference["state_ratio"], row["state_ratio"]) == (1.0, 0.5)
    num_params = sum(int(np.prod(shape)) for shape in gpt2_blocks(4).values())
    assert row["state_mb"] == pytest.approx(STATE_BYTES["sgd_sai"] * num_params / 1e6)
    assert row["optimizer_ms"] == pytest.approx(1.32) and row["peak_memory_mb"] == 527.6
    assert (row["num_seeds"], row["num_finished"], row["status"]) == (3, 3, "3 finished")


def test_run_folders_alone_are_compared_with_adamw(tmp_path):
    folders = [write_run(tmp_path / name, name, steps=10) for name in ("sgd_sai", "adamw")]
    rows = summary_rows(folders + folders)
    assert [row["label"] for row in rows] == ["sgd_sai", "adamw"]
    assert rows[0]["reference"] == "adamw" and rows[0]["difference_sd"] is None
    alone = summary_rows(folders[:1])
    assert alone[0]["reference"] is None and alone[0]["difference"] is None


def test_diverged_and_unfinished_runs_are_counted_and_in_no_mean(tmp_path):
    kept = write_run(tmp_path / "a", "sgd_sai", steps=50)
    lost = write_run(tmp_path / "b", "sgd_sai", seed=1, steps=50, diverges_at=20)
    torn = write_run(tmp_path / "c", "sgd_sai", seed=2, steps=50, stops_at=30)
    (row,) = summary_rows([kept, lost, torn])
    assert row["status"] == "1 finished, 1 diverged, 1 unfinished"
    assert (row["num_finished"], row["num_diverged"], row["num_unfinished"]) == (1, 1, 1)
    assert row["validation_loss"] == read_run(kept).result["validation_loss"]
    assert row["validation_loss_sd"] is None
    (row,) = summary_rows([lost])
    assert row["validation_loss"] is None and row["status"] == "diverged at step 20"
    (row,) = summary_rows([torn])
    assert row["validation_loss"] is None and row["status"] == "unfinished, at step 30 of 50"
    # What an unfinished run has measured so far still counts for time and memory.
    assert row["optimizer_ms"] > 1 and row["peak_memory_mb"] == 540.0
    (arm,) = read_comparison([kept, lost]).arms
    healthy, ended = curves(arm, "validation_loss")
    assert not healthy.diverged and healthy.mean[-1] == pytest.approx(arm.loss())
    assert ended.end is not None and ended.end["step"] == 20


def test_damaged_folders_still_make_a_report(tmp_path):
    names = ("torn", "middle", "null", "bare", "empty", "garbage", "diverged", "healthy")
    runs = {
        name: write_run(
            tmp_path / name, "sgd_sai", lr=0.01 * 2**i, steps=40,
            diverges_at=30 if name == "diverged" else None,
        )
        for i, name in enumerate(names)
    }  # fmt: skip
    metrics = (runs["torn"] / "metrics.jsonl").read_text()
    (runs["torn"] / "metrics.jsonl").write_text(metrics + '{"step": 41, "train_lo')
    lines = (runs["middle"] / "metrics.jsonl").read_bytes().split(b"\n")
    lines[3], lines[4], lines[5] = b'{"step"', b"\xff\xfe", b"[1]"
    (runs["middle"] / "metrics.jsonl").write_bytes(b"\n".join(lines))
    text = (runs["null"] / "metrics.jsonl").read_text()
    text = re.sub(r'"train_loss": [0-9.]+', '"train_loss": NaN', text)
    (runs["null"] / "metrics.jsonl").write_text(text.replace('"grad_norm": 0.8', '"lr": 1e999'))
    result = json.loads((runs["null"] / "result.json").read_text())
    write_json(runs["null"] / "result.json", dict.fromkeys(result) | {"status": "finished"})
    for name in ("environment.json", "metrics.jsonl", "gains.json", "result.json"):
        (runs["bare"] / name).unlink()
        (runs["empty"] / name).write_text("")
        (runs["garbage"] / name).write_text("[" * 100_000)
    paths = write_report(list(runs.values()), tmp_path / "out")
    page = paths[1].read_text()
    assert "3 lines of" in page and str(runs["middle"] / "metrics.jsonl") in page
    assert "environment.json is not valid JSON" in page
    rows = {row["label"].split("=")[1]: row for row in summary_rows(list(runs.values()))}
    assert [row["status"] for row in rows.values()] == [
        "finished", "finished", "finished", *["unfinished, at step 0 of 40"] * 3,
        "diverged at step 30", "finished",
    ]  # fmt: skip
    assert len(read_run(runs["torn"]).metrics) == 40 and read_run(runs["torn"]).notes == ()
    assert len(read_run(runs["middle"]).metrics) == 37
    assert [curve.mean for arm in read_comparison([runs["null"]]).arms
            for curve in curves(arm, "train_loss")] == []  # fmt: skip
    alone = write_report([runs["bare"]], tmp_path / "alone")
    assert [path.name for path in alone] == ["report.md", "report.html"]


def test_numbers_at_the_ends_of_a_float_still_make_a_report(tmp_path):
    folders = [
        write_run(tmp_path / name, "sgd_sai", steps=40, seed=i) for i, name in enumerate("ab")
    ]
    for folder in folders:
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for i, row in enumerate(rows):
            extreme = {0: 1e308, 1: -1e308, 2: 10**400}.get(i % 4)
            for key in ("train_loss", "validation_loss", "optimizer_ms", "peak_memory_mb"):
                row[key] = row["train_loss"] if extreme is None and key != "train_loss" else extreme
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "metrics.jsonl").write_text(text)
        blocks = json.loads((folder / "gains.json").read_text())["blocks"]
        first, second, third = list(blocks)[:3]
        blocks[first]["gain"], blocks[second]["gain"], blocks[third]["numel"] = (
            1e308,
            1e-308,
            1e-308,
        )
        write_json(folder / "gains.json", {"blocks": blocks})
        result = json.loads((folder / "result.json").read_text())
        write_json(
            folder / "result.json", {**result, "validation_loss": 1e308, "optimizer_ms": -1e308}
        )
    (row,) = summary_rows(folders)
    assert row["validation_loss"] is None
    page = write_report(folders, tmp_path / "out")[1].read_text()
    assert "numbers beyond 1e+30 in 30 lines" in page and first in page
    assert (tmp_path / "out" / "figures" / "gains_by_block.png").exists()


def test_a_line_far_above_its_start_does_not_press_the_others(tmp_path):
    folder = demo_comparison(tmp_path)
    path = tmp_path / "sgdm-0" / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows[len(rows) // 2 :]:
        row["train_loss"] *= 1000.0
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    comparison = read_comparison([folder])
    lines = [(arm, curves(arm, "train_loss")) for arm in comparison.arms]
    look = looks(comparison)
    starts = [curve.mean[0] for _, found in lines for curve in found]
    assert figures._top(lines, look) == pytest.approx(1.25 * max(starts))
    # Without it the axis ends at the highest point.
    calm = [each for each in lines if each[0].label != "sgdm"]
    highest = max(curve.mean.max() for _, found in calm for curve in found)
    assert figures._top(calm, look) == pytest.approx(highest)


def test_a_full_disk_and_a_file_in_the_way_are_named(tmp_path, monkeypatch):
    folder = write_run(tmp_path / "run", steps=5)
    (tmp_path / "file").touch()
    for out in ("file", "file/x"):
        with pytest.raises(ValueError, match="file is a file, not a folder"):
            write_report([folder], tmp_path / out)

    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(type(tmp_path), "write_text", full)
    with pytest.raises(DiskFullError, match=f"no space left for {tmp_path / 'out'}; free some"):
        write_report([folder], tmp_path / "out")


def test_wrong_folders_are_named(tmp_path):
    write_run(tmp_path / "runs" / "one", steps=5)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("{}")
    for bad in ("nowhere", "empty", "file"):
        with pytest.raises(ValueError, match=f"{bad}.*run.json.*comparison.json"):
            write_report([tmp_path / bad], tmp_path / "out")
    with pytest.raises(ValueError, match="did you mean.*one"):
        summary_rows([tmp_path / "runs"])
    with pytest.raises(ValueError, match="no folder"):
        summary_rows([])
    for content in ('{"run": ', "[]", '{"run": 3}', "\ud800".encode("utf-8", "surrogatepass")):
        raw = content if isinstance(content, bytes) else content.encode()
        (tmp_path / "empty" / "run.json").write_bytes(raw)
        with pytest.raises(ValueError, match="run.json"):
            summary_rows([tmp_path / "empty"])
    for content in ({}, {"arms": 3}, {"arms": [3]}, {"arms": [{"folder": 7}]}, {"arms": []}):
        write_json(tmp_path / "empty" / "comparison.json", content)
        with pytest.raises(ValueError, match="empty"):
            summary_rows([tmp_path / "empty"])
    assert not (tmp_path / "out").exists()


def test_arms_that_have_not_begun_are_noted(tmp_path):
    begun = write_run(tmp_path / "a", "adamw", steps=5)
    folder = write_comparison(tmp_path / "c", [("adamw", begun), ("sgdm", tmp_path / "b")])
    comparison = read_comparison([folder])
    assert [arm.label for arm in comparison.arms] == ["adamw"]
    assert any("sgdm" in note and str(tmp_path) in note for note in comparison.notes)
    folder = write_comparison(tmp_path / "d", [("sgdm", tmp_path / "b")])
    with pytest.raises(ValueError, match="no run that exists"):
        read_comparison([folder])


@pytest.mark.parametrize("key", ["sha256", "tokenizer_sha256", "validation_tokens"])
def test_different_data_are_not_compared(tmp_path, key):
    one = write_run(tmp_path / "one", steps=5, data={key: "1111"})
    two = write_run(tmp_path / "two", "sgd_sai", steps=5, data={key: "2222"})
    with pytest.raises(ValueError, match=f"one has data.{key}=1111.*two has data.{key}=2222"):
        summary_rows([one, two])


def test_data_without_a_hash_are_not_compared(tmp_path):
    folders = [
        write_run(tmp_path / n, n, steps=5, data={"sha256": None}) for n in ("adamw", "sgdm")
    ]
    with pytest.raises(ValueError, match="sha256"):
        summary_rows(folders)
    assert len(summary_rows(folders[:1])) == 1


def test_arms_are_told_apart(tmp_path):
    folders = [
        write_run(tmp_path / "a", "sgd_sai", steps=5),
        write_run(tmp_path / "b", "sgd_sai", steps=5, seed=1),
        write_run(tmp_path / "c", "sgd_sai", steps=5, arguments={"gain": "sqrt_numel"}),
        write_run(tmp_path / "d" / "a", "sgd_sai", steps=5),
        write_run(tmp_path / "long", "sgd_sai", steps=6),
    ]
    comparison = read_comparison(folders)
    labels = [arm.label for arm in comparison.arms]
    # The same seed again is a repetition and no further seed.
    assert [len(arm.runs) for arm in comparison.arms] == [2, 1, 1, 1]
    assert len(set(labels)) == 4 and "gain=sqrt_numel" in labels[1] and "steps=6" in labels[3]
    assert any("differ in more than the optimizer: steps" in note for note in comparison.notes)
    assert set(comparison.differing_fields()) == {"optimizer.arguments.gain", "steps"}
    assert "seed" not in comparison.common_fields()
    assert comparison.common_fields()["optimizer.name"] == "sgd_sai"


def test_grid_is_set_against_the_best_adamw_and_shows_its_sensitivity(tmp_path):
    folder = grid_comparison(tmp_path)
    rows = summary_rows([folder])
    finished = [row for row in rows if row["validation_loss"] is not None]
    best = min(
        (r for r in finished if r["optimizer"] == "adamw"), key=lambda r: r["validation_loss"]
    )
    assert best["is_reference"] and rows[0]["reference"] == best["label"] == "adamw lr=0.003"
    families = dict(read_comparison([folder]).families())
    assert list(families) == ["adamw", "sgdm", "sgd_sai"]
    assert [arm.lr for arm in families["sgdm"]] == [2.0, 4.0, 8.0, 16.0, 32.0]
    paths = write_report([folder], tmp_path / "out")
    page = paths[1].read_text()
    assert "learning_rate_sensitivity.svg" in {path.name for path in paths}
    assert page.count("diverged at step 60") == 2
    assert "faint lines" in page and "sgd_sai lr=0.01" in page


def test_markdown_table_keeps_its_columns():
    row = {key: None for key in (
        "reference", "validation_loss", "validation_loss_sd", "difference", "difference_sd",
        "state_mb", "state_bytes_per_param", "state_ratio", "optimizer_ms", "peak_memory_mb",
    )}  # fmt: skip
    row |= {"label": "a|b\n\\|c", "num_seeds": 1, "is_reference": False, "status": "x | y"}
    lines = markdown([row]).splitlines()
    assert len(lines) == 3 and len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1
    assert markdown_text("sgd_sai _x_ <b>") == "sgd_sai \\_x\\_ &lt;b&gt;"


def test_gains_are_drawn_by_kind_where_there_are_many():
    few = rows_of_blocks(list(gpt2_blocks(4)))
    assert len(few) == 27 and few[2] == ("h.0.ln_1.weight", ["transformer.h.0.ln_1.weight"])
    many = dict(rows_of_blocks(list(gpt2_blocks(24))))
    assert list(many)[:3] == ["wte.weight", "wpe.weight", "h.*.ln_1.weight"] and len(many) == 9
    assert many["h.*.mlp.c_fc.weight"][23] == "transformer.h.23.mlp.c_fc.weight"
    assert rows_of_blocks(["weight"]) == [("weight", ["weight"])]
    assert rows_of_blocks(["a.weight", "a.bias"])[1][0] == "bias"


def test_curves_are_means_over_seeds(tmp_path):
    folders = [write_run(tmp_path / str(seed), seed=seed, steps=40) for seed in range(2)]
    (arm,) = read_comparison(folders).arms
    (curve,) = curves(arm, "validation_loss")
    values = [[r["validation_loss"] for r in read_run(f).metrics if "validation_loss" in r]
              for f in folders]  # fmt: skip
    np.testing.assert_allclose(curve.mean, np.mean(values, axis=0))
    np.testing.assert_allclose(curve.sd, np.std(values, axis=0, ddof=1))
    assert curve.x["step"].tolist() == list(range(4, 41, 4)) and curve.x["tokens"][-1] == 40 * 1024
    noisy = np.random.default_rng(0).normal(size=50)
    expected = [noisy[max(0, i - 6) : i + 1].mean() for i in range(50)]
    np.testing.assert_allclose(trailing_mean(noisy, 7), expected)


def test_long_runs_are_thinned_and_keep_their_ends(tmp_path):
    folder = write_run(tmp_path / "long", steps=5000)
    (curve,) = curves(read_comparison([folder]).arms[0], "train_loss")
    assert len(curve.mean) <= 800 and curve.x["step"][[0, -1]].tolist() == [1, 5000]


def test_labels_fit_and_never_hide_from_the_legend():
    assert len(shown("x" * 100)) == 34 and "…" in shown("x" * 100)
    assert not shown("_adamw").startswith("_")


@pytest.mark.parametrize(
    ("size", "accuracy", "units"),
    [
        ("validation_tokens", None, ("token", "nats per token")),
        ("validation_pairs", None, ("pair", "nats per token")),
        ("validation_images", 0.9, ("image", "nats per image")),
        ("validation_images", None, ("image", "mean squared error")),
    ],
)
def test_units_are_those_of_the_data(tmp_path, size, accuracy, units):
    result = {} if accuracy is None else {"validation_accuracy": accuracy}
    data = {"validation_tokens": None, size: 100}
    folder = write_run(tmp_path / "run", steps=5, data=data, result=result)
    comparison = read_comparison([folder])
    assert (comparison.unit, comparison.loss_unit) == units
