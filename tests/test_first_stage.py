"""Trainings that start from another one's weights: made first, found again, waited for."""

import dataclasses
import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from tiny_training import Gone, assert_same_training, go, raise_signal_at, weights
from two_stages import SecondModel, tiny_stage, two_stages

from nomadam.durable_files import sha256
from nomadam.experiments import first_stage
from nomadam.experiments.configuration import override, short_hash
from nomadam.experiments.estimate import estimate
from nomadam.experiments.first_stage import final_weights, first_stage_of
from nomadam.experiments.training import train
from nomadam.progress import Progress
from nomadam.runs import Interrupted, RunFolder, RunFolderError


def stage_folder(beside):
    return beside.parent / f"two_stages.tiny_stage-{short_hash(tiny_stage())}"


def test_a_missing_first_stage_is_trained_beside_and_its_weights_are_taken(tmp_path):
    result = go(two_stages(), tmp_path / "second")
    stage = stage_folder(tmp_path / "second")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["second", stage.name])
    go(tiny_stage(), tmp_path / "by itself")
    assert_same_training(stage, tmp_path / "by itself", 8)
    # Nothing but the weights tells it from a training of the same model that has no first stage.
    fresh = go(two_stages(), tmp_path / "fresh", first_stage=False)
    assert result["validation_loss"] < fresh["validation_loss"] - 0.02
    unmoved = override(two_stages(steps=1), {"optimizer.lr": "0"})
    frozen = go(unmoved, tmp_path / "frozen")
    for name, tensor in final_weights(stage).items():
        assert torch.equal(weights(tmp_path / "frozen", 1)[name], tensor)
    stage_result = RunFolder(stage).read_result()
    assert frozen["first_stage_validation_loss"] == stage_result["validation_loss"]
    assert result["steps"] == 6 and stage_result["steps"] == 8


def test_run_json_names_the_first_stage(tmp_path):
    go(two_stages(), tmp_path / "second")
    stage = stage_folder(tmp_path / "second")
    told = RunFolder(tmp_path / "second").read_header()["first_stage"]
    assert told == {
        "name": "two_stages.tiny_stage",
        "hash": short_hash(tiny_stage()),
        "validation_loss": RunFolder(stage).read_result()["validation_loss"],
        "weights_sha256": sha256(stage / "checkpoints" / "step_00000008" / "model.safetensors"),
    }
    assert "first_stage" not in RunFolder(stage).read_header()


class Unbuildable(SecondModel):
    def build(self, *, vocab_size, pretrained=None):
        raise ValueError("model.targets = 'foo': must be an end of a layer's name")


def test_what_the_second_stage_would_fail_by_is_found_before_the_first(tmp_path):
    other = dataclasses.replace(two_stages(), data=Gone())
    with pytest.raises(ValueError, match="'/nowhere': no such folder"):
        go(other, tmp_path / "data")
    with pytest.raises(ValueError, match="model.targets = 'foo'"):
        go(dataclasses.replace(two_stages(), model=Unbuildable()), tmp_path / "model")
    assert not stage_folder(tmp_path / "data").exists()


def test_a_finished_first_stage_is_used_again(tmp_path):
    go(two_stages(), tmp_path / "one")
    stage = stage_folder(tmp_path / "one")
    before = {path: path.stat().st_mtime_ns for path in stage.rglob("*") if path.is_file()}
    seen = []
    go(two_stages(seed=1), tmp_path / "two", progress=seen.append)
    assert [record["step"] for record in seen] == [1, 2, 3, 4, 5, 6]
    go(two_stages(), tmp_path / "one", again=True)
    after = {path: path.stat().st_mtime_ns for path in stage.rglob("*") if path.is_file()}
    assert after == before


def test_the_first_stage_is_a_part_of_what_the_run_is(tmp_path):
    other = override(two_stages(), {"model.stage.steps": "4"})
    assert first_stage_of(other).steps == 4 and short_hash(other) != short_hash(two_stages())
    go(two_stages(), tmp_path / "one")
    go(other, tmp_path / "two")
    assert len(list(tmp_path.glob("two_stages.tiny_stage-*"))) == 2


@pytest.mark.parametrize("second", [2, 5])
def test_interrupted_in_either_stage_it_ends_the_same(tmp_path, second):
    go(two_stages(), tmp_path / "whole" / "second")
    parts = tmp_path / "parts" / "second"
    with pytest.raises(Interrupted, match="goes on after step 3 of 8") as caught:
        go(two_stages(), parts, progress=raise_signal_at(3, "SIGINT"))
    assert caught.value.folder == stage_folder(parts)
    seen = []

    def stop_in_the_second(record):
        seen.append(record["step"])
        if len(seen) > 5:  # the first stage's rest is 4 to 8
            raise_signal_at(second, "SIGINT")(record)

    with pytest.raises(Interrupted, match=f"goes on after step {second} of 6"):
        go(two_stages(), parts, progress=stop_in_the_second)
    assert seen == [4, 5, 6, 7, 8, *range(1, second + 1)]
    go(two_stages(), parts)
    assert_same_training(tmp_path / "whole" / "second", parts, 6)
    assert_same_training(stage_folder(tmp_path / "whole" / "second"), stage_folder(parts), 8)


