"""What is found of a claim: a number of ours with its interval, and the verdict.

Differences are paired by seed, ours less theirs, with 95 % intervals; the rule is that of
`nomadam.experiments.verdicts`.
"""

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from nomadam.experiments.claim_evidence import Cells, Evidence
from nomadam.experiments.verdicts import (
    Finals,
    Interval,
    Pairs,
    Verdict,
    all_of,
    decades_near_best,
    decide,
    decide_pairs,
    paired,
)

OURS, REFERENCE = "sgd_sai", "adamw"

# Of a step: what the optimizers are called at the clock.
CLOCKED = {
    "AdamW": "torch_adamw_fused",
    "Adam-mini": "adam_mini",
    "Prodigy": "prodigy",
}
OUR_STEP = "sgd_sai_fused"

# A gain is constant where none is further than this from its first value; so between layers.
CONSTANT = 0.1

# "Half": of AdamW's state, with the gain of each block.
HALF = 0.505

CHANCE = 0.1

# Widths are multiples of a step of the grid, a factor of 4: half of one.
WIDTH_MARGIN = math.log10(4.0) / 2


@dataclass(frozen=True, kw_only=True)
class Found:
    """What was found of a claim.

    Args:
        ours: our number with its interval, in words.
        n: pairs of seeds, or measurements.
        verdict: by the rule.
    """

    ours: str
    n: int
    verdict: Verdict


def percent(pairs: Pairs) -> Interval | None:
    """The differences in per cent of the reference."""
    return pairs.interval and pairs.interval.scaled(100 / abs(pairs.reference))


def told(interval: Interval | None, unit: str, digits: int = 2) -> str:
    """An interval in words.

    Example:
        >>> told(Interval(values=(1.0, 1.1, 1.2, 1.0, 0.9)), "%")
        '+1.04 % (+0.90 to +1.18)'
    """
    if interval is None:
        return "nothing yet"
    if not math.isfinite(interval.high):
        return f"{interval.mean:+.{digits}f} {unit}"
    return (
        f"{interval.mean:+.{digits}f} {unit} "
        f"({interval.low:+.{digits}f} to {interval.high:+.{digits}f})"
    )


def mean(finals: Finals) -> float | None:
    """Of the seeds that did not diverge."""
    known = [value for value in finals.values() if value is not None]
    return statistics.fmean(known) if known else None


def _between(ours: Finals, theirs: Finals, digits: int = 3) -> str:
    pair = [mean(ours), mean(theirs)]
    words = ["–" if value is None else f"{value:.{digits}f}" for value in pair]
    failed = sum(value is None for value in ours.values())
    return f"{words[0]} against {words[1]}" + (f", {failed} diverged" if failed else "")


def by_loss(
    setting: str,
    rule: Callable[[Pairs], Verdict],
    ours: str = OURS,
    theirs: str = REFERENCE,
) -> Callable[[Evidence], Found]:
    """Two arms of a setting set against each other by their final validation losses."""

    def find(evidence: Evidence) -> Found:
        one, other = (evidence.finals(setting, each) for each in (ours, theirs))
        pairs = paired(one, other)
        text = f"loss {_between(one, other)}: {told(percent(pairs), '%')}"
        text += _without_smoothing(evidence, setting, ours, theirs)
        return Found(ours=text, n=len(pairs.differences), verdict=rule(pairs))

    return find


def _without_smoothing(evidence: Evidence, setting: str, ours: str, theirs: str) -> str:
    """The difference in words where the loss is smoothed; smoothed ones have a floor above 0."""
    one, other = (evidence.cross_entropies(setting, each) for each in (ours, theirs))
    interval = percent(paired(one, other))
    return "" if interval is None else f"; cross entropy alone {told(interval, '%', 1)}"


