"""The batch script, with Slurm's commands stood for; torchrun and nomadam are the true ones."""

import json
import os
import subprocess
import sys
from pathlib import Path

PACKAGES = ("optuna",)
SCRIPT = Path(__file__).parents[1] / "examples" / "slurm.sh"
STANDING_FOR = {"srun": 'exec "$@"', "scontrol": "echo localhost"}


def sent(tmp_path, *arguments, **environment):
    """What the script prints, on one machine with two GPUs as Slurm tells."""
    for name, body in STANDING_FOR.items():
        file = tmp_path / name
        file.write_text(f"#!/bin/bash\n{body}\n")
        file.chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "NOMADAM_RUNS": str(tmp_path / "runs"),
        "NOMADAM_STUDY": "vit_classification.demo",
        "SLURM_JOB_ID": "1",
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_NNODES": "1",
        "SLURM_GPUS_ON_NODE": "2",
        **environment,
    }
    command = ["bash", str(SCRIPT), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_its_syntax():
    assert subprocess.run(["bash", "-n", str(SCRIPT)]).returncode == 0


def test_trains_on_two_processes(tmp_path):
    done = sent(tmp_path, "train", "--set", "steps=6")
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["step"] == 6
    assert json.loads((folder / "run.json").read_text())


def test_tunes_with_a_storage(tmp_path):
    storage = f"sqlite:///{tmp_path}/trials.db"
    options = "--budget", "1", "--optimizer", "sgd_sai", "--set", "steps=4", "--device", "cpu"
    done = sent(tmp_path, "tune", *options, NOMADAM_STORAGE=storage)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "trials.db").exists()


def test_says_what_it_lacks(tmp_path):
    assert "the address of a database" in sent(tmp_path, "tune").stderr
    assert "usage:" in sent(tmp_path).stderr
