"""From AdamW to SGDSaI: groups, rates, decays, schedules, and what is refused."""

import copy
import logging

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR

import nomadam
from nomadam import SGDSaI


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2))


def adamw(model, **options):
    groups = nomadam.decay_groups(model, weight_decay=0.1)
    groups[1]["lr"] = 1e-3
    return torch.optim.AdamW(groups, lr=2e-3, betas=(0.85, 0.99), **options)


def test_groups_rates_and_decays():
    model = net()
    old = adamw(model)
    new = nomadam.from_adamw(old, lr=1e-2)
    assert isinstance(new, SGDSaI) and len(new.param_groups) == len(old.param_groups)
    for ours, theirs in zip(new.param_groups, old.param_groups, strict=True):
        assert [id(p) for p in ours["params"]] == [id(p) for p in theirs["params"]]
        assert ours.get("param_names") == theirs.get("param_names")
        assert ours["lr"] == pytest.approx(5 * theirs["lr"])
        product = theirs["lr"] * theirs["weight_decay"]
        assert ours["lr"] * ours["weight_decay"] == pytest.approx(product)
        assert ours["momentum"] == 0.85
    assert new.param_groups[1]["weight_decay"] == 0.0


def test_it_trains_and_the_old_one_is_left_alone():
    model = net()
    old = adamw(model)
    model(torch.ones(3, 4)).square().mean().backward()
    old.step()
    before = copy.deepcopy(old.state_dict())
    new = nomadam.from_adamw(old, lr=1e-2)
    weight = model[0].weight.detach().clone()
    new.step()
    assert not torch.equal(model[0].weight, weight) and "0.weight" in new.gains()
    after = old.state_dict()
    assert after["param_groups"] == before["param_groups"]


@pytest.mark.parametrize("steps", [0, 5])
def test_a_schedule_goes_on(steps):
    old = adamw(net())
    schedule = CosineAnnealingLR(old, T_max=20)
    for _ in range(steps):
        old.step()
        schedule.step()
    new = nomadam.from_adamw(old, lr=1e-2)
    rates = [group["lr"] for group in new.param_groups]
    assert rates == pytest.approx([5 * group["lr"] for group in old.param_groups])
    if steps:
        assert [group["initial_lr"] for group in new.param_groups] == pytest.approx([1e-2, 5e-3])
        again = CosineAnnealingLR(new, T_max=20, last_epoch=schedule.last_epoch - 1)
    else:
        again = CosineAnnealingLR(new, T_max=20)
    for _ in range(4):
        for optimizer, each in ((old, schedule), (new, again)):
            optimizer.step()
            each.step()
        for ours, theirs in zip(new.param_groups, old.param_groups, strict=True):
            assert ours["lr"] == pytest.approx(5 * theirs["lr"], rel=1e-2)


def test_a_lambda_schedule_gives_rates_in_the_same_ratio():
    old = adamw(net())
    new = nomadam.from_adamw(old, lr=1e-2)
    both = [LambdaLR(each, lambda step: 1 / (1 + step)) for each in (old, new)]
    for each, optimizer in zip(both, (old, new), strict=True):
        for _ in range(3):
            optimizer.step()
            each.step()
    for ours, theirs in zip(new.param_groups, old.param_groups, strict=True):
        assert ours["lr"] == pytest.approx(5 * theirs["lr"])


def test_a_configuration_does_too():
    model = net()
    config = {"params": model.parameters(), "lr": 2e-3, "weight_decay": 0.1, "betas": (0.8, 0.9)}
    group = nomadam.from_adamw(config, lr=4e-3).param_groups[0]
    assert (group["lr"], group["weight_decay"], group["momentum"]) == (0.004, 0.05, 0.8)
    groups = [{"params": [model[0].weight], "lr": 1e-3}, {"params": [model[2].weight]}]
    made = nomadam.from_adamw({"params": groups, "lr": 2e-3}, lr=4e-3).param_groups
    assert [group["lr"] for group in made] == pytest.approx([2e-3, 4e-3])


def test_a_tensor_for_a_rate_stays_one():
    model = net()
    old = torch.optim.AdamW(model.parameters(), lr=torch.tensor(2e-3), maximize=True)
    group = nomadam.from_adamw(old, lr=1e-2).param_groups[0]
    assert isinstance(group["lr"], torch.Tensor) and float(group["lr"]) == pytest.approx(1e-2)
    assert group["maximize"] is True


def test_it_says_what_it_changed(caplog):
    model = net()
    old = adamw(model, amsgrad=True)
    model(torch.ones(3, 4)).square().mean().backward()
    old.step()
    with caplog.at_level(logging.WARNING, logger="nomadam"):
        nomadam.from_adamw(old, lr=1e-2)
    said = caplog.text
    for words in (
        "group 0: lr 0.002 -> 0.01, weight_decay 0.1 -> 0.02",
        "group 1: lr 0.001 -> 0.005",
        "dropped: betas[1], eps, amsgrad",
        "moments stay behind",
    ):
        assert words in said


