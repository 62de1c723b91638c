"""Paired differences: Student's t, the interval by hand, what is left out, and how it is shown."""

import json
import math
import re
import statistics

import numpy as np
import pytest
from report_folders import write_comparison, write_run

from nomadam import reports
from nomadam.intervals import student_t
from nomadam.reports import write_report
from nomadam.reports.arms import read_comparison
from nomadam.reports.paired import PairedDifference, paired_cells, paired_differences
from nomadam.reports.paired_figures import draw_paired
from nomadam.reports.reading import read_run

REFERENCE, OTHER = "sgd_sai precision=fp32", "sgd_sai precision=bf16"


def compared(root, *, seeds=(0, 1, 2, 3, 4), without=(), lost=(), stopped=()):
    """A reference and another arm; `without`, `lost`, `stopped` are pairs of arm and seed."""
    members = []
    for label in (REFERENCE, OTHER):
        precision = label.rpartition("=")[2]
        for seed in seeds:
            if (precision, seed) not in without:
                path = write_run(
                    root / f"{precision}-{seed}",
                    "sgd_sai",
                    seed=seed,
                    steps=40,
                    final=5.0 if precision == "fp32" else 5.01,
                    diverges_at=20 if (precision, seed) in lost else None,
                    stops_at=30 if (precision, seed) in stopped else None,
                    changes={"precision": precision},
                )
                members.append((label, path))
    return write_comparison(root / "comparison", members, "a.study", REFERENCE)


@pytest.fixture
def only_paired(monkeypatch):
    """Draw no figure but the one of paired differences."""

    def draw(comparison, folder):
        folder.mkdir(parents=True)
        return [each for each in [draw_paired(comparison, folder)] if each is not None]

    monkeypatch.setattr(reports, "draw_all", draw)


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 5, 8, 9, 29, 30, 100, 999, 1000])
def test_students_t_against_its_integral(degrees):
    for level in (0.5, 0.9, 0.95, 0.99):
        bound = student_t(level, degrees)
        t, width = np.linspace(0, bound, 20_001, retstep=True)
        density = (1 + t * t / degrees) ** (-(degrees + 1) / 2)
        factor = math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2))
        area = width * (density.sum() - (density[0] + density[-1]) / 2)
        assert 2 * area * factor / math.sqrt(degrees * math.pi) == pytest.approx(level, abs=1e-6)


def test_students_t_has_the_values_of_the_tables():
    known = {1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764, 5: 2.5706, 9: 2.2622, 30: 2.0423}
    for degrees, value in known.items():
        assert student_t(0.95, degrees) == pytest.approx(value, abs=5e-5)
    assert student_t(0.95, 10**6) == pytest.approx(1.959966, abs=1e-5)
    scipy_stats = pytest.importorskip("scipy.stats")
    for degrees in range(1, 60):
        assert student_t(0.99, degrees) == pytest.approx(scipy_stats.t.ppf(0.995, degrees), 1e-8)


@pytest.mark.parametrize(("level", "degrees"), [(0, 4), (1, 4), (float("nan"), 4), (0.95, 0)])
def test_students_t_refuses_what_it_can_not_answer(level, degrees):
    with pytest.raises(ValueError, match="must be above 0 and below 1, and at least 1"):
        student_t(level, degrees)


def test_mean_and_interval_by_hand(tmp_path):
    folder = compared(tmp_path)
    losses = {
        key: [read_run(tmp_path / f"{key}-{seed}").result["validation_loss"] for seed in range(5)]
        for key in ("fp32", "bf16")
    }
    differences = [a - b for a, b in zip(losses["bf16"], losses["fp32"], strict=True)]
    mean, half = statistics.fmean(differences), 2.776445 * statistics.stdev(differences) / 5**0.5
    (pair,) = paired_differences(read_comparison([folder]))
    assert pair.label == OTHER and pair.left_out == {}
    assert pair.mean == pytest.approx(mean)
    assert pair.interval == pytest.approx((mean - half, mean + half), rel=1e-6)
    assert pair.percent(1.0) == pytest.approx(100 / statistics.fmean(losses["fp32"]))


def test_seeds_that_one_of_the_two_lacks_are_left_out_and_named(tmp_path, only_paired):
    folder = compared(
        tmp_path,
        seeds=(0, 1, 2, 3, 4, 5),
        without=[("bf16", 1), ("fp32", 5)],
        lost=[("bf16", 2), ("fp32", 4), ("bf16", 4)],
        stopped=[("fp32", 3)],
    )
    (pair,) = paired_differences(read_comparison([folder]))
    assert list(pair.differences) == [0]
    assert pair.left_out == {
        1: "not run",
        2: "diverged",
        3: "the reference unfinished",
        4: "diverged; the reference diverged",
        5: "the reference not run",
    }
    assert pair.interval is None and pair.within_bar is None
    reference = read_run(tmp_path / "fp32-0").result["validation_loss"]
    assert pair.reference_loss == reference
    (cells,) = paired_cells([pair])[1]
    assert cells[1] == "1" and cells[3] == "none: 1 pair" and cells[6] == "–"
    for path in write_report([folder], tmp_path / "report")[:2]:
        text = path.read_text()
        assert "none: 1 pair" in text and "seed 4: diverged; the reference diverged" in text


