"""The claims of arXiv 2412.11768 and what it leaves open: how each is decided, and the verdicts."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from nomadam.experiments.claim_budget import budget, spent
from nomadam.experiments.claim_evidence import Evidence
from nomadam.experiments.claim_findings import (
    CLOCKED,
    Found,
    better_there,
    by_accuracy,
    by_loss,
    constant,
    faster,
    half_the_state,
    mean,
    percent,
    robust,
    slower_early,
)
from nomadam.experiments.claim_plan import Setting
from nomadam.experiments.claim_rates import rates_of
from nomadam.experiments.claim_settings import LEFT_OUT
from nomadam.experiments.verdicts import (
    Interval,
    decide_pairs,
    equivalent,
    matches,
    matches_accuracy,
    paired,
)

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A statement, how it is put to the test here, and what the paper has to show for it.

    Args:
        name: short and unique.
        kind: a ``claim`` of the paper, or a ``question`` that it leaves open, as a hypothesis.
        statement: that is held or not.
        protocol: how it is decided.
        paper: the paper's number.
        find: what was found.
    """

    name: str
    kind: Literal["claim", "question"]
    statement: str
    protocol: str
    paper: str
    find: Callable[[Evidence], Found]


# How the studies are called, and the paper's numbers of SGD-SaI against AdamW.
STUDIES = {
    "gpt2": ("GPT-2 from scratch", "3.09 against 3.12 (GPT-2 small)"),
    "vit": ("a ViT from scratch", "72.92 ± 0.07 against 73.04 ± 0.31 % (ViT-S/16, ImageNet)"),
    "resnet18": ("ResNet-18 from scratch", "95.36 against 94.74 % (CIFAR-10)"),
    "gpt2_whole": ("GPT-2 from scratch, twice as long", "3.09 against 3.12 (GPT-2 small)"),
    "gpt2_prose": ("GPT-2 from scratch, on English", "3.09 against 3.12 (GPT-2 small)"),
    "lora": ("LoRA on GPT-2", "BLEU 69.9 against 68.9 (GPT-2 medium, E2E)"),
    "diffusion": ("LoRA on a diffusion model", "pictures only"),
}
PICTURES = ("vit", "resnet18")
# Of which the open questions are asked too.
DUELS = ("gpt2", "vit", "resnet18", "lora", "diffusion")

MATCH = "loss: the interval's upper end is at most 0.5 % of AdamW's"
BEAT = "loss: the whole interval is below 0"


def _against_adamw(setting: str) -> list[Claim]:
    study, paper = STUDIES[setting]
    if setting in PICTURES:
        rules = (by_accuracy(setting, matches_accuracy), by_accuracy(setting, decide_pairs))
        match = "top-1 (tuned by loss): at most 1 point below AdamW's by the whole interval"
        beat = "top-1 (tuned by loss): above AdamW's by the whole interval"
    else:
        rules = (by_loss(setting, matches), by_loss(setting, decide_pairs))
        match, beat = MATCH, BEAT
    return [
        Claim(
            name=f"{word}-adamw-{setting}",
            kind="claim",
            statement=f"SGD-SaI {word} AdamW on {study}",
            protocol=f"finals of {setting}; {rule}",
            paper=paper,
            find=find,
        )
        for word, rule, find in zip(("matches", "beats"), (match, beat), rules, strict=True)
    ]


def _robust(setting: str, study: str, theirs: str, label: str, paper: str) -> Claim:
    return Claim(
        name=f"robust-{setting}-{theirs}",
        kind="claim",
        statement=f"SGD-SaI is more robust to learning rate and decay than {label} on {study}",
        protocol=f"{setting}, 5 rates × 3 decays: decades of rate within 2 % of the best loss, "
        "each with its best decay, not narrower by half a step; and mean top-1 over the grid, "
        "above (a diverged cell counts 10 %). In the middle of each grid stands the rate of that "
        "optimizer's demonstration; one step of the grid is 0.60 decades",
        paper=paper,
        find=robust(setting, theirs),
    )


def _duel(
    setting: str, ours: str, theirs: str, name: str, statement: str, equal: bool = False
) -> Claim:
    study = STUDIES[setting][0]
    rule = "equal: the whole interval is within ± 0.5 % of the loss" if equal else BEAT
    return Claim(
        name=f"{name}-{setting}",
        kind="question",
        statement=f"{statement} on {study}",
        protocol=f"finals of {setting}; {rule}",
        paper="–",
        find=by_loss(setting, equivalent if equal else decide_pairs, ours, theirs),
    )


