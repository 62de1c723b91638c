"""The rule of the verdicts: its three answers, what diverged, and the widths of a grid."""

import doctest
import math
import statistics

import pytest

from nomadam.experiments import verdicts
from nomadam.experiments.verdicts import (
    Interval,
    all_of,
    decades_near_best,
    decide,
    decide_pairs,
    equivalent,
    matches,
    matches_accuracy,
    paired,
)

SEEDS = range(1, 6)


def around(mean, spread, n=5):
    """n values with this mean and this standard deviation."""
    base = [i - (n - 1) / 2 for i in range(n)]
    return tuple(mean + spread * x / statistics.stdev(base) for x in base)


def test_examples():
    results = doctest.testmod(verdicts)
    assert results.attempted and not results.failed


def test_the_interval_is_students():
    scipy_stats = pytest.importorskip("scipy.stats")
    values = (0.3, -1.0, 2.5, 0.1, 0.9, 1.1)
    low, high = scipy_stats.t.interval(
        0.95, 5, loc=statistics.fmean(values), scale=scipy_stats.sem(values)
    )
    found = Interval(values=values)
    assert (found.low, found.high) == pytest.approx((low, high))
    assert found.scaled(-2).high == pytest.approx(-2 * low)


def test_the_whole_interval_decides():
    half = 2.7764 / math.sqrt(5)  # of a unit deviation
    assert decide(Interval(values=around(-half - 0.01, 1.0))) == "held"
    assert decide(Interval(values=around(-half + 0.01, 1.0))) == "undecided"
    assert decide(Interval(values=around(half - 0.01, 1.0))) == "undecided"
    assert decide(Interval(values=around(half + 0.01, 1.0))) == "not held"
    assert decide(Interval(values=around(half + 0.01, 1.0)), margin=0.02) == "undecided"
    assert decide(None) == "undecided"


@pytest.mark.parametrize("n", [1, 2, 4])
def test_fewer_than_five_pairs_decide_nothing(n):
    assert decide(Interval(values=(-1.0,) * n)) == "undecided"
    assert decide(Interval(values=(1.0,) * n)) == "undecided"


def test_a_match_is_within_half_a_percent_of_the_reference():
    theirs = dict(zip(SEEDS, around(4.0, 0.3), strict=True))
    for excess, verdict in ((0.0199, "held"), (0.0201, "not held")):
        ours = {seed: loss + excess for seed, loss in theirs.items()}
        assert matches(paired(ours, theirs)) == verdict
        assert decide_pairs(paired(ours, theirs)) == "not held"  # to beat it
    assert decide_pairs(paired({s: x - 1e-3 for s, x in theirs.items()}, theirs)) == "held"


def test_a_match_of_accuracies_is_within_one_point():
    theirs = dict.fromkeys(SEEDS, 0.05)
    assert matches_accuracy(paired(dict.fromkeys(SEEDS, 0.0599), theirs)) == "held"
    assert matches_accuracy(paired(dict.fromkeys(SEEDS, 0.0601), theirs)) == "not held"


def test_a_divergence_of_ours_alone_is_worse_than_any_margin():
    theirs = dict.fromkeys(SEEDS, 2.0)
    ours = dict.fromkeys(SEEDS, 1.0) | {3: None}
    assert matches(paired(ours, theirs)) == "not held"
    assert equivalent(paired(ours, theirs)) == "not held"
    both = paired(ours, theirs | {3: None})
    assert both.failed == () and both.left_out == (3,)
    assert matches(both) == "undecided"  # four pairs
    assert paired(theirs, ours).failed == ()


def test_a_seed_that_has_not_ended_is_left_out():
    pairs = paired({1: 1.0, 2: 2.0}, {1: 0.5, 4: 1.0})
    assert pairs.differences == {1: 0.5} and pairs.left_out == (2, 4) and pairs.reference == 0.5
    nothing = paired({}, {1: 0.5})
    assert nothing.interval is None and math.isnan(nothing.reference)
    assert matches(nothing) == equivalent(nothing) == "undecided"


def test_equivalence_holds_from_both_sides():
    theirs = dict.fromkeys(SEEDS, 2.0)
    for shift, verdict in ((-0.011, "not held"), (-0.009, "held"), (0.009, "held")):
        assert equivalent(paired({s: 2.0 + shift for s in SEEDS}, theirs)) == verdict
    wide = paired(dict(zip(SEEDS, around(2.0, 0.1), strict=True)), theirs)
    assert equivalent(wide) == "undecided"


def test_not_held_outweighs_undecided():
    assert all_of("held", "held") == "held"
    assert all_of("undecided", "held") == "undecided"
    assert all_of("undecided", "not held", "held") == "not held"


def test_the_width_of_a_grid_counts_the_rates_near_the_best():
    even = {10.0**k: 1.0 for k in range(-3, 1)}
    assert decades_near_best(even) == pytest.approx(4.0)
    assert decades_near_best(even | {1e-3: 1.021}) == pytest.approx(3.0)
    assert decades_near_best(even | {1e-3: 1.019}) == pytest.approx(4.0)
    # a rate stands for half-way to its neighbours
    assert decades_near_best({1.0: 9.0, 10.0: 1.0, 1000.0: 9.0}) == pytest.approx(1.5)
    assert decades_near_best({1.0: None, 10.0: -1.0, 100.0: -0.5}) == pytest.approx(1.0)
