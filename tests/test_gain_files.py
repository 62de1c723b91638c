"""Gains that are saved and loaded are the same numbers, and steer the same training."""

import json
import sys

import numpy as np
import pytest
import torch
from torch import nn

import nomadam
from nomadam import SGDSaI, load_gains, measure_gains, save_gains, scaled_param_groups

both = pytest.mark.parametrize("suffix", [".json", ".safetensors"])
# Numbers whose last bit is easily lost.
GAINS = {"0.weight": 0.1 + 0.2, "0.bias": 1e-30, "1.weight": 2.0**70 / 3, "größe": 1.0}


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2))


def loss_of(model, batch):
    return model(batch).square().mean()


@both
def test_every_bit_comes_back(tmp_path, suffix):
    path = tmp_path / f"gains{suffix}"
    save_gains({"0.weight": 1.0}, path)
    save_gains(GAINS, str(path))
    assert load_gains(str(path)) == GAINS
    assert all(type(gain) is float for gain in load_gains(path).values())
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


@both
def test_numbers_of_numpy_and_torch_are_numbers(tmp_path, suffix):
    path = tmp_path / f"gains{suffix}"
    save_gains({"a": np.float32(0.5), "b": torch.tensor(2.0), "c": np.int64(3)}, path)
    assert load_gains(path) == {"a": 0.5, "b": 2.0, "c": 3.0}


@pytest.mark.parametrize("name", ["__metadata__", "half\ud800"])
def test_names_that_a_file_can_not_hold_are_refused(tmp_path, name):
    path = tmp_path / "gains.safetensors"
    with pytest.raises(ValueError, match="can not hold these names"):
        save_gains({name: 1.0}, path)
    assert not path.exists()
    save_gains({name: 1.0}, tmp_path / "gains.json")
    assert load_gains(tmp_path / "gains.json") == {name: 1.0}


@both
def test_they_steer_the_same_training(tmp_path, suffix):
    path, batch = tmp_path / f"gains{suffix}", torch.randn(8, 6)
    measured = measure_gains(net(), loss_of, [batch])
    save_gains(measured, path)
    trained = []
    for gains in (measured, load_gains(path)):
        model = net()
        groups = scaled_param_groups(model, gains, lr=0.1)
        for optimizer in (
            SGDSaI(model.named_parameters(), lr=0.1, gain=gains),
            SGDSaI(groups, gain=1.0),
        ):
            loss_of(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
        trained.append(model.state_dict())
    assert all(torch.equal(trained[0][name], trained[1][name]) for name in trained[0])


@both
def test_a_failed_write_leaves_the_old_file(tmp_path, suffix, monkeypatch):
    path = tmp_path / f"gains{suffix}"
    save_gains(GAINS, path)

    def fail(*_):
        raise OSError("no more room")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="no more room"):
        save_gains({"0.weight": 1.0}, path)
    assert load_gains(path) == GAINS
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


def test_a_run_folders_gains_are_read(tmp_path):
    path = tmp_path / "gains.json"
    blocks = {name: {"gain": gain, "numel": 4, "shape": [4]} for name, gain in GAINS.items()}
    path.write_text(json.dumps({"blocks": blocks}))
    assert load_gains(path) == GAINS
    # A block that bears the name is a block.
    save_gains({"blocks": 2.0}, path)
    assert load_gains(path) == {"blocks": 2.0}


@pytest.mark.parametrize(
    ("gains", "name", "message"),
    [
        (GAINS, "gains.txt", "ends in .json or .safetensors"),
        (GAINS, "gains", "ends in .json or .safetensors"),
        ({}, "gains.json", "at least one"),
        ([1.0], "gains.json", "names with numbers"),
        ({0: 1.0}, "gains.json", r"not 0; build the optimizer from named_parameters\(\)"),
        ({"a": 0.0, "b": 1.0, "c": -1}, "gains.json", "finite and above 0, got a: 0.0, c: -1"),
        ({"a": float("nan")}, "gains.safetensors", "a: nan"),
        ({"a": float("inf")}, "gains.json", "a: inf"),
        ({"a": True}, "gains.json", "a: True"),
        ({"a": "1"}, "gains.json", "a: '1'"),
    ],
)
def test_what_is_no_gain_is_not_written(tmp_path, gains, name, message):
    with pytest.raises(ValueError, match=message) as caught:
        save_gains(gains, tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gains.json", b"{", "is no JSON"),
        ("gains.json", b"\xff", "is no JSON"),
        ("gains.json", b"[1.0]", "names with numbers"),
        ("gains.json", b"{}", "at least one"),
        ("gains.json", b'{"a": NaN}', "a: nan"),
        ("gains.json", b'{"a": null}', "a: None"),
        ("gains.json", b'{"blocks": {"a": {"numel": 3}}}', "a: None"),
        ("gains.safetensors", b"{}", "is no safetensors file"),
        ("gains.txt", b"", "ends in"),
    ],
)
def test_what_holds_no_gains_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        load_gains(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)


def test_a_model_in_the_place_of_gains_is_named(tmp_path):
    from safetensors.torch import save_file

    save_file(dict(net().state_dict()), tmp_path / "model.safetensors")
    with pytest.raises(
        ValueError, match=r"finite and above 0, got 0.bias: \[5\], 0.weight: \[5, 6\]"
    ):
        load_gains(tmp_path / "model.safetensors")


def test_no_file_is_an_error_of_the_system(tmp_path):
    with pytest.raises(FileNotFoundError, match="gains.json"):
        load_gains(tmp_path / "gains.json")


def test_without_the_library_json_remains(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match=r"nomadam\[lab\]"):
        save_gains(GAINS, tmp_path / "gains.safetensors")
    save_gains(GAINS, tmp_path / "gains.json")
    assert nomadam.load_gains(tmp_path / "gains.json") == GAINS
