"""What the trainings behind the claims take, as planned and by the clock."""

from typing import Any

from nomadam.experiments.claim_evidence import Evidence
from nomadam.experiments.claim_plan import CANDIDATES, MOST_SECONDS, SEEDS, Setting, total_seconds


def budget(settings: tuple[Setting, ...]) -> dict[str, Any]:
    """What is trained and what it takes: a row a setting, and the sum."""
    rows = [
        {
            "setting": setting.name,
            "study": setting.study,
            "form": setting.why,
            "later_runs": setting.later_runs,
            "arms": len(setting.optimizers),
            "trials": len(setting.ranges) * (setting.trials + CANDIDATES)
            if setting.optimizers
            else None,
            "seeds": len(SEEDS),
            "runs": setting.num_runs,
            "run_seconds": setting.run_seconds,
            "final_seconds": setting.final_seconds,
            "core_seconds": setting.seconds,
        }
        for setting in settings
    ]
    return {
        "rows": rows,
        "core_seconds": total_seconds(settings),
        "afterwards": sum(each.later_seconds for each in settings),
        "allowed": MOST_SECONDS,
    }


def spent(evidence: Evidence) -> float:
    """Seconds by the clock of all kept trainings, each on a core of its own."""
    return sum(map(evidence.seconds, evidence.settings))