CLAIMS = (
    *(claim for setting in STUDIES for claim in _against_adamw(setting)),
    _robust(
        "vit_grid", "a ViT", "adamw", "AdamW", "57.55 ± 18.46 against 37.21 ± 35.43 % (12 cells)"
    ),
    _robust(
        "vit_grid",
        "a ViT",
        "sgdm_decoupled",
        "SGD with momentum and decoupled decay",
        "57.55 ± 18.46 against 14.33 ± 19.38 % (coupled decay, 12 cells)",
    ),
    _robust("resnet18_grid", "ResNet-18", "adamw", "AdamW", "a figure of 20 cells"),
    _robust(
        "resnet18_grid",
        "ResNet-18",
        "sgdm_decoupled",
        "SGD with momentum and decoupled decay",
        "a figure of 20 cells (coupled decay)",
    ),
    Claim(
        name="half-the-state",
        kind="claim",
        statement="SGD-SaI's state is half of AdamW's",
        protocol="bytes held at the end of gpt2, momentum and gains in float32; at most 50.5 %",
        paper="50.0 % (GPT-2 small)",
        find=half_the_state,
    ),
    *(
        Claim(
            name=f"faster-than-{theirs.lower()}",
            kind="claim",
            statement=f"SGD-SaI's step on a CPU is faster than {theirs}'s",
            protocol="clock: the tensors of ViT-S/16, steps in turn, 5 processes; SGD-SaI and "
            "AdamW in C++, our Adam-mini and the library's Prodigy in Python; ratio of medians "
            "below 1",
            paper=paper,
            find=faster(theirs),
        )
        for theirs, paper in zip(
            CLOCKED,
            ("12.4 against 45 ms (A100)", "12.4 against 84 ms (A100)", "12.4 against 78 ms (A100)"),
            strict=True,
        )
    ),
    *(
        Claim(
            name=f"gains-constant-{what}-{group}",
            kind="claim",
            statement=f"g-SNR of {group} is constant {words}",
            protocol="gains of the training's gradients along gains_gpt2, gains_vit and "
            f"gains_resnet18: {rule} is at most 10 %, on all three",
            paper="a figure (ViT-S/16)",
            find=constant(group, measure),
        )
        for what, words, measure, rule in (
            (
                "training",
                "through training",
                "largest_drift",
                "the largest distance of any block from its first gain",
            ),
            (
                "depth",
                "over depth",
                "largest_spread_over_depth",
                "at the last step, largest over smallest gain of the layers of any kind of "
                "tensor, less 1,",
            ),
        )
        for group in ("matrices", "vectors")
    ),
    Claim(
        name="better-on-long-sequences",
        kind="claim",
        statement="SGD-SaI gains on AdamW where sequences are longer",
        protocol="finals of gpt2_long (2 rows of 512 tokens) and gpt2 (16 of 64): the difference "
        "to AdamW in per cent is smaller at 512 by the whole interval",
        paper="stated, no number",
        find=better_there(("gpt2_long", "at 512 tokens"), ("gpt2", "at 64")),
    ),
    Claim(
        name="slower-early",
        kind="claim",
        statement="SGD-SaI is slower than AdamW early in training",
        protocol="gpt2 at a fifth of the steps: AdamW's validation loss is below by the whole "
        "interval, each at its best rate for the end",
        paper="stated, no number",
        find=slower_early("gpt2", 50),
    ),
    *(
        _duel(
            setting,
            "sgd_sai",
            "sgdm_decoupled",
            "gain-needed",
            "SGD-SaI beats SGD with momentum and decoupled decay, over three decades of its rate,",
        )
        for setting in DUELS
    ),
    *(
        _duel(
            setting,
            "sgd_sai",
            "sgd_sai_sqrt_numel",
            "measured-gain",
            "At the same values the measured gain and sqrt(numel) give the same loss",
            equal=True,
        )
        for setting in DUELS
    ),
    *(
        _duel(
            setting,
            "sgd_sai_refreshed",
            "sgd_sai",
            "refreshed-gain",
            "At the same values a gain that is measured again every 25 steps beats SGD-SaI",
        )
        for setting in ("gpt2", "vit", "resnet18")
    ),
    *(
        _duel(
            setting,
            "sgd_sai_rows",
            "sgd_sai",
            "following-gain",
            "Gains that follow training, a number a block and a number a row, beat SGD-SaI",
        )
        for setting in ("gpt2", "vit", "resnet18")
    ),
    _duel(
        "gpt2",
        "sgd_sai",
        "sgd_sai_shuffled",
        "gain-in-its-place",
        "SGD-SaI beats the same with its gains shuffled among blocks, anew for each seed,",
    ),
    _duel(
        "gpt2",
        "sgd_sai",
        "sgd_sai_normalized",
        "released-rule",
        "In ranges that are the same in its units, Algorithm 1's rule (divided by the largest "
        "gain) gives the loss of the released one",
        equal=True,
    ),
    *(
        _duel(
            setting,
            "muon_sgd_sai",
            "muon",
            "no-adam-beside-muon",
            "Muon with SGD-SaI for the rest beats Muon with AdamW",
        )
        for setting in ("gpt2", "vit")
    ),
    *(
        _duel(
            setting,
            "sign_embedding_sgd_sai",
            "sgd_sai",
            "sign-on-embeddings",
            "Sign momentum on embeddings, head and vectors beats SGD-SaI",
        )
        for setting in ("gpt2", "gpt2_prose", "vit")
    ),
    Claim(
        name="rare-tokens",
        kind="question",
        statement="Sign momentum on embeddings, head and vectors helps less on bytes, where the "
        "frequent tokens make up the loss",
        protocol="finals of gpt2 (4096 tokens) and gpt2_bytes (257): its difference to SGD-SaI in "
        "per cent is smaller with 4096 by the whole interval",
        paper="–",
        find=better_there(
            ("gpt2", "with 4096 tokens"),
            ("gpt2_bytes", "with 257"),
            "sign_embedding_sgd_sai",
            "sgd_sai",
        ),
    ),
)


