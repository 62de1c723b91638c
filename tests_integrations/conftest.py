"""The tests of the trainers: their seed, and the table of what passed with which versions.

`test_NAME.py` tests `examples/NAME.py` and is the row NAME of the table. It lists in `PACKAGES`
the distributions whose versions matter. A test is in the column with which its name begins:
`test_trains...`, `test_resumes...`, `test_sharded...`; others are in none. A row is written when
all tests of its file ran: a part of them says nothing of the others.
"""

import datetime
import json
import os
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

COLUMNS = {"test_trains": "train", "test_resumes": "resume", "test_sharded": "sharded"}
WORST_FIRST = ("failed", "skipped", "passed")

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is downloaded: a test that asks for it fails
os.environ["OMP_NUM_THREADS"] = "1"  # in the processes that a test starts, as the fixture in this


@pytest.fixture(autouse=True)
def _one_thread_and_a_seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def pytest_addoption(parser):
    parser.addoption("--record", metavar="FILE", help="put what passed into this JSON table")


def pytest_configure(config):
    if config.getoption("record") and not hasattr(config, "workerinput"):  # xdist's have none
        config.pluginmanager.register(Record(Path(config.getoption("record"))))


def pytest_collection_modifyitems(items):
    # On the report, since with xdist the process that writes the table imports no test.
    modules = {item.getparent(pytest.Module) for item in items}
    whole = {module: len(module.collect()) for module in modules}  # also what -k leaves out
    for item in items:
        names = ("torch", *item.module.PACKAGES)
        versions = {name: version(name) for name in names}
        item.user_properties += [
            ("trainer", item.module.__name__.removeprefix("test_")),
            ("column", column_of(item.name)),
            ("versions", versions),
            ("whole", whole[item.getparent(pytest.Module)]),
        ]


def column_of(name):
    return next((COLUMNS[start] for start in COLUMNS if name.startswith(start)), None)


class Record:
    """Puts a row for each trainer that was tested whole into the table, and leaves the others."""

    def __init__(self, path):
        self.path = path
        self.held = json.loads(path.read_text()) if path.exists() else {}
        self.rows = {}
        self.left = {}  # trainer: its tests that are still to come

    def pytest_collectreport(self, report):
        """Marks a trainer as failed whose file cannot be imported."""
        trainer = Path(report.nodeid).stem.removeprefix("test_")
        if report.failed:
            held = self.held.get(trainer, {})
            failed = [column for column in COLUMNS.values() if held.get(column)] or ["train"]
            versions = held.get("versions", {"torch": version("torch")})
            self.rows[trainer] = row_of(versions) | dict.fromkeys(failed, "failed")

    def pytest_runtest_logreport(self, report):
        found = dict(report.user_properties)
        trainer, column = found["trainer"], found["column"]
        if report.when == "teardown":
            self.left[trainer] = self.left.get(trainer, found["whole"]) - 1
        if report.passed and report.when != "call":
            return
        row = self.rows.setdefault(trainer, row_of(found["versions"]))
        if column:
            row[column] = min(row[column] or "passed", report.outcome, key=WORST_FIRST.index)

    def pytest_sessionfinish(self):
        told = {}
        for trainer, row in self.rows.items():
            if not self.left.get(trainer) and any(map(row.get, COLUMNS.values())):
                told[trainer] = row
        table = dict(sorted({**self.held, **told}.items()))
        self.path.write_text(json.dumps(table, indent=2) + "\n")


def row_of(versions):
    """A row of today in which nothing was tested yet."""
    today = datetime.date.today().isoformat()
    return {"versions": versions, "date": today, **dict.fromkeys(COLUMNS.values())}
