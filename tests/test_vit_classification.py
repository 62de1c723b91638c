"""The ViT's demonstration, made small: it trains, stops, goes on exactly, and says how well."""

import pytest
import torch
from tiny_training import assert_same_training, go, raise_signal_at, weights

from nomadam.experiments.configuration import differing_fields, from_json, override, to_json
from nomadam.experiments.image_classification import ViTModel
from nomadam.experiments.vit_classification import (
    COMPARED,
    GRID,
    LEARNING_RATES,
    demo,
    demo_learning_rates,
)
from nomadam.progress import Progress
from nomadam.reports import write_report
from nomadam.reports.arms import read_comparison
from nomadam.reports.reading import read_run
from nomadam.runs import Interrupted, RunFolder

pytest.importorskip("sklearn")
pytest.importorskip("transformers")
SMALL = {
    "steps": "6",
    "batch_size": "8",
    "evaluate_every": "3",
    "evaluation_batches": "2",
    "model.layers": "1",
    "model.width": "16",
    "model.dropout": "0.1",
    "data.erasing": "0.25",
}


def recomputed(run, folder):
    """Cross entropy and accuracy of the saved weights, worked out here."""
    dataset = run.data.load()
    module = run.model.build(**run.data.shape(dataset))
    module.load_state_dict(weights(folder, run.steps))
    module.eval()
    batches = list(
        run.data.validation_batches(
            dataset, batch_size=run.batch_size, max_batches=run.evaluation_batches
        )
    )
    images = torch.cat([batch.images for batch in batches])
    labels = torch.cat([batch.labels for batch in batches])
    with torch.no_grad():
        logits = module(pixel_values=images).logits
    own = logits.log_softmax(1)[torch.arange(len(labels)), labels]
    return -own.mean().item(), (logits.argmax(1) == labels).double().mean().item()


@pytest.mark.parametrize("optimizer", [*COMPARED, "schedule_free_adamw"])
def test_it_goes_on_exactly_and_logs_loss_and_accuracy(tmp_path, optimizer):
    if optimizer == "schedule_free_adamw":
        pytest.importorskip("schedulefree")
    run = override(demo(optimizer), SMALL)
    result = go(run, tmp_path / "whole")
    with pytest.raises(Interrupted):
        go(run, tmp_path / "parts", progress=raise_signal_at(4, "SIGINT"))
    go(run, tmp_path / "parts")
    assert_same_training(tmp_path / "whole", tmp_path / "parts", 6)
    loss, accuracy = recomputed(run, tmp_path / "whole")
    assert result["validation_cross_entropy"] == pytest.approx(loss, rel=1e-5)
    assert result["validation_accuracy"] == pytest.approx(accuracy)
    metrics = RunFolder(tmp_path / "whole").metrics()
    logged = [record["step"] for record in metrics if "validation_accuracy" in record]
    assert logged == [3, 6]
    assert metrics[-1]["validation_accuracy"] == result["validation_accuracy"]


def test_the_last_batch_counts_by_its_rows(tmp_path):
    run = override(demo(), {**SMALL, "evaluation_batches": "none", "batch_size": "64"})
    result = go(run, tmp_path)
    loss, accuracy = recomputed(run, tmp_path)
    assert result["validation_cross_entropy"] == pytest.approx(loss, rel=1e-5)
    assert result["validation_accuracy"] == pytest.approx(accuracy)
    assert round(result["validation_accuracy"] * 599, 6) % 1 == 0


@pytest.mark.parametrize("precision", ["bf16_autocast", "bf16"])
def test_low_precision_goes_on_exactly(tmp_path, precision):
    run = override(demo(), {**SMALL, "precision": precision})
    go(run, tmp_path / "whole")
    with pytest.raises(Interrupted):
        go(run, tmp_path / "parts", progress=raise_signal_at(4, "SIGTERM"))
    go(run, tmp_path / "parts")
    assert_same_training(tmp_path / "whole", tmp_path / "parts", 6)


def test_only_the_loss_is_in_float32_where_parameters_are_bfloat16():
    run = override(demo(), SMALL)
    dataset = run.data.load()
    module = run.model.build(**run.data.shape(dataset)).to(torch.bfloat16)
    batch = run.data.train_batch(dataset, seed=0, step=1, micro=0, batch_size=8)
    loss = run.model.loss(module, batch)
    loss.backward()
    kinds = {p.dtype for p in module.parameters()} | {p.grad.dtype for p in module.parameters()}
    assert kinds == {torch.bfloat16} and loss.dtype == torch.float32


def test_a_smoothed_loss_is_never_below_the_entropy_of_its_targets():
    plain, smooth = (
        ViTModel(layers=1, heads=2, width=8, patch_size=4, label_smoothing=value)
        for value in (0.0, 0.1)
    )
    module = plain.build(image_size=8, channels=1, num_classes=10)
    batch = next(demo().data.load().validation_batches(batch_size=32))
    log_parts = module(pixel_values=batch.images).logits.log_softmax(1)
    target = torch.nn.functional.one_hot(batch.labels, 10) * 0.9 + 0.01
    by_hand = -(target * log_parts).sum(1).mean()
    assert smooth.loss(module, batch).item() == pytest.approx(by_hand.item(), rel=1e-5)
    entropy = -(target * target.log()).sum(1).mean().item()
    assert entropy == pytest.approx(0.5003, abs=1e-4)
    found = smooth.measures(module, batch)
    assert found["loss"] == smooth.loss(module, batch) > entropy
    assert found["cross_entropy"] == plain.loss(module, batch)


def test_the_rates_are_inner_points_of_grids_of_one_size():
    runs = demo_learning_rates()
    assert len(runs) == 18 and len({len(rates) for rates in GRID.values()}) == 1
    for optimizer, rates in GRID.items():
        assert LEARNING_RATES[optimizer] in rates[1:-1]
        assert all(b / a == pytest.approx(2) for a, b in zip(rates, rates[1:], strict=False))
        assert demo(optimizer).optimizer.lr == LEARNING_RATES[optimizer]
    for run in runs:
        differing = differing_fields(demo(run.optimizer.name), run)
        assert set(differing) <= {"name", "optimizer.lr"}
        assert from_json(to_json(run)) == run


def test_an_unknown_optimizer_and_settings_out_of_range():
    with pytest.raises(ValueError, match="sgd_sai"):
        demo("sgd_say")
    for field, value in (
        ("patch_size", 0),
        ("heads", 5),
        ("dropout", 1.0),
        ("label_smoothing", -0.1),
        ("initializer_range", 0.0),
    ):
        with pytest.raises(ValueError, match="model.(width|" + field + ") = "):
            override(demo(), {f"model.{field}": value})
    with pytest.raises(ValueError, match="model.patch_size = 3: must be a divisor of"):
        ViTModel(layers=1, heads=1, width=8, patch_size=3).build(
            image_size=8, channels=1, num_classes=10
        )


def test_progress_and_report_count_images(tmp_path, capsys):
    run = override(demo(), SMALL)
    with Progress("adamw", run.steps) as progress:
        go(run, tmp_path / "run", progress=progress)
    printed = capsys.readouterr().err
    assert " images/s  " in printed and "tokens" not in printed
    comparison = read_comparison([tmp_path / "run"])
    assert comparison.unit == "image"
    assert read_run(tmp_path / "run").data["validation_images"] == 599
    paths = write_report([tmp_path / "run"], tmp_path / "report")
    text = paths[0].read_text()
    assert "| accuracy, % |" in text and "learning_curves_images.png" in text
    assert "against tokens" not in text
