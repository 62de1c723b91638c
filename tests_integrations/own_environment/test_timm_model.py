"""SGDSaI by its name in timm; torchvision is stood for."""

import copy
import math
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


def rate_of(name, step):
    """Half a cosine to 0 at step 100, smaller by a quarter for each layer further down."""
    begins = {"blocks.0.": 2, "blocks.1.": 1, "norm.": 1, "head.": 0}  # the norm is of the last
    above = next((begins[begin] for begin in begins if name.startswith(begin)), 3)
    return 2e-2 * 0.75**above * (1 + math.cos(math.pi * step / 100)) / 2


def test_trains_as_without_timm(tmp_path):
    """Decay and layer-wise rates put in by hand."""
    model = timm_model.main(10, tmp_path / "checkpoint.pt")[0]
    expected = timm_model.main(0, tmp_path / "start.pt")[0]
    groups = [
        {"params": [(name, param)], "weight_decay": 1e-2 if param.ndim in (2, 4) else 0.0}
        for name, param in expected.named_parameters()
    ]
    reference = SGDSaI(groups)
    for step in range(10):
        for group in reference.param_groups:
            group["lr"] = rate_of(group["param_names"][0], step)
        pictures, classes = timm_model.batch_of(step)
        nn.functional.cross_entropy(expected(pictures), classes).backward()
        nn.utils.clip_grad_norm_(expected.parameters(), 1.0)
        reference.step()
        reference.zero_grad()
    for name, param in expected.named_parameters():
        found = model.get_parameter(name)
        torch.testing.assert_close(found, param, rtol=1e-3, atol=1e-5)


def test_a_checkpoint_of_a_later_step_stays(tmp_path):
    timm_model.main(3, tmp_path / "checkpoint.pt")
    before = (tmp_path / "checkpoint.pt").read_bytes()
    timm_model.main(2, tmp_path / "checkpoint.pt")
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


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


def error_of_register_timm(before):
    """What it says in a process of its own, where this has been run before."""
    code = f"import sys, types; {before}; import nomadam.integrations as found\n"
    code += "try: found.register_timm()\nexcept ImportError as error: print(error)"
    command = [sys.executable, "-c", code]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_nomadam_imports_without_timm():
    assert "pip install 'timm>=1.0.12'" in error_of_register_timm("sys.modules['timm'] = None")


def test_an_older_timm_is_refused():
    factory = "sys.modules['timm.optim._optim_factory'] = types.ModuleType('of before the list')"
    said = error_of_register_timm(f"sys.modules['timm.optim'] = sys.modules['timm'] = {factory}")
    assert "no list_optimizers" in said
    assert "pip install 'timm>=1.0.12'" in said


def test_what_timm_itself_lacks_is_named():
    said = error_of_register_timm("sys.modules['torchvision'] = None")
    assert "torchvision" in said
    assert "pip install 'timm" not in said


def line_of(values, name, strided):
    """A matrix and a vector with rates of their own, and a step by a closure."""
    params = [
        nn.Parameter(torch.stack([value, value], -1)[..., 0] if strided else value.clone())
        for value in values
    ]
    groups = [{"params": params[:1]}, {"params": params[1:], "lr": 2e-2}]
    optimizer = create_optimizer_v2(groups, name, lr=1e-2)
    points = torch.linspace(-1, 1, 192).view(32, 6).sin()

    def closure():
        optimizer.zero_grad()
        loss = (points @ params[0] + params[1] - points[:, :4].square()).square().mean()
        loss.backward()
        return loss

    return params, optimizer, lambda: optimizer.step(closure).item()


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("name", ["sgdsai", "lookahead_sgdsai"])
def test_resumes_in_a_twin_by_the_state_dict(name, strided):
    """With Lookahead its slow weights go along, which it keeps in SGDSaI's state."""
    params, optimizer, step = line_of([torch.randn(6, 4), torch.randn(4)], name, strided)
    losses = [step() for _ in range(20)]
    assert losses[-1] < losses[0] / 2
    values = [param.detach() for param in params]
    twins, other, step_of_twin = line_of(values, name, strided)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert_same(other.state_dict(), optimizer.state_dict())
    assert [step_of_twin() for _ in range(20)] == [step() for _ in range(20)]
    assert_same(twins, params)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-2, 2e-2]
