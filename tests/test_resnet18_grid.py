"""ResNet-18 and its relatives: their form, what decays, and that batch norms go on exactly."""

import pytest
import torch
from safetensors.torch import load_file
from tiny_training import assert_same_training, go, raise_signal_at, weights

from nomadam.experiments.configuration import differing_fields, from_json, override, to_json
from nomadam.experiments.convolutional import FAMILIES as MODELS
from nomadam.experiments.convolutional import ConvolutionalNet
from nomadam.experiments.image_classification import ConvolutionalModel
from nomadam.experiments.resnet18_grid import (
    FAMILIES,
    GRID,
    LEARNING_RATES,
    cifar10,
    cifar10_grid,
    demo,
    demo_grid,
    families_grid,
)
from nomadam.optimizers.baselines import build_optimizer
from nomadam.optimizers.param_groups import decay_groups
from nomadam.runs import Interrupted

pytest.importorskip("sklearn")
SMALL = {
    "steps": "6",
    "batch_size": "8",
    "evaluate_every": "3",
    "evaluation_batches": "2",
    "model.width": "2",
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_stopped_training_goes_on_exactly_with_its_running_statistics(tmp_path, family):
    run = override(demo(), {**SMALL, "model.family": family, "accumulation": "2"})
    go(run, tmp_path / "whole")
    with pytest.raises(Interrupted):
        go(run, tmp_path / "parts", progress=raise_signal_at(4, "SIGINT"))
    stopped = weights(tmp_path / "parts", 4)
    go(run, tmp_path / "parts")
    assert_same_training(tmp_path / "whole", tmp_path / "parts", 6)
    final = weights(tmp_path / "whole", 6)
    buffers = [name for name in final if "running_" in name or "num_batches" in name]
    assert buffers and all(not torch.equal(stopped[name], final[name]) for name in buffers)
    counts = {int(final[name]) for name in buffers if "num_batches" in name}
    assert counts == {12}  # of micro-batches: an evaluation does not count, nor a resume


def test_an_evaluation_takes_the_running_statistics_and_leaves_them(tmp_path):
    run = override(demo(), SMALL)
    result = go(run, tmp_path)
    dataset = run.data.load()
    module = run.model.build(**run.data.shape(dataset))
    module.load_state_dict(
        load_file(tmp_path / "checkpoints" / "step_00000006" / "model.safetensors")
    )
    module.eval()
    batches = list(run.data.validation_batches(dataset, batch_size=8, max_batches=2))
    with torch.no_grad():
        measured = [run.model.measures(module, batch) for batch in batches]
    mean = sum(each["accuracy"].item() for each in measured) / 2
    assert result["validation_accuracy"] == pytest.approx(mean)
    assert mean != 0 or result["validation_loss"] > 0


@pytest.mark.parametrize("optimizer", ["sgdm_decoupled", "muon", "schedule_free_adamw"])
def test_other_optimizers_train_it(tmp_path, optimizer):
    if optimizer == "schedule_free_adamw":
        pytest.importorskip("schedulefree")
    result = go(override(demo(optimizer), {**SMALL, "steps": "2"}), tmp_path)
    assert result["status"] == "finished"


@pytest.mark.parametrize("family", FAMILIES)
def test_norms_and_biases_do_not_decay_and_all_filters_do(family):
    net = ConvolutionalModel(family=family, width=2).build(image_size=8, channels=1, num_classes=10)
    decayed, kept = decay_groups(net, 0.1)
    assert all(p.ndim in (2, 4) for _, p in decayed["params"])
    assert all(p.ndim == 1 for _, p in kept["params"])
    filters = [m for m in net.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))]
    assert len(decayed["params"]) == len(filters)
    muon = build_optimizer("muon", net, lr=0.1, weight_decay=0.1, convolutions="flatten")
    apart = [n for g in muon.param_groups if g["method"] == "adamw" for n in g["param_names"]]
    assert "head.weight" in apart and not any("features.0.0.weight" in name for name in apart)


