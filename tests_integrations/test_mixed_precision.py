"""Automatic mixed precision: overflow, and the scale that is kept."""

import mixed_precision
import pytest
import torch
from same_bits import assert_same, parameters_of

PACKAGES = ()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_trains(dtype, tmp_path):
    model, optimizer, _, losses = mixed_precision.main(30, tmp_path / "half.pt", dtype=dtype)
    assert losses[-1] < losses[0] / 4
    assert optimizer.gains().keys() == dict(model.named_parameters()).keys()
    assert optimizer.gains()["0.weight"] == pytest.approx(512**0.5, rel=0.05)


def test_gains_are_those_of_the_first_step_that_is_taken(tmp_path):
    # At this scale all gradients of the first steps overflow, at the other none does.
    before, *_ = mixed_precision.main(0, tmp_path / "before.pt")
    model, optimizer, scaler, _ = mixed_precision.main(1, tmp_path / "check.pt", scale=2.0**40)
    assert scaler.get_scale() == 2.0**39
    assert optimizer.gains() == {}
    assert_same(parameters_of(model), parameters_of(before))
    model, optimizer, scaler, _ = mixed_precision.main(30, tmp_path / "check.pt", scale=2.0**40)
    assert scaler.get_scale() < 2.0**17
    _, calm, _, _ = mixed_precision.main(1, tmp_path / "calm.pt", scale=2.0**8)
    # Of another batch, and in another rounding.
    assert optimizer.gains() == pytest.approx(calm.gains(), rel=0.05)


def test_asked_for_fewer_steps_the_checkpoint_stays(tmp_path):
    mixed_precision.main(2, tmp_path / "check.pt")
    saved = torch.load(tmp_path / "check.pt")
    assert mixed_precision.main(1, tmp_path / "check.pt")[-1] == []
    assert_same(torch.load(tmp_path / "check.pt"), saved)


@pytest.mark.parametrize("scale", [2.0**16, 2.0**26])
def test_resumes_with_the_same_bits(scale, tmp_path):
    """Also from the middle of the steps that overflow."""
    mixed_precision.main(20, tmp_path / "whole.pt", scale)
    mixed_precision.main(5, tmp_path / "half.pt", scale)
    mixed_precision.main(20, tmp_path / "half.pt", scale=1.0)  # the saved scale goes on
    assert_same(torch.load(tmp_path / "half.pt"), torch.load(tmp_path / "whole.pt"))