def finished_stage(tmp_path):
    folder = stage_folder(tmp_path / "second")
    go(tiny_stage(), folder)
    return folder


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("result.json", "{", "result.json is damaged"),
        ("result.json", '{"status": "diverged", "diverged_at_step": 3}', "diverged at step 3"),
        ("run.json", "[]", "is damaged"),
        ("checkpoints/step_00000008/model.safetensors", "damaged", "does not have its checksum"),
        ("checkpoints/step_00000008/checksums.json", None, "it is incomplete"),
        ("checkpoints", None, "it is not there"),
        ("metrics.jsonl", "", "metrics.jsonl ends at step 0"),
    ],
)
def test_a_damaged_first_stage_is_named_before_anything_is_written(
    tmp_path, file, content, message
):
    stage = finished_stage(tmp_path)
    if content is None:
        (stage / file).rename(tmp_path / "away")
    else:
        (stage / file).write_text(content)
    with pytest.raises(RunFolderError, match=message) as caught:
        go(two_stages(), tmp_path / "second")
    assert stage.name in str(caught.value)
    assert not (tmp_path / "second" / "run.json").exists()


def test_another_run_in_the_place_of_the_first_stage_is_refused(tmp_path):
    go(tiny_stage(seed=3), stage_folder(tmp_path / "second"))
    with pytest.raises(RunFolderError, match="holds another run"):
        go(two_stages(), tmp_path / "second")


def test_an_unfinished_second_stage_keeps_its_first(tmp_path):
    finished_stage(tmp_path)
    with pytest.raises(Interrupted, match="of 6"):
        go(two_stages(), tmp_path / "second", progress=raise_signal_at(2, "SIGINT"))
    header = json.loads((tmp_path / "second" / "run.json").read_text())
    header["first_stage"]["weights_sha256"] = "0" * 64
    (tmp_path / "second" / "run.json").write_text(json.dumps(header))
    with pytest.raises(RunFolderError, match="first stage of .* is another one"):
        go(two_stages(), tmp_path / "second")


def with_own_tokenizer(data, cache_folder=None):
    sha256 = hashlib.sha256(data.text.encode()).hexdigest()
    return SimpleNamespace(description={"sha256": sha256, "tokenizer_sha256": sha256})


def test_another_tokenizer_than_the_first_stage_had_is_refused(tmp_path):
    stage = finished_stage(tmp_path)
    header = json.loads((stage / "run.json").read_text())
    header["data"]["tokenizer_sha256"] = "1" * 64
    (stage / "run.json").write_text(json.dumps(header))
    go(two_stages(), tmp_path / "second")  # its own data have no tokenizer
    run = two_stages(seed=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(run.data), "load", with_own_tokenizer)
        with pytest.raises(RunFolderError, match="tokenizer .* is not that of the first stage"):
            go(run, tmp_path / "third")
        # Where it is not there yet, it is not trained in vain.
        with pytest.raises(ValueError, match="of the data of the first stage, two_stages.tiny_st"):
            go(run, tmp_path / "elsewhere" / "third")
    assert not stage_folder(tmp_path / "elsewhere" / "third").exists()


def test_a_first_stage_in_training_elsewhere_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(first_stage, "POLL_SECONDS", 0.01)
    stage = RunFolder(stage_folder(tmp_path / "second"))
    taken, release = threading.Event(), threading.Event()

    def hold():
        with stage.locked():
            taken.set()
            release.wait(60)

    holder = threading.Thread(target=hold)
    holder.start()
    taken.wait(60)
    threading.Timer(0.2, release.set).start()
    with pytest.warns(UserWarning, match="waiting for .*, the first stage") as told:
        result = train(two_stages(), tmp_path / "second", device="cpu")
    holder.join()
    assert len(told) == 1 and result["status"] == "finished"


def test_ctrl_c_while_waiting_loses_nothing(tmp_path, monkeypatch):
    def interrupted(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", interrupted)
    with RunFolder(stage_folder(tmp_path / "second")).locked():
        with pytest.warns(UserWarning), pytest.raises(Interrupted, match="from the beginning"):
            train(two_stages(), tmp_path / "second", device="cpu")


def launch(code, *environments):
    shared = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.path.dirname(__file__)}
    processes = [
        subprocess.Popen([sys.executable, "-c", code], env={**os.environ, **shared, **each})
        for each in environments
    ]
    assert [process.wait() for process in processes] == [0] * len(processes)


def test_two_processes_at_once_share_one_first_stage(tmp_path):
    code = (
        "import os; from two_stages import two_stages; "
        "from nomadam.experiments.training import train; "
        "seed = int(os.environ['SEED']); "
        f"train(two_stages(seed=seed), {str(tmp_path)!r} + f'/{{seed}}', device='cpu')"
    )
    launch(code, {"SEED": "1"}, {"SEED": "2"})
    one, two = (RunFolder(tmp_path / seed).read_header()["first_stage"] for seed in ("1", "2"))
    assert one == two
    stage = RunFolder(stage_folder(tmp_path / "1"))
    assert len(stage.metrics()) == 8 and "resumed" not in stage.read_json("environment.json")


def test_two_processes_together_train_both_stages(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = (
        "from two_stages import two_stages; from nomadam.experiments.training import train; "
        f"train(two_stages(), {str(tmp_path / 'two')!r}, device='cpu')"
    )
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    launch(code, *({**shared, "RANK": rank, "LOCAL_RANK": rank} for rank in ("0", "1")))
    result = RunFolder(tmp_path / "two").read_result()
    alone = go(two_stages(), tmp_path / "alone" / "one")
    for name in ("validation_loss", "first_stage_validation_loss"):
        # Dropout draws otherwise in each process.
        assert result[name] == pytest.approx(alone[name], rel=2e-2)


def test_an_estimate_needs_no_first_stage(tmp_path):
    seen = []
    cost = estimate(two_stages(), device="cpu", progress=seen.append)
    assert len(seen) == 4 and cost["steps"] == 6


def test_the_first_stage_has_a_line_of_its_own(tmp_path, capsys):
    with Progress("second", 6) as progress:
        go(two_stages(), tmp_path / "second", progress=progress)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("two_stages.tiny_stage  step 1/8")
    assert lines[-1].startswith("second  step 6/6")