def verdicts(evidence: Evidence) -> dict[str, Any]:
    """Everything that was found, as JSON: the claims, the arms behind them, and the budget.

    Args:
        evidence: what is kept of the trainings; what is missing leaves claims undecided.

    Returns:
        ``claims``, rows with ``name``, ``kind``, ``statement``, ``protocol``, ``paper``, ``ours``,
        ``n`` and ``verdict``; ``arms``, rows by setting; ``rates`` by setting; and ``budget``.
    """
    rows = []
    for claim in CLAIMS:
        found = claim.find(evidence)
        row = {key: getattr(claim, key) for key in ("name", "kind", "statement", "protocol")}
        row |= {"paper": claim.paper, "ours": found.ours, "n": found.n, "verdict": found.verdict}
        rows.append(row)
    tuned = [setting for setting in evidence.settings.values() if setting.optimizers]
    return {
        "format": FORMAT,
        "claims": rows,
        "arms": {setting.name: arms_of(evidence, setting) for setting in tuned},
        "rates": {
            setting.name: rates
            for setting in tuned
            if (rates := rates_of(evidence, setting)) is not None
        },
        "left_out": LEFT_OUT,
        "budget": {**budget(tuple(evidence.settings.values())), "spent": spent(evidence)},
    }


def arms_of(evidence: Evidence, setting: Setting) -> list[dict[str, Any]]:
    """What every arm of a setting was tuned to and came to, set against AdamW, best first."""
    rows = []
    reference = evidence.finals(setting.name, "adamw")
    for optimizer in setting.optimizers:
        tuned = evidence.tuned(setting.name, optimizer)
        losses = evidence.finals(setting.name, optimizer)
        against = percent(paired(losses, reference))
        state = evidence.finals(setting.name, optimizer, "state_bytes_per_param")
        row = {
            "optimizer": optimizer,
            "at_the_values_of": tuned.source,
            "values": tuned.values,
            "edges": dict(tuned.edges),
            "trials": tuned.trials,
            "trials_diverged": tuned.diverged,
            "seeds": len(losses),
            "seeds_diverged": sum(loss is None for loss in losses.values()),
            "validation_loss": mean(losses),
            "to_adamw_percent": against and _ends(against),
            "state_bytes_per_param": mean(state),
        }
        if evidence.has(setting.name, optimizer, "validation_accuracy"):
            accuracies = evidence.finals(setting.name, optimizer, "validation_accuracy")
            row["validation_accuracy"] = mean(accuracies)
        if entropies := evidence.cross_entropies(setting.name, optimizer):
            row["validation_cross_entropy"] = mean(entropies)
        rows.append(row)
    return sorted(rows, key=lambda row: row["validation_loss"] or float("inf"))


def _ends(interval: Interval) -> list[float | None]:
    ends = (interval.mean, interval.low, interval.high)
    return [end if math.isfinite(end) else None for end in ends]