def test_resnet18_is_that_of_the_paper():
    with torch.device("meta"):
        net = ConvolutionalModel().build(image_size=32, channels=3, num_classes=10)
        assert sum(p.numel() for p in net.parameters()) == 11_173_962
        filters = [m for m in net.modules() if isinstance(m, torch.nn.Conv2d)]
        # 17 convolutions and 3 of the shortcuts, which with the linear layer make 18.
        assert len(filters) == 20 and sum(m.kernel_size == (1, 1) for m in filters) == 3
        assert filters[0].stride == (1, 1) and filters[0].kernel_size == (3, 3)
        assert net.features(torch.zeros(2, 3, 32, 32)).shape == (2, 512, 4, 4)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_has_the_same_frame(family):
    net = ConvolutionalNet(MODELS[family](channels=3, width=4), 32, 7)
    assert net.features(torch.zeros(2, 3, 16, 16)).shape == (2, 32, 2, 2)
    assert net(torch.zeros(2, 3, 8, 8)).shape == (2, 7)
    grouped = [m.groups for m in net.modules() if isinstance(m, torch.nn.Conv2d) and m.groups > 1]
    assert bool(grouped) == (family == "mobilenet")
    assert set(MODELS) == set(FAMILIES)


def test_a_block_adds_what_it_was_given():
    torch.manual_seed(0)
    block = MODELS["resnet18"](channels=1, width=4)[2]
    for part in block.branch.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            torch.nn.init.zeros_(part.weight)
    images = torch.rand(2, 4, 8, 8)
    assert torch.equal(block(images), images)


def test_the_rate_falls_after_80_and_160_of_200_passes():
    run = cifar10()
    passes = run.steps / 200
    for after, factor in ((80, 1.0), (160, 0.1), (200, 0.01)):
        step = round(after * passes)
        assert run.schedule.factor(step, run.steps) == pytest.approx(factor)
    assert run.schedule.factor(round(80 * passes) + 1, run.steps) == pytest.approx(0.1)
    assert run.schedule.factor(1, run.steps) == 1.0
    assert cifar10("schedule_free_adamw").schedule.name == "constant"


def test_the_papers_cells_in_the_form_of_each_optimizer():
    cells = {
        name: {(run.optimizer.lr, run.optimizer.weight_decay) for run in cifar10_grid(name)}
        for name in ("sgd_sai", "sgdm", "sgdm_decoupled")
    }
    assert all(len(each) == 20 for each in cells.values())
    assert (1e-3, 0.5) in cells["sgd_sai"] and (1.0, 5e-4) in cells["sgdm"]
    products = sorted(lr * decay for lr, decay in cells["sgd_sai"])
    assert sorted(lr * d for lr, d in cells["sgdm_decoupled"]) == pytest.approx(products)
    assert all(run.clip_norm is None for run in cifar10_grid("adamw"))


def test_the_grids_differ_in_what_they_say_and_come_back_from_json():
    for runs, allowed in (
        (demo_grid(), {"optimizer.lr", "optimizer.weight_decay", "name"}),
        (families_grid(), {"optimizer.lr", "model.family", "name"}),
    ):
        assert len({str(to_json(run)) for run in runs}) == len(runs) == 45
        for run in runs:
            assert set(differing_fields(demo(run.optimizer.name), run)) <= allowed
            assert from_json(to_json(run)) == run
    assert all(LEARNING_RATES[name] == rates[2] for name, rates in GRID.items())


def test_an_unknown_optimizer_and_settings_out_of_range():
    with pytest.raises(ValueError, match="sgd_sai"):
        demo("sgd_say")
    for field, value in (("family", "alexnet"), ("width", 0), ("label_smoothing", 1.0)):
        with pytest.raises(ValueError, match=f"model.{field} = "):
            override(demo(), {f"model.{field}": value})
    with pytest.raises(ValueError, match="side is 4: must be at least 8"):
        ConvolutionalModel().build(image_size=4, channels=1, num_classes=10)
