"""A loop of accelerate, in one process, in two with DDP, and as it prepares for FSDP2."""

import os
import subprocess
import sys
from pathlib import Path

import accelerate_loop
import accelerate_on_two
import pytest
import torch
from safetensors.torch import load_file
from same_bits import assert_same, parameters_of

import nomadam

PACKAGES = ("accelerate",)


def on_two(way, folder):
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
    command = [*launch, "--num_processes", "2", "--main_process_port", "0"]
    examples = str(Path(accelerate_loop.__file__).parent)
    subprocess.run(
        [*command, accelerate_on_two.__file__, way, str(folder)],
        env={**os.environ, "PYTHONPATH": examples},
        check=True,
        capture_output=True,
    )


def read(folder):
    optimizer = torch.load(folder / "optimizer.bin")
    return {"model": load_file(folder / "model.safetensors"), "optimizer": optimizer}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return accelerate_loop.main(20, tmp_path_factory.mktemp("alone") / "whole")


def test_trains(tmp_path, alone):
    _, model, optimizer, loss = alone
    assert loss < accelerate_loop.main(1, tmp_path / "first")[-1] / 2
    assert optimizer.optimizer.gains().keys() == parameters_of(model).keys()
    assert [group["weight_decay"] for group in optimizer.param_groups] == [1e-2, 0.0]


def test_accumulates_into_one_step(alone):
    """Gains and parameters are those of a plain loop, whose batches are twice as large."""
    model = accelerate_loop.model_of()
    optimizer = nomadam.SGDSaI(nomadam.decay_groups(model, weight_decay=1e-2), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=100)
    x, y = (tensor[: 20 * 64].split(64) for tensor in accelerate_loop.dataset_of().tensors)
    for inputs, targets in zip(x, y, strict=True):
        torch.nn.functional.mse_loss(model(inputs), targets).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    assert alone[2].optimizer.gains() == pytest.approx(optimizer.gains(), rel=1e-5)
    for name, param in parameters_of(model).items():
        torch.testing.assert_close(alone[1].get_parameter(name), param, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("done", [0, 10])
def test_resumes_with_the_same_bits(done, alone, tmp_path):
    """Also from a checkpoint of before the first step."""
    accelerate_loop.main(done, tmp_path / "half")
    _, model, optimizer, _ = accelerate_loop.main(20, tmp_path / "half")
    assert_same(parameters_of(model), parameters_of(alone[1]))
    assert_same(optimizer.state_dict(), alone[2].state_dict())


def test_trains_for_more_than_an_epoch_and_resumes_in_it(tmp_path):
    """Of 64 steps; also in a folder that is there, but has no checkpoint."""
    (tmp_path / "half").mkdir()
    for steps in (63, 64, 66):
        _, model, optimizer, _ = accelerate_loop.main(steps, tmp_path / "half")
    _, whole, undivided, _ = accelerate_loop.main(66, tmp_path / "whole")
    assert torch.load(tmp_path / "whole" / "custom_checkpoint_0.pkl")["last_epoch"] == 66
    assert_same(parameters_of(model), parameters_of(whole))
    assert_same(optimizer.state_dict(), undivided.state_dict())


def test_asked_for_fewer_steps_the_checkpoint_stays(tmp_path):
    accelerate_loop.main(4, tmp_path)
    saved = read(tmp_path)
    *_, loss = accelerate_loop.main(2, tmp_path)
    assert loss is None
    assert_same(read(tmp_path), saved)


def test_sharded_by_ddp_trains_as_one_process_and_resumes(alone, tmp_path):
    on_two("ddp", tmp_path)
    found = read(tmp_path / "whole")
    for name, param in parameters_of(alone[1]).items():
        torch.testing.assert_close(found["model"][name], param, rtol=1e-4, atol=1e-5)
    assert_same(read(tmp_path / "half"), found)


def test_sharded_by_fsdp2_trains_as_one_process(alone, tmp_path):
    """Accelerate puts other parameters into the groups, after the optimizer was made."""
    on_two("fsdp2", tmp_path)
    found = torch.load(tmp_path / "fsdp2.pt")
    assert set(found["kinds"].values()) == {"DTensor"}
    assert found["gains"] == pytest.approx(alone[2].optimizer.gains(), rel=1e-5)
    for name, param in parameters_of(alone[1]).items():
        torch.testing.assert_close(found["params"][name], param, rtol=1e-4, atol=1e-5)