def by_accuracy(setting: str, rule: Callable[[Pairs], Verdict]) -> Callable[[Evidence], Found]:
    """SGD-SaI and AdamW set against each other by their final top-1."""

    def find(evidence: Evidence) -> Found:
        one, other = (evidence.errors(setting, each) for each in (OURS, REFERENCE))
        pairs = paired(one, other)
        points = pairs.interval and pairs.interval.scaled(-100)
        accuracies = [
            {seed: None if error is None else 100 * (1 - error) for seed, error in each.items()}
            for each in (one, other)
        ]
        text = f"top-1 {_between(*accuracies, digits=1)} %: {told(points, 'points')}"
        loss = percent(paired(evidence.finals(setting, OURS), evidence.finals(setting, REFERENCE)))
        text += f"; loss {told(loss, '%')}"
        text += _without_smoothing(evidence, setting, OURS, REFERENCE)
        return Found(ours=text, n=len(pairs.differences), verdict=rule(pairs))

    return find


def _widths(cells: Cells) -> dict[int, float | None]:
    """Seed to the decades of learning rate near the best, each rate with its best decay."""
    widths: dict[int, float | None] = {}
    for seed, losses in cells.items():
        by_rate: dict[float, float | None] = {}
        for (lr, _), loss in losses.items():
            known = [each for each in (by_rate.get(lr), loss) if each is not None]
            by_rate[lr] = min(known, default=None)
        widths[seed] = decades_near_best(by_rate)
    return widths


def _of_one_rate(*widths: Finals) -> str:
    """In words, where no width could have been smaller."""
    known = [width for each in widths for width in each.values() if width]
    one = bool(known) and max(known) < 3 * WIDTH_MARGIN
    return ", a single rate everywhere, so that widths could not tell" if one else ""


def _at_an_edge(optimizer: str, cells: Cells) -> str:
    """In words, where the cell that is best over the seeds lies at an edge of its grid."""
    losses: dict[tuple[float, float], list[float]] = {}
    for found in cells.values():
        for cell, loss in found.items():
            losses.setdefault(cell, []).append(math.inf if loss is None else loss)
    best = min(losses, key=lambda cell: statistics.fmean(losses[cell]), default=None)
    if best is None:
        return ""
    told_of = [
        f"{name} {value:g}"
        for name, value, axis in zip(
            ("lr", "weight_decay"), best, zip(*losses, strict=True), strict=True
        )
        if value in (min(axis), max(axis))
    ]
    return f"; {optimizer} is best at an edge, {' and '.join(told_of)}" if told_of else ""


def robust(setting: str, theirs: str) -> Callable[[Evidence], Found]:
    """A range of good rates not narrower than theirs, and a higher mean over the grid, both."""

    def find(evidence: Evidence) -> Found:
        widths, means, edges = [], [], []
        for optimizer in (OURS, theirs):
            losses = evidence.cells(setting, optimizer, "validation_loss", None)
            widths.append(_widths(losses))
            edges.append(_at_an_edge(optimizer, losses))
            tops = evidence.cells(setting, optimizer, "validation_accuracy", CHANCE)
            means.append(
                {
                    seed: 100 * statistics.fmean(value or 0.0 for value in cells.values())
                    for seed, cells in tops.items()
                }
            )
        narrower = paired(widths[1], widths[0])
        lower = paired(means[1], means[0])
        text = (
            f"{_between(widths[0], widths[1], 2)} decades: "
            f"{told(narrower.interval and narrower.interval.scaled(-1), 'decades')}"
            f"{_of_one_rate(*widths)}; grid mean "
            f"{_between(means[0], means[1], 1)} % top-1: "
            f"{told(lower.interval and lower.interval.scaled(-1), 'points', 1)}"
            f"{''.join(edges)}"
        )
        verdict = all_of(decide(narrower.interval, WIDTH_MARGIN), decide(lower.interval))
        return Found(ours=text, n=len(lower.differences), verdict=verdict)

    return find


def half_the_state(evidence: Evidence) -> Found:
    """The bytes that the optimizers held at the end of the trainings of GPT-2."""
    one, other = (evidence.finals("gpt2", each, "state_bytes") for each in (OURS, REFERENCE))
    interval = _ratios(one, other)
    text = "nothing yet" if interval is None else f"{interval.mean:.4f} of AdamW's bytes"
    n = 0 if interval is None else interval.n
    return Found(ours=text, n=n, verdict=decide(interval, HALF))


