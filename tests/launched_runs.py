"""Runs for processes that a launcher starts: one loses a process, one waits to be stopped."""

import dataclasses
import os
import signal
import time

from tiny_training import TinyModel, tiny_run

from nomadam.experiments import processes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mortal(TinyModel):
    """Where DIES_AT says so, the second process is killed in that step, once."""

    def loss(self, module, batch):
        loss = super().loss(module, batch)
        if module.training and os.environ.get("DIES_AT") and processes.index() == 1:
            step = int(os.environ["DIES_AT"])
            os.environ["DIES_AT"] = str(step - 1) if step > 1 else ""
            if step == 1 and processes.restarts() == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return loss


def mortal():
    return tiny_run(name="launched_runs.mortal", model=Mortal(), batch_size=6, checkpoint_every=3)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slow(TinyModel):
    def loss(self, module, batch):
        time.sleep(0.05)
        return super().loss(module, batch)


def slow():
    return tiny_run(
        name="launched_runs.slow", model=Slow(dropout=0.0), steps=1000, checkpoint_every=1000
    )
