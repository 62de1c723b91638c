"""A loop of plain PyTorch, and its checkpoint."""

import subprocess
import sys

import plain_pytorch
import pytest
import torch
from same_bits import assert_same

PACKAGES = ()


def test_trains(tmp_path):
    model, optimizer, losses = plain_pytorch.main(20, tmp_path / "checkpoint.pt")
    assert losses[-1] < losses[0] / 2
    assert optimizer.gains().keys() == dict(model.named_parameters()).keys()
    assert optimizer.gains()["0.weight"] == pytest.approx(512**0.5, rel=0.05)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [1e-2, 0.0]


def test_resumes_in_a_fresh_process_with_the_same_bits(tmp_path):
    whole, half = tmp_path / "whole.pt", tmp_path / "half.pt"
    plain_pytorch.main(20, whole)
    plain_pytorch.main(10, half)
    command = [sys.executable, plain_pytorch.__file__, "--checkpoint", str(half)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert printed.startswith("10 steps, loss ")
    assert_same(torch.load(half), torch.load(whole))