def _ratios(ours: Finals, theirs: Finals) -> Interval | None:
    pairs = [(ours[seed], theirs.get(seed)) for seed in ours]
    values = tuple(one / other for one, other in pairs if one is not None and other)
    return Interval(values=values) if values else None


def faster(theirs: str) -> Callable[[Evidence], Found]:
    """Median times of a step on the tensors of ViT-S/16, taken in turn, in each repetition."""

    def find(evidence: Evidence) -> Found:
        one, other = (
            evidence.numbers("clock", f"vit_s_16.{each}.step_ms")
            for each in (OUR_STEP, CLOCKED[theirs])
        )
        interval, text = _ratios(one, other), "nothing yet"
        if interval is not None:
            text = (
                f"{_between(one, other, 1)} ms: {interval.mean:.2f} of its time "
                f"({interval.low:.2f} to {interval.high:.2f})"
            )
        n = 0 if interval is None else interval.n
        return Found(ours=text, n=n, verdict=decide(interval, 1.0))

    return find


def constant(group: Literal["matrices", "vectors"], measure: str) -> Callable[[Evidence], Found]:
    """Gains of all blocks of a group, measured again along the trainings of three models."""

    def find(evidence: Evidence) -> Found:
        verdicts, texts, counts = [], [], []
        for setting in ("gains_gpt2", "gains_vit", "gains_resnet18"):
            found = evidence.numbers(setting, f"training_batch.{group}.{measure}")
            values = tuple(value for value in found.values() if value is not None)
            interval = Interval(values=values) if values else None
            verdicts.append(decide(interval, CONSTANT))
            counts.append(len(values))
            model = setting.partition("_")[2]
            text = "nothing yet" if interval is None else told(interval.scaled(100), "%", 3)
            texts.append(f"{model} {text}")
        return Found(ours="; ".join(texts), n=min(counts), verdict=all_of(*verdicts))

    return find


def better_there(
    here: tuple[str, str], there: tuple[str, str], ours: str = OURS, theirs: str = REFERENCE
) -> Callable[[Evidence], Found]:
    """The relative difference of two arms in a setting, less that in another one.

    Args:
        here: setting and what it is called, where the difference should be smaller.
        there: the same of the other.
        ours: whose difference, default SGD-SaI.
        theirs: to whom, default AdamW.
    """

    def find(evidence: Evidence) -> Found:
        gaps: list[Finals] = []
        for setting, _ in (here, there):
            pairs = paired(evidence.finals(setting, ours), evidence.finals(setting, theirs))
            gap: dict[int, float | None] = dict.fromkeys(pairs.failed)
            gaps.append(gap | {s: 100 * d / pairs.reference for s, d in pairs.differences.items()})
        pairs = paired(*gaps)
        one, other = (
            f"{told(_interval(gap), '%')} {label}"
            for gap, (_, label) in zip(gaps, (here, there), strict=True)
        )
        text = f"{one}, {other}: {told(pairs.interval, 'points')}"
        return Found(ours=text, n=len(pairs.differences), verdict=decide_pairs(pairs))

    return find


def _interval(values: Finals) -> Interval | None:
    known = tuple(value for value in values.values() if value is not None)
    return Interval(values=known) if known else None


def slower_early(setting: str, step: int) -> Callable[[Evidence], Found]:
    """AdamW's validation loss at a fifth of the steps less SGD-SaI's."""

    def find(evidence: Evidence) -> Found:
        one, other = (evidence.early(setting, each, step) for each in (OURS, REFERENCE))
        pairs = paired(other, one)
        ahead = paired(one, other)
        text = f"loss {_between(one, other)} at step {step}: {told(percent(ahead), '%')}"
        return Found(ours=text, n=len(pairs.differences), verdict=decide_pairs(pairs))

    return find
