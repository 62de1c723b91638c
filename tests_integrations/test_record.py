"""The table of what passed: a row is of a whole file of tests."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGES = ()
TESTS = """
import pytest

PACKAGES = ()


def test_trains():
    pass


@pytest.mark.parametrize("done", [1, 2])
def test_resumes(done):
    pass
"""


@pytest.fixture
def recorded(tmp_path):
    """Runs tests of a trainer, in the state that they are in, and returns its row."""
    shutil.copy(Path(__file__).parent / "conftest.py", tmp_path)
    (tmp_path / "torch.py").write_text("manual_seed = set_num_threads = print")  # seconds a start
    (tmp_path / "pytest.ini").write_text("[pytest]")
    (tmp_path / "test_some.py").write_text(TESTS)

    def run(*options):
        command = [sys.executable, "-m", "pytest", "-p", "xdist", "--record", "table.json"]
        few = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
        subprocess.run([*command, *options], cwd=tmp_path, env=few, capture_output=True)
        return json.loads((tmp_path / "table.json").read_text()).get("some")

    return run


def outcomes(row):
    return [row[column] for column in ("train", "resume", "sharded")]


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_part_of_the_tests_leaves_the_row(recorded, tmp_path, workers):
    assert recorded("-n", workers, "-k", "trains") is None
    whole = recorded("-n", workers)
    assert outcomes(whole) == ["passed", "passed", None]
    (tmp_path / "test_some.py").write_text(TESTS.replace("pass\n", "assert not 'passed'\n"))
    assert recorded("-n", workers, "-k", "trains") == whole
    assert recorded("-n", workers, "test_some.py::test_resumes[1]") == whole
    assert outcomes(recorded("-n", workers)) == ["failed", "failed", None]


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_file_that_cannot_be_imported_has_failed(recorded, tmp_path, workers):
    recorded("-n", workers)
    (tmp_path / "test_some.py").write_text("import not_there")
    assert outcomes(recorded("-n", workers)) == ["failed", "failed", None]
