"""The tests of the trainers: their seed, and the table of what passed with which versions.

`test_NAME.py` tests `examples/NAME.py` and is the row NAME of the table. It lists in `PACKAGES`
the distributions whose versions matter. A test is in the column with which its name begins:
`test_trains...`, `test_resumes...`, `test_sharded...`; others are in none.
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
    for item in items:
        names = ("torch", *item.module.PACKAGES)
        versions = {name: version(name) for name in names}
        item.user_properties += [
            ("trainer", item.module.__name__.removeprefix("test_")),
            ("column", column_of(item.name)),
            ("versions", versions),
        ]


def column_of(name):
    return next((COLUMNS[start] for start in COLUMNS if name.startswith(start)), None)


class Record:
    """Puts a row for each trainer that was tested into the table, and leaves the others."""

    def __init__(self, path):
        self.path = path
        self.rows = {}

    def pytest_runtest_logreport(self, report):
        if report.passed and report.when != "call":
            return
        found = dict(report.user_properties)
        row = self.rows.setdefault(
            found["trainer"],
            {
                "versions": found["versions"],
                "date": datetime.date.today().isoformat(),
                **dict.fromkeys(COLUMNS.values()),
            },
        )
        if found["column"]:
            outcomes = (row[found["column"]] or "passed", report.outcome)
            row[found["column"]] = min(outcomes, key=WORST_FIRST.index)

    def pytest_sessionfinish(self):
        held = json.loads(self.path.read_text()) if self.path.exists() else {}
        table = dict(sorted({**held, **self.rows}.items()))
        self.path.write_text(json.dumps(table, indent=2) + "\n")
