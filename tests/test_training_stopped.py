"""Trainings that are stopped, killed or damaged, and started again: always the same training."""

import errno
import io
import json
import os
import signal

import pytest
import safetensors.torch
import torch
from tiny_training import (
    TinyData,
    TinyModel,
    assert_same_training,
    go,
    raise_signal_at,
    tiny_run,
    weights,
)

from nomadam.durable_files import sha256
from nomadam.experiments import checkpoints, interruption
from nomadam.experiments.training import train
from nomadam.runs import DiskFullError, Interrupted, RunFolder, RunFolderError

OPTIMIZERS = ("sgd_sai", "sgdm", "adamw", "schedule_free_adamw", "muon", "prodigy")


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("step", [3, 8])
def test_stopped_and_started_again_it_is_the_same_training(tmp_path, optimizer, step):
    run = tiny_run(optimizer, 1e-2)
    whole = go(run, tmp_path / "whole")
    with pytest.raises(Interrupted, match=f"goes on after step {step} of 12") as caught:
        go(run, tmp_path / "parts", progress=raise_signal_at(step, "SIGINT"))
    assert caught.value.step == step and caught.value.folder == tmp_path / "parts"
    seen = []
    result = go(run, tmp_path / "parts", progress=seen.append)
    assert [record["step"] for record in seen] == list(range(step + 1, 13))
    assert_same_training(tmp_path / "whole", tmp_path / "parts", 12)
    names = ("gains.json",) if optimizer == "sgd_sai" else ()
    for name in names:
        one, other = (RunFolder(tmp_path / part).read_json(name) for part in ("whole", "parts"))
        assert one == other
    for name in ("validation_loss", "train_loss", "state_bytes", "tokens"):
        assert result[name] == whole[name]
    seconds = [record["seconds"] for record in RunFolder(tmp_path / "parts").metrics()]
    assert seconds == sorted(seconds)
    resumed = RunFolder(tmp_path / "parts").read_json("environment.json")["resumed"]
    assert [entry["step"] for entry in resumed] == [step]


def test_a_polite_kill_writes_a_checkpoint_too(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted, match="stopped by SIGTERM") as caught:
        go(tiny_run(), tmp_path, progress=raise_signal_at(2, "SIGTERM"))
    assert caught.value.signal_name == "SIGTERM"
    assert weights(tmp_path, 2)
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("run.json", "[]"),
        ("run.json", "[" * 100_000),
        ("run.json", {"data": None}),
        ("run.json", {"data": ["sha256"]}),
        ("environment.json", "[]"),
        ("environment.json", "null"),
        ("environment.json", {"resumed": 3}),
        ("result.json", "{}"),
        ("result.json", '{"status": "finished", "validation_loss": "low"}'),
    ],
)
def test_a_file_that_was_changed_by_hand_is_named(tmp_path, name, content):
    with pytest.raises(Interrupted):
        go(tiny_run(), tmp_path, progress=raise_signal_at(2, "SIGINT"))
    if isinstance(content, dict):
        content = json.dumps(RunFolder(tmp_path).read_json(name) | content)
    (tmp_path / name).write_text(content)
    with pytest.raises(RunFolderError, match=f"{tmp_path / name} (is damaged|describes no run)"):
        go(tiny_run(), tmp_path)


@pytest.mark.parametrize("generators", [{}, {"python": 3}, "text", 5])
def test_a_checkpoint_without_generators_is_named(tmp_path, generators):
    with pytest.raises(Interrupted):
        go(tiny_run(), tmp_path, progress=raise_signal_at(2, "SIGINT"))
    checkpoint = tmp_path / "checkpoints" / "step_00000002"
    state = json.loads((checkpoint / "state.json").read_text()) | {"random": [generators]}
    (checkpoint / "state.json").write_text(json.dumps(state))
    sums = json.loads((checkpoint / "checksums.json").read_text())
    sums["state.json"] = sha256(checkpoint / "state.json")
    (checkpoint / "checksums.json").write_text(json.dumps(sums))
    with pytest.raises(RunFolderError, match="step_00000002 is damaged: state.json"):
        go(tiny_run(), tmp_path)


def test_a_second_ctrl_c_ends_it_at_once(tmp_path, monkeypatch):
    go(tiny_run(), tmp_path / "whole")
    monkeypatch.setattr(interruption, "SECONDS_APART", -1.0)

    def twice(record):
        for _ in range(2 if record["step"] == 6 else 0):
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(Interrupted, match="goes on after step 4 of 12") as caught:
        go(tiny_run(), tmp_path / "parts", progress=twice)
    assert caught.value.step == 4
    go(tiny_run(), tmp_path / "parts")
    assert_same_training(tmp_path / "whole", tmp_path / "parts", 12)


def test_one_ctrl_c_that_arrives_twice_is_one(tmp_path):
    def twice(record):
        for _ in range(2 if record["step"] == 6 else 0):
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(Interrupted, match="goes on after step 6 of 12"):
        go(tiny_run(), tmp_path, progress=twice)


def test_a_stop_at_the_last_step_is_a_finish(tmp_path):
    result = go(tiny_run(), tmp_path, progress=raise_signal_at(12, "SIGINT"))
    assert result["status"] == "finished"