@pytest.mark.parametrize("rate", [1e-3, torch.tensor(1e-3)])
def test_a_rate_in_a_tensor_that_a_schedule_has_filled_counts_as_its_beginning(rate):
    param = nn.Parameter(torch.ones(3))
    old = torch.optim.AdamW([param], lr=copy.deepcopy(rate), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.ExponentialLR(old, 0.5)
    for _ in range(3):
        old.step(), schedule.step()
    group = nomadam.from_adamw(old, lr=1e-2).param_groups[0]
    assert float(group["lr"]) == pytest.approx(1.25e-3)
    assert group["weight_decay"] == pytest.approx(1e-2)
    assert float(group["initial_lr"]) == pytest.approx(1e-2)


def test_a_whole_number_for_a_rate_is_one():
    old = torch.optim.AdamW([nn.Parameter(torch.ones(3))], lr=1)
    LambdaLR(old, lambda step: 0.1 * (step + 1))
    assert nomadam.from_adamw(old, lr=5.0).param_groups[0]["initial_lr"] == 5.0


def test_a_group_that_is_added_later_has_the_same_settings():
    new = nomadam.from_adamw({"params": net().parameters(), "lr": 1e-3, "weight_decay": 0.5,
                              "betas": (0.5, 0.9)}, lr=1e-2)  # fmt: skip
    new.add_param_group({"params": [nn.Parameter(torch.ones(2, 2))]})
    later = new.param_groups[1]
    assert (later["lr"], later["weight_decay"], later["momentum"]) == (1e-2, 0.05, 0.5)


def test_what_others_have_put_into_a_group_is_kept_and_told(caplog):
    """timm's schedulers multiply by it."""
    groups = [
        {"params": net()[0].parameters(), "lr_scale": 0.25, "group_name": "layer_0"},
        {"params": net()[2].parameters(), "lr_scale": 1.0},
    ]
    with caplog.at_level(logging.WARNING, logger="nomadam"):
        new = nomadam.from_adamw(torch.optim.AdamW(groups, lr=1e-3), lr=1e-2)
    assert [group["lr_scale"] for group in new.param_groups] == [0.25, 1.0]
    assert new.param_groups[0]["group_name"] == "layer_0"
    assert "betas" not in new.param_groups[0]
    assert "kept as they are: lr_scale, group_name" in caplog.text


def test_a_group_of_a_configuration_may_be_one_tensor():
    model = net()
    weight = next(model.parameters())
    made = nomadam.from_adamw({"params": [{"params": weight, "lr": 1e-4}], "lr": 1e-3}, lr=1e-2)
    assert made.param_groups[0]["params"] == [weight]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"weigth_decay": 0.3}, "AdamW has no 'weigth_decay'; it has .*weight_decay"),
        ({"betas": None}, "betas must be two numbers, got None"),
        ({"betas": (1.0, 0.9)}, r"betas\[0\] must be a number in"),
        ({"weight_decay": None}, "weight_decay must be a number .* got None"),
        ({"weight_decay": -1.0}, "weight_decay must be a number .* got -1.0"),
        ({"lr": "1e-3"}, "lr must be a number .* got '1e-3'"),
    ],
)
def test_configurations_that_are_none_are_refused(config, words):
    with pytest.raises(ValueError, match=words):
        nomadam.from_adamw({"params": net().parameters(), "lr": 1e-3, **config}, lr=1e-2)


def test_a_coupled_decay_is_refused():
    model = net()
    with pytest.raises(ValueError, match="coupled.*0.1"):
        nomadam.from_adamw(torch.optim.Adam(model.parameters(), weight_decay=0.1), lr=1e-2)
    old = torch.optim.Adam(model.parameters(), lr=1e-3)
    assert nomadam.from_adamw(old, lr=1e-2).param_groups[0]["weight_decay"] == 0.0


@pytest.mark.parametrize("lr", [0.0, -1.0, float("nan"), float("inf")])
def test_a_rate_out_of_range_is_refused(lr):
    with pytest.raises(ValueError, match="lr"):
        nomadam.from_adamw(adamw(net()), lr=lr)


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        (torch.optim.SGD(net().parameters(), lr=0.1), TypeError, "must be an AdamW, got SGD"),
        (torch.optim.SparseAdam(net().parameters()), TypeError, "an AdamW, got SparseAdam"),
        ("adamw", TypeError, "must be an AdamW, got str"),
        ({"lr": 1e-3}, ValueError, "must have 'params'"),
        ({"params": [torch.zeros(2)]}, ValueError, "must have 'lr'"),
        ({"params": [torch.zeros(2)], "lr": 0.0}, ValueError, "above 0, got 0"),
    ],
)
def test_anything_else_is_refused(given, error, words):
    with pytest.raises(error, match=words):
        nomadam.from_adamw(given, lr=1e-2)
