"""Gains measured on the way: a training that is watched is the same training, and goes on."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from tiny_training import VOCABULARY, assert_same_training, go, tiny_run

from nomadam.diagnostics.gsnr import measure_gains
from nomadam.experiments.configuration import override
from nomadam.experiments.gain_drift import drift, rank_correlation
from nomadam.experiments.gsnr_over_training import (
    GainsOverTraining,
    blocks_of,
    diffusion_lora,
    gpt2,
    lora,
    resnet18,
    vit,
)
from nomadam.experiments.study import parts_of
from nomadam.progress import Progress
from nomadam.reports import write_report
from nomadam.reports.claim_pictures import draw_claims
from nomadam.reports.gain_curves import FILE, draw_gain_curves
from nomadam.runs import Interrupted, RunFolder


def tiny_study(**changes):
    fields = {"name": "test_gsnr_over_training.tiny", "run": tiny_run(), "measurements": 6}
    return GainsOverTraining(**{**fields, **changes})


def execute(study, folder, make_progress=Progress, **options):
    return study.execute(folder, make_progress=make_progress, device="cpu", **options)


def stopping_at(step):
    class Stopping(Progress):
        def __call__(self, record):
            if record["step"] == step:
                import signal

                signal.raise_signal(signal.SIGINT)

    return Stopping


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study") / "study"
    return folder, execute(tiny_study(), folder)


def test_steps_are_even_in_their_logarithm():
    study = tiny_study(run=tiny_run(steps=1000), measurements=4)
    assert study.measured_steps() == [1, 10, 100, 1000]
    assert tiny_study(run=tiny_run(steps=1)).measured_steps() == [1]


def test_the_training_is_what_it_is_without(measured, tmp_path):
    folder, _ = measured
    go(tiny_run(), tmp_path)
    assert_same_training(folder.with_name("study-training"), tmp_path, 12)


def test_the_first_gains_are_those_of_the_optimizer(measured):
    folder, _ = measured
    kept = RunFolder(folder.with_name("study-training")).read_json("gains.json")["blocks"]
    held = RunFolder(folder).read_json(FILE)
    assert held["steps"] == tiny_study().measured_steps()
    for name, gains in held["training_batch"].items():
        assert gains[0] == pytest.approx(kept[name]["gain"], rel=1e-6)
        assert len(gains) == len(held["steps"]) and held["blocks"][name]["numel"] > 0


def test_the_fixed_batch_is_the_same_and_not_the_trainings(measured):
    folder, _ = measured
    run, held = tiny_run(), RunFolder(folder).read_json(FILE)
    torch.manual_seed(run.seed)
    first = held["fixed_batch"]["1.weight"][0]
    assert first != held["training_batch"]["1.weight"][0]
    # A learning rate of 0: what changes from step to step is the dropout's draw alone.
    still = override(tiny_study(), {"run.optimizer.lr": 0.0, "run.model.dropout": 0.0})
    execute(still, folder.with_name("still"))
    held = RunFolder(folder.with_name("still")).read_json(FILE)
    assert {len(set(gains)) for gains in held["fixed_batch"].values()} == {1}
    assert len(set(held["training_batch"]["1.weight"])) > 1


def test_the_fixed_batches_are_the_first_held_out_ones(tmp_path):
    study = override(tiny_study(), {"run.model.dropout": 0.0, "run.steps": 1, "fixed_batches": 2})
    execute(study, tmp_path / "study")
    run = study.run
    torch.manual_seed(run.seed)
    fresh = run.model.build(vocab_size=VOCABULARY)
    batches = run.data.validation_batches(None, batch_size=run.batch_size, max_batches=2)
    found = RunFolder(tmp_path / "study").read_json(FILE)["fixed_batch"]
    for name, gain in measure_gains(fresh, run.model.loss, batches).items():
        assert found[name] == [pytest.approx(gain, rel=1e-6)]


def test_the_numbers_are_those_of_the_file(measured):
    folder, result = measured
    held = RunFolder(folder).read_json(FILE)
    series = held["fixed_batch"]
    largest = max(abs(g / gains[0] - 1) for gains in series.values() for g in gains)
    assert result["fixed_batch.all.largest_drift"] == pytest.approx(largest)
    ratios = [
        g / math.sqrt(held["blocks"][n]["numel"]) for n, gains in series.items() for g in gains
    ]
    assert result["fixed_batch.all.largest_of_sqrt_numel"] == pytest.approx(max(ratios))
    assert result["fixed_batch.all.median_of_sqrt_numel"] == pytest.approx(np.median(ratios))
    counts = [result[f"fixed_batch.{group}.num_blocks"] for group in ("all", "matrices", "vectors")]
    assert counts == [len(series), 3, 3]


def test_interrupted_it_goes_on_and_ends_the_same(measured, tmp_path):
    folder, result = measured
    with pytest.raises(Interrupted):
        execute(tiny_study(), tmp_path / "study", stopping_at(7))
    assert not (tmp_path / "study" / "result.json").exists()
    assert execute(tiny_study(), tmp_path / "study") == result
    assert (tmp_path / "study" / FILE).read_bytes() == (folder / FILE).read_bytes()
    assert_same_training(tmp_path / "study-training", folder.with_name("study-training"), 12)


def test_what_was_lost_is_measured_again(measured, tmp_path):
    _, result = measured
    execute(tiny_study(), tmp_path / "study")
    for path in ("study/result.json", "study/parts/step_00000003.json"):
        (tmp_path / path).unlink()
    assert execute(tiny_study(), tmp_path / "study") == result
    (tmp_path / "study" / "result.json").unlink()
    parts_of(RunFolder(tmp_path / "study")).write_json("step_00000001.json", {"blocks": 3})
    with pytest.raises(ValueError, match="step_00000001.json is damaged"):
        execute(tiny_study(), tmp_path / "study")
    assert execute(tiny_study(), tmp_path / "study", again=True) == result


def test_a_training_that_diverges_is_told(tmp_path):
    study = override(tiny_study(), {"run.optimizer.lr": 1e30})
    with pytest.raises(ValueError, match=r"diverged at step \d+; lower run.optimizer.lr = 1e\+30"):
        execute(study, tmp_path / "study")


def test_several_fixed_batches_and_micro_batches(tmp_path):
    study = override(tiny_study(), {"fixed_batches": 3, "run.accumulation": 2})
    assert execute(study, tmp_path / "study")["fixed_batch.all.num_blocks"] == 6


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"measurements": 1}, "measurements = 1"),
        ({"fixed_batches": 0}, "fixed_batches = 0"),
        ({"run": tiny_run(release_gradients=True, clip_norm=None)}, "run.release_gradients"),
    ],
)
def test_wrong_settings_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        tiny_study(**changes)


@pytest.mark.parametrize("make", [gpt2, vit, resnet18, lora, diffusion_lora])
def test_the_demonstrations_are_watched_with_either_optimizer(make):
    assert make().run.optimizer.name == "sgd_sai" and make("adamw").run.optimizer.name == "adamw"


def test_kinds_are_of_one_shape_and_numbers_that_count_no_layers_are_passed_over():
    shapes = {"0.w": [4], "net.0.w": [4], "net.1.w": [4], "net.2.w": [5], "net.2.b.3.w": [5]}
    blocks = blocks_of(shapes)
    assert [block["layer"] for block in blocks.values()] == [None, 0, 1, 2, 2]
    kinds = [block["kind"] for block in blocks.values()]
    assert kinds == ["0.w", "net.*.w 4", "net.*.w 4", "net.*.w 5", "net.*.b.3.w"]


def test_drift_and_rank_correlation():
    assert drift([None, 4.0, 5.0, None, 3.0]) == [0.25, 0.25] and drift([None]) == []
    assert rank_correlation([1, 2, 3], [9, 5, 1]) == -1
    assert rank_correlation([1, 1 + 1e-9], [1, 2]) is None  # a tie but for rounding
    assert rank_correlation([1], [1]) is None
    assert rank_correlation([1, 2, 2, 3], [1, 3, 2, 4]) == pytest.approx(0.9486833)


class TestFigures:
    @pytest.fixture
    def folder(self, tmp_path):
        """Two layers, a block without a layer, one that starts late, one of one element."""
        blocks = {
            "h.0.w": {"numel": 64, "kind": "h.*.w", "layer": 0},
            "h.1.w": {"numel": 64, "kind": "h.*.w", "layer": 1},
            "up.0.w": {"numel": 9, "kind": "up.*.w", "layer": 0},
            "head": {"numel": 100, "kind": "head", "layer": None},
            "gate": {"numel": 1, "kind": "gate", "layer": None},
        }
        gains = {name: [block["numel"] ** 0.5] * 3 for name, block in blocks.items()}
        gains["head"] = [None, 10.0, 30.0]
        held = {"steps": [1, 5, 25], "blocks": blocks}
        RunFolder(tmp_path).write_json(FILE, held | dict.fromkeys(
            ("fixed_batch", "training_batch"), gains))  # fmt: skip
        return tmp_path

    def test_each_batch_and_the_depth_are_drawn(self, folder, tmp_path):
        (tmp_path / "figures").mkdir()
        drawn = draw_gain_curves(folder, tmp_path / "figures", "1_")
        names = [picture.name for picture in drawn]
        assert names == [
            "1_gains_over_training_fixed_batch",
            "1_gains_over_training_training_batch",
            "1_gains_over_depth",
        ]
        assert all(picture.png.stat().st_size > 1000 for picture in drawn)
        assert "4 of 5 blocks stay within 1 %" in drawn[0].caption

    def test_the_report_shows_them(self, measured, tmp_path):
        folder, _ = measured
        paths = write_report([folder], tmp_path)
        assert "figures/gains_over_training_fixed_batch.png" in (tmp_path / "report.md").read_text()
        assert sum(path.suffix == ".svg" for path in paths) == 2  # nothing is in layers here
        assert "Gains by block" in (tmp_path / "report.html").read_text()

    def test_the_claims_pictures_have_those_of_one_seed(self, measured, tmp_path):
        for name in ("gains_tiny/one-seed1", "gains_tiny/one-seed2"):
            shutil.copytree(measured[0], tmp_path / "kept" / name)
        drawn = draw_claims(tmp_path / "kept", (1, 2), tmp_path / "out")
        places = [str(picture.png.parent.relative_to(tmp_path / "out")) for picture in drawn]
        assert places == ["gains_tiny", "gains_tiny"]

    def test_without_gains_there_is_no_figure(self, tmp_path):
        assert draw_gain_curves(tmp_path, tmp_path) == []

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("steps", None),
            ("steps", [1]),
            ("blocks", {}),
            ("blocks", {"h.0.w": {"numel": "many", "kind": "w", "layer": 0}}),
            ("fixed_batch", [1, 2]),
            ("training_batch", None),
        ],
    )
    def test_damage_is_told(self, folder, key, value):
        held = json.loads((folder / FILE).read_text()) | {key: value}
        RunFolder(folder).write_json(FILE, held)
        with pytest.raises(ValueError, match="is damaged"):
            draw_gain_curves(folder, folder)