def test_ctrl_c_before_the_first_step(tmp_path, monkeypatch):
    def interrupted(self, cache_folder=None):
        raise KeyboardInterrupt

    monkeypatch.setattr(TinyData, "load", interrupted)
    with pytest.raises(Interrupted, match="from the beginning") as caught:
        go(tiny_run(), tmp_path)
    assert caught.value.step == 0
    monkeypatch.undo()
    assert go(tiny_run(), tmp_path)["status"] == "finished"


def stop_at(run, folder, step):
    with pytest.raises(Interrupted):
        go(run, folder, progress=raise_signal_at(step, "SIGINT"))


def test_a_damaged_checkpoint_and_torn_metrics(tmp_path):
    go(tiny_run(), tmp_path / "whole")
    stop_at(tiny_run(), tmp_path / "parts", 10)
    newest = tmp_path / "parts" / "checkpoints" / "step_00000010" / "optimizer.pt"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 16
    newest.write_bytes(content)
    with open(tmp_path / "parts" / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 11, "tok')
    seen = []
    with pytest.warns(UserWarning, match="optimizer.pt does not have its checksum"):
        train(tiny_run(), tmp_path / "parts", device="cpu", progress=seen.append)
    assert seen[0]["step"] == 9
    assert_same_training(tmp_path / "whole", tmp_path / "parts", 12)


def test_before_its_first_checkpoint_it_starts_afresh(tmp_path):
    run = tiny_run(checkpoint_every=100)
    go(run, tmp_path / "whole")

    class LostPowerError(Exception):
        pass

    def lose_power(record):
        if record["step"] == 5:
            raise LostPowerError

    with pytest.raises(LostPowerError):
        go(run, tmp_path / "parts", progress=lose_power)
    assert len(RunFolder(tmp_path / "parts").metrics()) == 5
    go(run, tmp_path / "parts")
    assert_same_training(tmp_path / "whole", tmp_path / "parts", 12)


def test_killed_between_the_last_checkpoint_and_the_result(tmp_path):
    run = tiny_run("schedule_free_adamw")
    whole = go(run, tmp_path)
    (tmp_path / "result.json").unlink()
    before = (tmp_path / "metrics.jsonl").read_bytes()
    result = go(run, tmp_path)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert {**result, "baseline_memory_mb": 0} == {**whole, "baseline_memory_mb": 0}


class FullFile(io.FileIO):
    """A file on a disk that has no more room."""

    def write(self, content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("name", ["optimizer.pt", "model.safetensors"])
def test_a_full_disk_in_a_checkpoint(tmp_path, monkeypatch, name):
    run = tiny_run()
    go(run, tmp_path / "whole")
    opened = []

    def open_full(path, mode="r"):
        opened.append(path)
        return FullFile(path, mode) if len(opened) == 2 else open(path, mode)

    def save_full(tensors, path, metadata):
        opened.append(path)
        if len(opened) == 2:
            words = "Error while serializing: I/O error: No space left on device (os error 28)"
            raise safetensors.SafetensorError(words)
        path.write_bytes(safetensors.torch.save(tensors, metadata))

    if name == "optimizer.pt":
        # torch.save writes through Python's file and raises an error of its own.
        monkeypatch.setattr(checkpoints, "open", open_full, raising=False)
    else:
        monkeypatch.setattr(safetensors.torch, "save_file", save_full)
    with pytest.raises(DiskFullError, match="the checkpoint of step 4 is intact"):
        go(run, tmp_path / "parts")
    assert opened[1].name == name
    go(run, tmp_path / "parts")
    assert_same_training(tmp_path / "whole", tmp_path / "parts", 12)


def test_data_that_have_changed_are_refused(tmp_path, monkeypatch):
    stop_at(tiny_run(), tmp_path, 5)
    load = TinyData.load
    monkeypatch.setattr(TinyData, "load", lambda self, cache=None: load(TinyData(text="other")))
    with pytest.raises(RunFolderError, match="data of .* have changed"):
        go(tiny_run(), tmp_path)
    assert go(tiny_run(), tmp_path, again=True)["status"] == "finished"


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    stop_at(tiny_run(), tmp_path / "narrow", 5)
    wide = tiny_run(model=TinyModel(width=16))
    stop_at(wide, tmp_path / "wide", 5)
    (tmp_path / "narrow" / "checkpoints").rename(tmp_path / "kept")
    (tmp_path / "wide" / "checkpoints").rename(tmp_path / "narrow" / "checkpoints")
    with pytest.raises(ValueError, match=r"another model; these differ: 0\.weight"):
        go(tiny_run(), tmp_path / "narrow")


class Evil:
    def __reduce__(self):
        return (os.system, ("echo gotcha > /tmp/gotcha",))


def test_a_checkpoint_can_not_run_code(tmp_path):
    stop_at(tiny_run(), tmp_path, 5)
    checkpoint = tmp_path / "checkpoints" / "step_00000005"
    torch.save({"state": Evil()}, checkpoint / "optimizer.pt")
    home = RunFolder(tmp_path)
    files = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    files.pop("checksums.json")

    def write(folder):
        for name, content in files.items():
            (folder / name).write_bytes(content)

    home.save_checkpoint(5, write)
    with pytest.raises(Exception, match="[Ww]eights.only"):
        go(tiny_run(), tmp_path)
