"""Kept trainings of the claims, planted with the losses that a test asks for."""

import json
from dataclasses import replace

from nomadam.experiments.claim_evidence import Evidence
from nomadam.experiments.claim_plan import SECOND_SEED, jobs
from nomadam.experiments.claim_runs import is_ready, next_run
from nomadam.experiments.claim_settings import SETTINGS
from nomadam.experiments.claims import CLAIMS
from nomadam.experiments.configuration import to_json

BY_NAME = {setting.name: setting for setting in SETTINGS}
NOISE = {0: 0.0, SECOND_SEED: 0.0, 1: 0.03, 2: -0.02, 3: 0.01, 4: 0.0, 5: -0.03}


def with_arms(name, *optimizers):
    return replace(BY_NAME[name], optimizers=optimizers)


def keep(places, setting, made, result, seed=None, early=6.0):
    """A kept folder, as a training would leave it."""
    folder = places.folder(setting, made, seed)
    folder.mkdir(parents=True)
    header = {"format": 1, "run": to_json(made)}
    (folder / "run.json").write_text(json.dumps(header))
    (folder / "result.json").write_text(json.dumps({"status": "finished", **result}))
    record = {"step": 50, "validation_loss": early}
    (folder / "metrics.jsonl").write_text(json.dumps(record) + "\n")


def plant(places, setting, losses, *, near_best=0.005, early=None, state=None):
    """All trainings of some arms: the best rate is a fifth of the way up, the rest is worse."""
    for job in jobs((setting,)):
        assert is_ready(places, job)
        while (run := next_run(places, job)) is not None:
            loss = losses[job.optimizer] + NOISE[run.seed]
            low, high = setting.search(job.optimizer).bounds["optimizer.lr"]
            best = low * (high / low) ** 0.2
            tuning = run.seed in (0, SECOND_SEED)
            off = abs(run.optimizer.lr / best - 1) * near_best if tuning else 0.0
            result = {
                "validation_loss": loss + off,
                "validation_accuracy": 1 - loss / 20,
                "state_bytes": (state or {}).get(job.optimizer, 0),
                "state_bytes_per_param": 4.0,
            }
            keep(places, setting, run, result, early=(early or {}).get(job.optimizer, 6.0))


def found(places, *settings):
    known = {setting.name: setting for setting in settings}
    evidence = Evidence(places, tuple({**BY_NAME, **known}.values()))
    return {claim.name: claim.find(evidence) for claim in CLAIMS}, evidence
