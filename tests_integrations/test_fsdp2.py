"""FSDP2 under torchrun, and its checkpoint."""

import re
import shutil
import subprocess
import sys

import fsdp2
import pytest
import torch
from same_bits import assert_same, parameters_of
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import nomadam

PACKAGES = ()


def run_on_two(steps, folder):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, "--nproc-per-node", "2", fsdp2.__file__]
    options = ["--steps", str(steps), "--folder", str(folder)]
    return subprocess.run([*command, *options], check=True, capture_output=True, text=True).stdout


def read(folder):
    """All that a distributed checkpoint holds, in one process."""
    dcp_to_torch_save(folder, folder / "whole.pt")
    return torch.load(folder / "whole.pt")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Checkpoints of two processes after 10 and, without a break, 20 steps, and what they said."""
    folder = tmp_path_factory.mktemp("fsdp2")
    printed = run_on_two(10, folder / "half") + run_on_two(20, folder / "whole")
    (folder / "printed").write_text(printed)
    return folder


def trained_alone():
    model = fsdp2.model_of()
    optimizer = nomadam.SGDSaI(model.named_parameters(), lr=1e-2)
    for step in range(20):
        x, y = fsdp2.batch_of(step)
        torch.nn.functional.mse_loss(model(x), y).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def test_trains(trained):
    printed = (trained / "printed").read_text()
    losses = {step: float(loss) for step, loss in re.findall(r"step (\d+), loss (.+)", printed)}
    assert losses.keys() == {"10", "20"}
    assert losses["20"] < losses["10"] / 2


def test_sharded_trains_as_one_process(trained):
    model, optimizer = trained_alone()
    found = read(trained / "whole")
    for name, param in parameters_of(model).items():
        torch.testing.assert_close(found["model"][name], param, rtol=1e-4, atol=1e-5)
        gain = float(found["optimizer"]["state"][name]["gsnr"])
        assert gain == pytest.approx(optimizer.gains()[name], rel=1e-4)


def test_resumes_with_the_same_bits(trained, tmp_path):
    shutil.copytree(trained / "half", tmp_path / "half")
    run_on_two(20, tmp_path / "half")
    assert_same(read(tmp_path / "half"), read(trained / "whole"))


@pytest.fixture
def one_process(monkeypatch):
    """The environment that torchrun sets."""
    one = {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "localhost", "MASTER_PORT": 0}
    for name, value in one.items():
        monkeypatch.setenv(name, str(value))


def test_asked_for_fewer_steps_the_checkpoint_stays(one_process, tmp_path, capsys):
    fsdp2.main(2, tmp_path / "checkpoint")
    saved = read(tmp_path / "checkpoint")
    capsys.readouterr()
    fsdp2.main(1, tmp_path / "checkpoint")
    assert capsys.readouterr().out == "nothing left to do\n"
    assert_same(read(tmp_path / "checkpoint"), saved)


def test_resumes_on_one_process(one_process, trained, tmp_path):
    shutil.copytree(trained / "half", tmp_path / "half")
    fsdp2.main(20, tmp_path / "half")
    found, expected = read(tmp_path / "half"), read(trained / "whole")
    assert found["step"] == 20
    for name, param in expected["model"].items():
        torch.testing.assert_close(found["model"][name], param, rtol=1e-4, atol=1e-5)
