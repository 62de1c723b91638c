"""How far gains move through training and over depth: the numbers and the tables."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from nomadam.experiments.study import Table

# Whose gradient is measured: the one that the step is taken along, and that of a held-out batch,
# which is the same at every step and never trained on.
BATCHES = ("training_batch", "fixed_batch")

# Of one kind of batch: block to its gain at each measured step, None where it has none.
Gains = Mapping[str, Sequence[float | None]]


def drift(gains: Sequence[float | None]) -> list[float]:
    """How far each later gain of a block is from its first one: ``|gain_t / gain_0 - 1|``.

    Example:
        >>> drift([2.0, None, 2.5, 1.0])
        [0.25, 0.5]
    """
    known = [gain for gain in gains if gain is not None]
    return [abs(gain / known[0] - 1) for gain in known[1:]]


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Spearman's rank correlation, ties at their mean rank; None where either does not vary.

    Values that agree in six digits are ties: gains of equal tensors differ in the last ones only.

    Example:
        >>> rank_correlation([1.0, 2.0, 3.0, 4.0], [10.0, 30.0, 20.0, 40.0])
        0.8
    """
    ranks = []
    for values in (one, other):
        values = np.array([float(f"{value:.6g}") for value in values])
        ordered = np.sort(values)
        left, right = (np.searchsorted(ordered, values, side) for side in ("left", "right"))
        ranks.append((left + right) / 2)
    if any(len(rank) < 2 or np.ptp(rank) == 0 for rank in ranks):
        return None
    return round(float(np.corrcoef(*ranks)[0, 1]), 12)


def drift_numbers(blocks: Mapping[str, Any], gains: Mapping[str, Gains]) -> dict[str, float | None]:
    """What is said of all blocks, of matrices and of vectors, for ``result.json``.

    Args:
        blocks: name to ``numel``, ``shape``, ``kind`` and ``layer``.
        gains: of each of `BATCHES`.
    """
    return {
        f"{kind}.{group}.{key}": value
        for kind in BATCHES
        for group, names in _groups(blocks).items()
        for key, value in _measures(blocks, gains[kind], names).items()
    }


def _groups(blocks: Mapping[str, Any]) -> dict[str, list[str]]:
    """All blocks, and those with several dimensions and with one apart, above a size of 1."""
    flat = {name: sum(size > 1 for size in block["shape"]) < 2 for name, block in blocks.items()}
    groups = {
        "all": list(blocks),
        "matrices": [name for name in blocks if not flat[name]],
        "vectors": [name for name in blocks if flat[name]],
    }
    return {group: names for group, names in groups.items() if names}


def _measures(
    blocks: Mapping[str, Any], gains: Gains, names: Sequence[str]
) -> dict[str, float | None]:
    """What is said of some blocks together."""
    known = {name: [g for g in gains.get(name, ()) if g is not None] for name in names}
    known = {name: series for name, series in known.items() if series}
    drifts = {name: drift(series) for name, series in known.items() if len(series) > 1}
    ratios = [
        gain / blocks[name]["numel"] ** 0.5 for name, series in known.items() for gain in series
    ]
    both = [(series[0], series[-1]) for series in known.values()]
    medians = [float(np.median(each)) for each in drifts.values()]
    largest = [max(each) for each in drifts.values()]
    return {
        "num_blocks": len(known),
        "median_drift": float(np.median(medians)) if medians else None,
        "largest_drift": max(largest, default=None),
        "share_within_1_percent": float(np.mean([each < 0.01 for each in largest]))
        if largest
        else None,
        "rank_correlation_of_first_and_last": rank_correlation(*zip(*both, strict=True))
        if both
        else None,
        "spread_over_depth": _spread_over_depth(blocks, known, np.median),
        "largest_spread_over_depth": _spread_over_depth(blocks, known, np.max),
        "rank_correlation_with_depth": _correlation_with_depth(blocks, known),
        "least_of_sqrt_numel": min(ratios, default=None),
        "median_of_sqrt_numel": float(np.median(ratios)) if ratios else None,
        "largest_of_sqrt_numel": max(ratios, default=None),
    }


def _layers(
    blocks: Mapping[str, Any], known: Mapping[str, Sequence[float]]
) -> list[list[tuple[int, float]]]:
    """Of each kind that has several layers: layer and last gain."""
    kinds: dict[str, list[tuple[int, float]]] = {}
    for name, series in known.items():
        if blocks[name]["layer"] is not None:
            kinds.setdefault(blocks[name]["kind"], []).append((blocks[name]["layer"], series[-1]))
    return [sorted(layers) for layers in kinds.values() if len(layers) > 1]


def _spread_over_depth(
    blocks: Mapping[str, Any],
    known: Mapping[str, Sequence[float]],
    reduce: Callable[[Sequence[float]], Any],
) -> float | None:
    """Of all kinds of tensors in one: largest over smallest gain of the layers, less 1."""
    spreads = [
        max(gain for _, gain in layers) / min(gain for _, gain in layers) - 1
        for layers in _layers(blocks, known)
    ]
    return float(reduce(spreads)) if spreads else None


def _correlation_with_depth(
    blocks: Mapping[str, Any], known: Mapping[str, Sequence[float]]
) -> float | None:
    """Mean over the kinds of tensors of the rank correlation between layer and gain."""
    found = [rank_correlation(*zip(*layers, strict=True)) for layers in _layers(blocks, known)]
    told = [each for each in found if each is not None]
    return float(np.mean(told)) if told else None


def summary_table(blocks: Mapping[str, Any], gains: Mapping[str, Gains]) -> Table:
    """The same numbers as a table; for the arguments see `drift_numbers`."""
    rows = []
    for kind in BATCHES:
        for group, names in _groups(blocks).items():
            rows.append(
                (
                    f"{group}, {kind.replace('_', ' ')}",
                    *_measures(blocks, gains[kind], names).values(),
                )
            )
    heads = (
        "blocks, gradient of",
        "blocks",
        "median drift",
        "largest drift",
        "part within 1 %",
        "first and last, rank corr.",
        "spread over depth",
        "largest",
        "with depth, rank corr.",
        "gain / sqrt(numel), least",
        "median",
        "largest",
    )
    return Table(
        title="Gains through training",
        heads=heads,
        rows=rows,
        note="Drift: |gain / first gain - 1| of a block over the measured steps; the median over "
        "blocks of their medians, and the largest of all; the part of the blocks that never drift "
        "by 1 %. Spread over depth: largest gain over smallest among the layers of one kind of "
        "tensor at the last step, less 1, the median over the kinds, and the "
        "largest.",
    )


def block_table(blocks: Mapping[str, Any], gains: Mapping[str, Gains]) -> Table:
    """First and last gain and drift of each block; for the arguments see `drift_numbers`."""
    rows = []
    for name, block in blocks.items():
        root = block["numel"] ** 0.5
        cells: list[Any] = [name, "x".join(map(str, block["shape"])), round(root, 2)]
        for kind in BATCHES:
            known = [gain for gain in gains[kind].get(name, ()) if gain is not None]
            drifts = drift(known)
            cells += [
                known[0] if known else None,
                known[-1] / root if known else None,
                float(np.median(drifts)) if drifts else None,
                max(drifts, default=None),
            ]
        rows.append(cells)
    heads = ["block", "shape", "sqrt(numel)"]
    for kind in BATCHES:
        words = kind.replace("_", " ")
        heads += [f"first gain, {words}", "last gain / sqrt(numel)", "median drift", "largest"]
    return Table(title="Gains by block", heads=heads, rows=rows)