def test_steps_to_the_final_loss_of_the_reference(tmp_path, only_paired):
    def rewritten(name, losses):
        path = tmp_path / name / "metrics.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for row in rows:
            row.pop("validation_loss", None)
            row |= {"validation_loss": losses[row["step"]]} if row["step"] in losses else {}
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    folder = compared(tmp_path, seeds=(0, 1, 2, 3), stopped=[("bf16", 3)])
    final = [read_run(tmp_path / f"fp32-{seed}").result["validation_loss"] for seed in range(3)]
    rewritten("bf16-0", {10: final[0] + 0.1, 20: final[0], 30: final[0] + 1, 40: final[0] - 1})
    rewritten("bf16-1", {10: None, 40: final[1] - 0.1})
    rewritten("bf16-2", {20: final[2] + 0.1, 40: final[2] + 0.1})
    (pair,) = paired_differences(read_comparison([folder]))
    assert pair.steps == {0: 20, 1: 40, 2: None}
    (cells,) = paired_cells([pair])[1]
    assert cells[7] == "30 (2 of 3)"
    for seed in range(3):
        rewritten(f"bf16-{seed}", {40: final[seed] + 0.1})
    (pair,) = paired_differences(read_comparison([folder]))
    assert paired_cells([pair])[1][0][7] == "never (0 of 3)"
    for seed in range(3):
        rewritten(f"bf16-{seed}", {10 * seed + 10: final[seed]})
    (pair,) = paired_differences(read_comparison([folder]))
    assert paired_cells([pair])[1][0][7] == "20"
    assert "steps to its loss" in write_report([folder], tmp_path / "report")[0].read_text()


def test_an_arm_of_which_nothing_finished_has_no_mean(tmp_path, only_paired):
    folder = compared(tmp_path, seeds=(0, 1), lost=[("bf16", 0), ("bf16", 1)])
    (pair,) = paired_differences(read_comparison([folder]))
    assert pair.mean is None and pair.interval is None and pair.percent(1.0) is None
    paths = write_report([folder], tmp_path / "report")
    assert "none: 0 pairs" in paths[0].read_text()
    assert not [path for path in paths if path.stem == "paired_differences"]


def test_one_seed_an_arm_has_no_table(tmp_path, only_paired):
    folder = compared(tmp_path, seeds=(3,))
    assert paired_differences(read_comparison([folder])) == []
    assert "Paired" not in write_report([folder], tmp_path / "report")[0].read_text()


def test_runs_without_a_reference_have_no_table(tmp_path):
    compared(tmp_path, seeds=(0, 1))
    runs = sorted(tmp_path.glob("*-[01]"))
    assert paired_differences(read_comparison(runs)) == []


def test_the_same_on_other_data_is_refused(tmp_path):
    runs = [
        write_run(tmp_path / str(count), seed=count, steps=5, data={"validation_images": count})
        for count in (599, 600)
    ]
    with pytest.raises(ValueError, match="data.validation_images=599"):
        read_comparison(runs)


@pytest.mark.parametrize(
    ("differences", "within"),
    [
        ([0.001, 0.0, -0.001], True),
        ([0.02, 0.021, 0.022], False),
        ([-0.02, -0.021, -0.022], False),
        ([0.009, 0.01, 0.011], None),
        ([0.3, -0.3, 0.0], None),
        ([0.0], None),
        ([], None),
    ],
)
def test_the_bar_is_met_by_the_whole_interval(differences, within):
    pair = PairedDifference(
        label="a", differences=dict(enumerate(differences)), reference_loss=2.0, left_out={}
    )
    assert pair.within_bar is within


def test_the_report_shows_table_and_figure(tmp_path):
    paths = write_report([compared(tmp_path)], tmp_path / "report")
    text, page = paths[0].read_text(), paths[1].read_text()
    row = next(line for line in text.splitlines() if re.match(r"\| .*bf16 \| 5 \| [+−]\d", line))
    assert len(row.strip("|").split("|")) == 9 and " to " in row
    assert text.index("## Results") < text.index("## Paired") < text.index("## Learning curves")
    assert '<h2 id="paired">' in page and "figures/paired_differences.svg" in page
    assert {path.suffix for path in paths if path.stem == "paired_differences"} == {".png", ".svg"}
