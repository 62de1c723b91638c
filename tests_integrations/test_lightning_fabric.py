"""A loop on Lightning's Fabric: the same steps as a loop of plain PyTorch."""

import subprocess
import sys

import lightning_fabric
import plain_pytorch
import pytest
import torch
from same_bits import assert_same, parameters_of

PACKAGES = ("lightning",)


def test_trains_as_plain_pytorch(tmp_path):
    model, optimizer, losses = lightning_fabric.main(20, tmp_path / "fabric.ckpt")
    expected, reference, its_losses = plain_pytorch.main(20, tmp_path / "plain.pt")
    assert losses[-1] < losses[0] / 2
    # Not to the bit: Fabric sums the norm to be clipped in the order of the groups.
    assert losses == pytest.approx(its_losses, rel=1e-5)
    assert optimizer.optimizer.gains() == pytest.approx(reference.gains(), rel=1e-5)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [1e-2, 0.0]
    torch.testing.assert_close(parameters_of(model.module), parameters_of(expected))


def test_resumes_in_a_fresh_process_with_the_same_bits(tmp_path):
    whole, half = tmp_path / "whole.ckpt", tmp_path / "half.ckpt"
    lightning_fabric.main(20, whole)
    lightning_fabric.main(10, half)
    command = [sys.executable, lightning_fabric.__file__, "--checkpoint", str(half)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "10 steps, loss " in printed
    assert_same(torch.load(half), torch.load(whole))


def test_sharded_over_the_batch_in_two_processes(tmp_path):
    one, two = tmp_path / "one.ckpt", tmp_path / "two.ckpt"
    lightning_fabric.main(20, one)
    command = [sys.executable, lightning_fabric.__file__, "--devices", "2"]
    subprocess.run([*command, "--checkpoint", str(two)], check=True, capture_output=True)
    torch.testing.assert_close(torch.load(two)["model"], torch.load(one)["model"])
