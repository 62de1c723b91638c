"""Kills of a real ``nomadam run``, at random instants, and what becomes of its training."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_training import assert_same_training, to_be_killed

from nomadam.runs import RunFolder

KILLS = 10
NAME = "tiny_training.to_be_killed"
STEPS = to_be_killed().steps
PATIENCE = 120.0


def command(folder, *more):
    # One thread, as in the training that it is compared with.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)}
    return subprocess.Popen(
        [sys.executable, "-m", "nomadam", "run", NAME, "--device", "cpu", "--out", folder, *more],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process):
    output, _ = process.communicate(timeout=PATIENCE)
    return process.returncode, output


def metrics_file(folder):
    """Size and time of the metrics, which change when a training begins and with each step."""
    try:
        status = (folder / "metrics.jsonl").stat()
    except FileNotFoundError:
        return None
    return status.st_size, status.st_mtime_ns


def is_in_checkpoint(folder):
    return any(folder.glob("checkpoints/.step_*.partial"))


def wait_until(process, holds):
    """Look as often as possible until it holds, or the process has ended."""
    deadline = time.monotonic() + PATIENCE
    while process.poll() is None and not holds():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(1e-4)


def at_random(process, folder, before, draw):
    """Some steps after the training has begun or gone on."""
    wait_until(process, lambda: metrics_file(folder) != before)
    time.sleep(draw.uniform(0, 0.1))


def in_checkpoint(process, folder, before, draw):
    wait_until(process, lambda: is_in_checkpoint(folder))


def kill(process):
    """Kill -9, unless it has ended by itself; whether it was killed."""
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return process.returncode == -signal.SIGKILL


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of the training that nobody kills."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    code, output = finish(command(folder))
    assert code == 0, output
    return folder


def test_killed_at_random_instants_it_ends_as_if_it_had_not_been(whole, tmp_path):
    draw = random.Random(20261122)
    kills = torn = attempt = 0
    while kills < KILLS:
        attempt += 1
        folder = tmp_path / str(attempt)
        while kills < KILLS and not (folder / "result.json").exists():
            before = metrics_file(folder)
            process = command(folder)
            (at_random, in_checkpoint)[kills % 2](process, folder, before, draw)
            kills += kill(process)
            torn += is_in_checkpoint(folder)
        code, output = finish(command(folder))
        assert code == 0, output
        steps = [record["step"] for record in RunFolder(folder).metrics()]
        assert steps == list(range(1, STEPS + 1))
        assert (folder / "metrics.jsonl").read_bytes().count(b"\n") == STEPS
        assert_same_training(whole, folder, STEPS)
        results = [RunFolder(each).read_json("result.json") for each in (whole, folder)]
        for name in ("status", "validation_loss", "train_loss", "state_bytes", "tokens"):
            assert results[0][name] == results[1][name]
        assert not is_in_checkpoint(folder)
    assert torn >= 2, "hardly a kill met a checkpoint being written"


def test_finished_it_prints_its_result_and_changes_nothing(whole):
    before = {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    code, output = finish(command(whole, "--json"))
    assert code == 0, output
    assert json.loads(output)["validation_loss"] == pytest.approx(
        RunFolder(whole).read_json("result.json")["validation_loss"]
    )
    assert before == {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}


def test_ctrl_c_says_how_to_go_on(whole, tmp_path):
    folder = tmp_path / "run"
    process = command(folder)
    wait_until(process, lambda: len(RunFolder(folder).metrics()) >= 7)
    process.send_signal(signal.SIGINT)
    code, output = finish(process)
    assert code == 130, output
    assert "same command" in output and "Traceback" not in output
    kept = RunFolder(folder).newest_checkpoint()
    assert kept is not None and kept[0] == len(RunFolder(folder).metrics()) >= 7
    code, output = finish(command(folder))
    assert code == 0, output
    assert_same_training(whole, folder, STEPS)
