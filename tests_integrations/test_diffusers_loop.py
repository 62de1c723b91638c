"""A training loop of diffusers; the gates and the output of the DiT begin at zero."""

import diffusers_loop
import pytest
import torch
from same_bits import assert_same, parameters_of

PACKAGES = ("diffusers",)
MODELS = [diffusers_loop.unet, diffusers_loop.dit]


@pytest.mark.parametrize("make", MODELS)
def test_trains(make, tmp_path):
    model, optimizer, losses = diffusers_loop.main(30, make, tmp_path / "checkpoint.pt")
    assert sum(losses[-5:]) < sum(losses[:5]) / 2
    assert optimizer.gains().keys() == parameters_of(model).keys()
    assert [group["weight_decay"] for group in optimizer.param_groups] == [1e-2, 0.0]


def test_what_lies_behind_zeros_gets_its_gain_when_it_starts_to_learn(tmp_path):
    """First the output, then the gates and what is not behind them, then the rest."""
    waves = []
    for steps in (1, 2, 3):
        model, optimizer, _ = diffusers_loop.main(steps, checkpoint=tmp_path / "checkpoint.pt")
        waves.append(optimizer.gains())
    names = parameters_of(model).keys()
    assert waves[0].keys() == {"proj_out_2.weight", "proj_out_2.bias"}
    behind = (".attn1.", ".ff.", "blocks.1.norm1.emb.")  # the first embedding feeds the output too
    waiting = {name for name in names if any(part in name for part in behind)}
    assert waves[1].keys() == names - waiting
    assert waves[2].keys() == names
    for earlier, later in zip(waves, waves[1:], strict=False):
        assert {name: later[name] for name in earlier} == earlier


def test_asked_for_fewer_steps_the_checkpoint_stays(tmp_path):
    diffusers_loop.main(2, checkpoint=tmp_path / "check.pt")
    saved = torch.load(tmp_path / "check.pt")
    assert diffusers_loop.main(1, checkpoint=tmp_path / "check.pt")[-1] == []
    assert_same(torch.load(tmp_path / "check.pt"), saved)


@pytest.mark.parametrize("done", [1, 15])
@pytest.mark.parametrize("make", MODELS)
def test_resumes_with_the_same_bits(make, done, tmp_path):
    """Also while most gains are still to be measured."""
    diffusers_loop.main(20, make, tmp_path / "whole.pt")
    diffusers_loop.main(done, make, tmp_path / "half.pt")
    diffusers_loop.main(20, make, tmp_path / "half.pt")
    assert_same(torch.load(tmp_path / "half.pt"), torch.load(tmp_path / "whole.pt"))
