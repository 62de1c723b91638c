"""The learning rates that AdamW and SGD-SaI were tuned to, and what stands between them.

A step of AdamW moves a block of N elements by about lr * sqrt(N); one of SGD-SaI by lr * sqrt(N)
times the norm of the block's gradient. Where B blocks have an equal share of the norm G of the
whole gradient, that of each is G / sqrt(B), and equal steps need rates in the ratio sqrt(B) / G.
"""

import math
import statistics
from typing import Any

from nomadam.experiments.claim_evidence import Evidence
from nomadam.experiments.claim_plan import Setting
from nomadam.runs import RunFolder


def rates_of(evidence: Evidence, setting: Setting) -> dict[str, Any] | None:
    """The rates of a setting beside the gradients that SGD-SaI saw in its finals.

    Args:
        evidence: what is kept of the trainings.
        setting: with both optimizers among its arms.

    Returns:
        ``adamw`` and ``sgd_sai``, the tuned rates; ``ratio`` of the latter to the former;
        ``gradient_norm``, the median over the recorded steps of all finals, after clipping;
        ``blocks``; and ``expected``, sqrt(blocks) / gradient_norm. None while any is not known.
    """
    tuned = {name: evidence.tuned(setting.name, name).values for name in ("adamw", "sgd_sai")}
    norms, blocks = [], 0
    for kept in evidence.trained(setting.name, "sgd_sai"):
        longest = math.inf if kept.run.clip_norm is None else kept.run.clip_norm
        norms += [min(one["grad_norm"], longest) for one in kept.records() if one.get("grad_norm")]
        held = (RunFolder(kept.folder).read_object("gains.json") or {}).get("blocks", {})
        if not isinstance(held, dict):
            raise ValueError(
                f"{kept.folder / 'gains.json'} is damaged: its blocks are no gains by name"
            )
        blocks = len(held)
    theirs, ours = tuned["adamw"], tuned["sgd_sai"]
    if theirs is None or ours is None or not norms or not blocks:
        return None
    norm = statistics.median(norms)
    return {
        "adamw": theirs["lr"],
        "sgd_sai": ours["lr"],
        "ratio": ours["lr"] / theirs["lr"],
        "gradient_norm": norm,
        "blocks": blocks,
        "expected": math.sqrt(blocks) / norm,
    }
