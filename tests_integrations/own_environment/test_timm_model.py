"""SGDSaI by its name in timm; torchvision is stood for."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torchvision_stub
from same_bits import assert_same, parameters_of
from torch import nn

torchvision_stub.put_in_place()

import timm_model  # noqa: E402
from timm.optim import create_optimizer, create_optimizer_v2, list_optimizers  # noqa: E402

from nomadam import SGDSaI  # noqa: E402
from nomadam.integrations import register_timm  # noqa: E402

PACKAGES = ("timm",)


def test_trains_with_layer_wise_rates(tmp_path):
    model, optimizer, losses = timm_model.main(20, tmp_path / "checkpoint.pt")
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    assert type(optimizer) is SGDSaI
    assert len(optimizer.gains()) == len(parameters_of(model))
    scales = {group["lr_scale"] for group in optimizer.param_groups}
    assert scales == {0.75**3, 0.75**2, 0.75, 1.0}
    decayed = {id(p) for g in optimizer.param_groups if g["weight_decay"] for p in g["params"]}
    assert decayed == {id(param) for param in model.parameters() if param.ndim in (2, 4)}


def test_trains_as_without_timm(tmp_path):
    """Once the scheduler has put the scales into the rates."""
    model, optimizer, losses = timm_model.main(1, tmp_path / "checkpoint.pt")
    expected = timm_model.main(0, tmp_path / "start.pt")[0]
    reference = SGDSaI(expected.named_parameters())
    pictures, classes = timm_model.batch_of(0)
    nn.functional.cross_entropy(expected(pictures), classes).backward()
    reference.step()
    named = reference.gains()
    blocks = [param for group in optimizer.param_groups for param in group["params"]]
    order = {id(param): index for index, param in enumerate(blocks)}
    for name, param in model.named_parameters():
        assert optimizer.gains()[order[id(param)]] == pytest.approx(named[name], rel=1e-4), name


@pytest.mark.parametrize("options", [{}, {"momentum_dtype": "int8"}, {"foreach": True}])
def test_resumes_with_the_same_bits(tmp_path, options):
    whole, half = tmp_path / "whole.pt", tmp_path / "half.pt"
    timm_model.main(20, whole, **options)
    timm_model.main(10, half, **options)
    assert len(timm_model.main(20, half, **options)[-1]) == 10
    assert_same(torch.load(half), torch.load(whole))


def test_the_options_of_timm_arrive():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    optimizer = create_optimizer_v2(model, "sgdsai", momentum=0.5, eps=1e-8, weight_decay=0.1)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.1]
    assert {(g["lr"], g["momentum"], g["eps"]) for g in optimizer.param_groups} == {
        (1e-2, 0.5, 1e-8)
    }
    arguments = SimpleNamespace(
        opt="sgdsai", lr=0.1, weight_decay=0.0, momentum=0.8, opt_args={"direction": "sign"}
    )
    group = create_optimizer(arguments, model).param_groups[0]
    assert (group["lr"], group["momentum"], group["direction"]) == (0.1, 0.8, "sign")
    with pytest.raises(TypeError, match="betas2"):
        create_optimizer_v2(model, "sgdsai", betas2=1.0)


def test_lookahead_goes_around_it():
    model = nn.Linear(2, 3)
    optimizer = create_optimizer_v2(model, "lookahead_sgdsai", lr=0.1)
    for _ in range(12):
        model(torch.eye(2)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert len(optimizer._base_optimizer.gains()) == 2
    assert optimizer.param_groups[0]["lookahead_step"] == 12


def test_registering_twice_changes_nothing(caplog):
    register_timm()
    register_timm()
    assert list_optimizers().count("sgdsai") == 1
    assert not caplog.records


def test_nomadam_imports_without_timm():
    code = "import sys; sys.modules['timm'] = None; import nomadam.integrations as found\n"
    code += "try: found.register_timm()\nexcept ImportError as error: print(error)"
    command = [sys.executable, "-c", code]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "pip install 'timm>=1.0.12'" in printed


@pytest.mark.parametrize("strided", [False, True])
def test_steps_by_closures_on_groups_and_strided_parameters(strided):
    """As timm's own test of every optimizer on its list does."""
    torch.manual_seed(0)
    matrix, vector = torch.randn(10, 5, 2), torch.randn(10, 2)
    parts = (matrix[..., 0], vector[..., 0]) if strided else (matrix.mean(-1), vector.mean(-1))
    weight, bias = (nn.Parameter(part) for part in parts)
    groups = [{"params": [weight]}, {"params": [bias], "lr": 1e-2}]
    optimizer = create_optimizer_v2(groups, "sgdsai", lr=1e-3)

    def closure():
        optimizer.zero_grad()
        loss = (weight.mv(torch.arange(5.0) / 5) + bias).square().sum()
        loss.backward()
        return loss

    first = optimizer.step(closure)
    for _ in range(100):
        last = optimizer.step(closure)
    assert last < first / 2
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 1e-2]
