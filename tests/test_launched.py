"""`nomadam run` and `nomadam compare` by torchrun and accelerate launch, as a user types them."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch.distributed as dist
from launched_runs import mortal
from processes import in_processes
from test_processes import as_launched
from tiny_training import TinyModel, assert_same_training, go, tiny_run

from nomadam.runs import RunFolder

SECONDS = 240


def launch(folder, *words, environment=None):
    """Start a launcher in the environment's interpreter, `nomadam` under it."""
    here = {"PYTHONPATH": os.path.dirname(__file__), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", *words],
        cwd=folder,
        env={**os.environ, **here, **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def still_run(optimizer):
    return tiny_run(optimizer, model=TinyModel(dropout=0.0))


def undisturbed(folder):
    as_launched(dist.get_rank(), dist.get_world_size())
    go(mortal(), folder)


def test_a_killed_process_comes_back_and_nothing_is_lost(tmp_path):
    torchrun = ("torch.distributed.run", "--max-restarts", "2", "--nproc-per-node", "3")
    command = ("-m", "nomadam", "run", "launched_runs.mortal", "--out", "disturbed")
    # Started again --again would throw away what there is; it is meant for the first start.
    launched = launch(tmp_path, *torchrun, *command, "--again", environment={"DIES_AT": "8"})
    in_processes(3, undisturbed, tmp_path / "undisturbed")
    out, err = launched.communicate(timeout=SECONDS)
    assert launched.returncode == 0, err
    assert out.count("finished: 12 steps") == 1
    # Of the last step of 12 one line, by whoever has taken it.
    assert len(re.findall(r"step 12/12", err)) == 1
    home = RunFolder(tmp_path / "disturbed")
    assert [entry["step"] for entry in home.read_json("environment.json")["resumed"]] == [6]
    assert_same_training(tmp_path / "disturbed", tmp_path / "undisturbed", 12)


def test_a_signal_to_the_launcher_loses_no_step(tmp_path):
    torchrun = ("torch.distributed.run", "--nproc-per-node", "2")
    command = ("-m", "nomadam", "run", "launched_runs.slow", "--out", "stopped")
    launched = launch(tmp_path, *torchrun, *command)
    home = RunFolder(tmp_path / "stopped")
    limit = time.monotonic() + SECONDS
    while len(home.metrics()) < 3 and launched.poll() is None and time.monotonic() < limit:
        time.sleep(0.05)
    launched.send_signal(signal.SIGTERM)
    _, err = launched.communicate(timeout=SECONDS)
    checkpoint = home.newest_checkpoint()
    assert checkpoint is not None, err
    assert checkpoint[0] == len(home.metrics()) >= 3
    assert err.count("stopped by SIGTERM; the same command goes on after step") == 1
    assert home.read_result() is None


def test_a_comparison_is_written_and_told_once(tmp_path):
    accelerate = ("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2")
    command = ("nomadam", "compare", "tiny_training.tiny_run", "--out", "all", "--device", "cpu")
    arms = ("--optimizer", "adamw", "--optimizer", "sgd_sai")
    still = ("--set", "model.dropout=0.0")
    launched = launch(tmp_path, *accelerate, "-m", *command, *arms, *still)
    alone = {"adamw": go(still_run("adamw"), tmp_path / "adamw")}
    alone["sgd_sai"] = go(still_run("sgd_sai"), tmp_path / "sgd_sai")
    out, err = launched.communicate(timeout=SECONDS)
    assert launched.returncode == 0, err
    assert out.count("report: all/report.html") == 1
    links = RunFolder(tmp_path / "all").read_json("comparison.json")["arms"]
    assert [arm["status"] for arm in links] == ["finished", "finished"]
    for arm in links:
        label = arm["label"]
        assert len(re.findall(rf"^{label}  step 12/12 ", err, re.MULTILINE)) == 1
        result = RunFolder(tmp_path / "all" / arm["folder"]).read_result()
        expected = alone[label]["validation_loss"]
        assert result["validation_loss"] == pytest.approx(expected, rel=1e-5)
