"""Ray Train with two workers: the same steps as a loop of plain PyTorch, and its checkpoints."""

import os
from pathlib import Path
from types import SimpleNamespace

import plain_pytorch
import pytest
import ray
import ray_train
import torch
from same_bits import assert_same

PACKAGES = ("ray",)


@pytest.fixture(scope="module", autouse=True)
def cluster():
    """One for all tests; its workers import the example by name."""
    environment = {"PYTHONPATH": os.path.dirname(ray_train.__file__), "OMP_NUM_THREADS": "1"}
    ray.init(num_cpus=4, include_dashboard=False, runtime_env={"env_vars": environment})
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """20 steps without a stop."""
    return ray_train.main(20, tmp_path_factory.mktemp("whole"))


def state_of(result):
    return torch.load(Path(result.checkpoint.path, "state.pt"))


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The same training of one process on the whole batch."""
    return plain_pytorch.main(20, tmp_path_factory.mktemp("alone") / "plain.pt")


def test_trains(whole, alone):
    assert whole.metrics["loss"] < alone[2][0] / 2
    saved = state_of(whole)["optimizer"]
    gains = [float(block["gsnr"]) for block in saved["state"].values()]
    assert gains == pytest.approx(list(alone[1].gains().values()), rel=1e-5)
    assert [group["weight_decay"] for group in saved["param_groups"]] == [1e-2, 0.0]


def test_sharded_over_the_batch_trains_as_one_process(whole, alone):
    torch.testing.assert_close(state_of(whole)["model"], alone[0].state_dict())


def test_resumes_with_the_same_bits(whole, tmp_path):
    half = ray_train.main(10, tmp_path)
    assert half.metrics["step"] == 9
    assert_same(state_of(ray_train.main(20, tmp_path)), state_of(whole))


def test_the_storage_is_a_folder_or_an_address(tmp_path, monkeypatch):
    def trainer_that_says(*_, run_config, **__):
        return SimpleNamespace(fit=lambda: run_config.storage_path)

    monkeypatch.setattr(ray_train, "TorchTrainer", trainer_that_says)
    monkeypatch.chdir(tmp_path)
    assert ray_train.main(storage="s3://bucket/folder") == "s3://bucket/folder"
    assert ray_train.main(storage="here") == str(tmp_path.resolve() / "here")
