"""Studies of tiny trainings that are tuned, with the trainings in the test's own process."""

import dataclasses

from test_comparison import in_this_process
from tiny_training import Fragile, Gone, tiny_run, to_be_killed

from nomadam.experiments import tuning
from nomadam.experiments.configuration import Run, override
from nomadam.experiments.tuning import tune
from nomadam.experiments.tuning_plan import plan_tuning
from nomadam.tune_command import NoProgress

HERE = "tiny_tunings"
LR, DECAY = "optimizer.lr", "optimizer.weight_decay"


def study(optimizer: str = "sgd_sai") -> Run:
    return tiny_run(optimizer, name=f"{HERE}.study", steps=4, evaluate_every=2)


def fragile(optimizer: str = "sgdm") -> Run:
    return tiny_run(optimizer, name=f"{HERE}.fragile", model=Fragile(), steps=6)


def without_data() -> Run:
    return tiny_run(name=f"{HERE}.without_data", data=Gone())


def long() -> Run:
    return dataclasses.replace(to_be_killed(), name=f"{HERE}.long", steps=40)


def grid() -> list[Run]:
    cells = [
        (name, lr, decay)
        for name in ("adamw", "sgdm")
        for lr in (1e-3, 1e-2, 1e-1)
        for decay in (0, 0.1)
    ]
    made = [tiny_run(name, lr, name=f"{HERE}.grid", steps=2) for name, lr, _ in cells]
    return [override(run, {DECAY: decay}) for run, (_, _, decay) in zip(made, cells, strict=True)]


def uneven_grid() -> list[Run]:
    return grid()[1:]


class TuneHere:
    """Tunes into a folder without any child process, which is much faster.

    ``trained`` has the labels of all trials that were trained, in their order.
    """

    def __init__(self, monkeypatch, folder):
        self.folder, self.trained = folder, []
        monkeypatch.setattr(tuning, "run_in_child", self._in_this_process)

    def _in_this_process(self, function, *arguments):
        if function is tuning.train_beside:
            self.trained.append(arguments[0].label)
        return in_this_process(function, *arguments)

    def __call__(self, name=f"{HERE}.study", *, storage=None, workers=1, **plan):
        """The summary, and the lines that were told."""
        lines = []
        found = tune(
            plan_tuning(name, **{"out": self.folder, **plan}),
            storage=storage,
            workers=workers,
            options={"device": "cpu", "cache": None},
            make_progress=NoProgress,
            tell=lines.append,
        )
        return found, lines
