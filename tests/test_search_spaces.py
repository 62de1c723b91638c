import dataclasses
import itertools
import math
import random

import pytest
from optuna.trial import TrialState, create_trial
from tiny_training import tiny_run

from nomadam.experiments.configuration import OptimizerChoice
from nomadam.experiments.search_spaces import (
    Search,
    outer_edge,
    quasi_random,
    rounded,
    shown,
    suggested,
    zoomed,
)

LR, DECAY, GAIN = "optimizer.lr", "optimizer.weight_decay", "optimizer.arguments.gain"


def ranges(**changes):
    bounds = {LR: (1e-4, 1e-1), DECAY: (1e-3, 1.0)}
    return Search(**{"label": "sgd_sai", "runs": (tiny_run(),), "bounds": bounds, **changes})


def grid(**changes):
    cells = [
        dataclasses.replace(
            tiny_run(**changes),
            optimizer=OptimizerChoice(name="sgd_sai", lr=lr, arguments=arguments),
        )
        for lr in (1e-3, 1e-2, 1e-1)
        for arguments in ({}, {"gain": "sqrt_numel"})
    ]
    return Search(label="sgd_sai", runs=tuple(cells), bounds={})


class TestPoints:
    def test_any_number_of_points_is_spread_evenly(self):
        for dimensions, count in itertools.product((1, 2, 3), (8, 13, 32)):
            points = [quasi_random(index, dimensions) for index in range(count)]
            for base, axis in zip((2, 3, 5), zip(*points, strict=True), strict=False):
                assert all(0 < value < 1 for value in axis)
                gaps = [b - a for a, b in itertools.pairwise([0.0, *sorted(axis), 1.0])]
                assert max(gaps) <= base / count

    def test_in_the_plane_no_place_is_left_out_and_none_is_taken_twice(self):
        points = [quasi_random(index, 2) for index in range(16)]
        nearest = min(math.dist(a, b) for a, b in itertools.combinations(points, 2))
        assert nearest > 0.1
        ninths = {(int(3 * x), int(3 * y)) for x, y in points}
        assert len(ninths) == 9

    def test_more_fields_than_bases(self):
        with pytest.raises(ValueError, match="9 fields are searched: must be at most 8"):
            quasi_random(0, 9)

    def test_values_are_short_and_within_the_range(self):
        assert rounded(0.123456, 1e-3, 1.0) == 0.1235
        assert rounded(0.99999, 1e-3, 0.999991) == 0.999991
        for index in range(50):
            values = ranges().values(index)
            assert 1e-4 <= values[LR] <= 1e-1 and 1e-3 <= values[DECAY] <= 1.0
            assert len(repr(values[LR]).replace("e-05", "").strip("0.")) <= 4

    def test_the_same_point_for_every_optimizer(self):
        other = ranges(label="other", bounds={LR: (1e-2, 1e1), DECAY: (1e-3, 1.0)})
        for index in range(5):
            a, b = ranges().values(index), other.values(index)
            assert b[LR] == pytest.approx(100 * a[LR], rel=2e-3)
            assert b[DECAY] == a[DECAY]


class TestSearches:
    def test_a_run_has_the_values(self):
        run = ranges().run({LR: 0.02, DECAY: 0.5})
        assert (run.optimizer.lr, run.optimizer.weight_decay) == (0.02, 0.5)
        assert run == dataclasses.replace(tiny_run(), optimizer=run.optimizer)

    @pytest.mark.parametrize("ends", [(0, 1), (1, 1), (2, 1), (1e-3, math.inf), (-1, 1)])
    def test_wrong_ranges(self, ends):
        with pytest.raises(ValueError, match="range of optimizer.lr.*0 < low < high"):
            ranges(bounds={LR: ends})

    def test_a_grid_tells_what_differs(self):
        search = grid()
        assert search.space == {LR: [1e-3, 1e-2, 1e-1], GAIN: ["(absent)", "sqrt_numel"]}
        for index, run in enumerate(search.runs):
            assert search.run(search.values(index)) is run
        with pytest.raises(ValueError, match="no Run with lr=3 gain=gsnr"):
            search.run({LR: 3.0, GAIN: "gsnr"})

    def test_a_grid_of_nothing_or_of_seeds_is_refused(self):
        with pytest.raises(ValueError, match="Runs that differ"):
            Search(label="a", runs=(tiny_run(), tiny_run()), bounds={})
        seeds = tuple(tiny_run(seed=seed) for seed in (0, 1))
        with pytest.raises(ValueError, match="of one seed"):
            Search(label="a", runs=seeds, bounds={})

    def test_plans_know_everything_but_the_searched_fields(self):
        assert ranges().plan == ranges(runs=(tiny_run(lr=0.5),)).plan
        assert ranges().plan != ranges(runs=(tiny_run(steps=3),)).plan
        assert ranges().plan != ranges(bounds={LR: (1e-4, 1e-1)}).plan
        assert grid().plan == grid().plan != grid(steps=3).plan

    def test_values_in_words(self):
        assert shown({LR: 1e-3, GAIN: "gsnr"}) == "lr=0.001 gain=gsnr"


class TestEdges:
    @pytest.mark.parametrize(
        ("best", "edges"),
        [
            (1e-3, {}),
            (2e-4, {LR: "lower"}),  # nothing below it was tried
            (5e-2, {LR: "upper"}),
        ],
    )
    def test_nothing_beyond_the_best_was_tried(self, best, edges):
        tried = [{LR: lr} for lr in (2e-4, 1e-3, 5e-2)]
        assert ranges(bounds={LR: (1e-4, 1e-1)}).edges({LR: best}, tried) == edges

    def test_the_outer_part_of_the_range_counts_though_something_was_tried_beyond(self):
        search = ranges(bounds={LR: (1e-4, 1e-1)})
        tried = [{LR: lr} for lr in (1.01e-4, 1.2e-4, 1e-3, 9e-2, 9.9e-2)]
        found = [search.edges(each, tried) for each in tried]
        assert found == [{LR: "lower"}, {LR: "lower"}, {}, {LR: "upper"}, {LR: "upper"}]

    def test_where_all_were_tried_in_the_outer_part_that_end_is_the_edge(self):
        search = ranges(bounds={LR: (1e-4, 1e-1)})
        tried = [{LR: lr} for lr in (9e-2, 9.5e-2)]
        assert [search.edges(each, tried) for each in tried] == [{LR: "upper"}] * 2

    def test_the_outer_part_is_a_twentieth_of_the_decades(self):
        # Of two decades a tenth of one.
        near = 10**0.1
        values = (1e-3, 0.99e-3 * near, 1.01e-3 * near, 0.99e-1 / near, 1.01e-1 / near, 1e-1)
        found = [outer_edge(value, 1e-3, 1e-1) for value in values]
        assert found == ["lower", "lower", None, None, "upper", "upper"]

    def test_one_trial_has_no_edges(self):
        assert ranges().edges({LR: 1e-2, DECAY: 1e-3}, [{LR: 1e-2, DECAY: 1e-3}]) == {}

    def test_of_a_grid_the_outermost_numbers(self):
        search = grid()
        tried = [search.values(index) for index in range(6)]
        found = [search.edges(each, tried) for each in tried]
        assert found == [{LR: "lower"}] * 2 + [{}] * 2 + [{LR: "upper"}] * 2


class TestSuggestions:
    def trial(self, search, values, loss, state=TrialState.COMPLETE):
        return create_trial(
            state=state, value=loss, params=values, distributions=search.distributions()
        )

    def test_half_of_the_budget_is_quasi_random_then_the_good_ones_are_followed(self):
        search = ranges()
        trials = []
        for index in range(24):
            values = suggested(search, index, 24, trials)
            if index < 10:
                assert values == search.values(index)
            # Best at 1e-3, worse with each decade; above 3e-2 it diverges.
            distance = abs(math.log10(values[LR]) + 3)
            loss = math.inf if values[LR] > 3e-2 else distance
            trials.append(self.trial(search, values, loss))
        late = [abs(math.log10(trial.params[LR]) + 3) for trial in trials[14:]]
        assert sum(distance < 0.5 for distance in late) >= 7
        assert any(math.isinf(trial.value) for trial in trials)

    def test_what_is_in_training_is_not_crowded(self):
        search = ranges(bounds={LR: (1e-4, 1e-1)})
        trials = [
            self.trial(search, {LR: lr}, abs(math.log10(lr) + 3)) for lr in (1e-4, 1e-3, 1e-2, 1e-1)
        ]
        for index in range(4, 8):
            values = suggested(search, index, 6, trials)
            assert values[LR] not in [trial.params[LR] for trial in trials]
            trials.append(self.trial(search, values, None, TrialState.RUNNING))


class TestZoom:
    def tuned(self, search, budget, loss_of):
        """All trials of a search, one after another."""
        trials = []
        for index in range(budget):
            values = zoomed(search, index, budget, trials)
            trials.append((values, loss_of(values)))
        return trials

    def test_the_first_seven_of_ten_are_quasi_random(self):
        search = ranges()
        for budget, first in ((1, 1), (2, 2), (3, 3), (4, 3), (7, 5), (10, 7), (20, 14), (100, 70)):
            trials = self.tuned(search, budget, lambda values: values[LR])
            same = [values == search.values(index) for index, (values, _) in enumerate(trials)]
            assert same == [True] * first + [False] * (budget - first)

    @pytest.mark.parametrize("best", [(1e-4, 1e-3), (1e-1, 1.0), (2e-3, 0.05), (1.1e-4, 0.9)])
    def test_the_box_is_around_the_best_one_and_within_the_ranges(self, best):
        search = ranges()
        others = [({LR: 3e-2, DECAY: 0.5}, 2.0), ({LR: 1e-3, DECAY: 0.1}, math.inf)]
        trials = [*others, (dict(zip((LR, DECAY), best, strict=True)), 1.0)]
        points = [zoomed(search, index, 1000, trials) for index in range(700, 1000)]
        for (field, (low, high)), middle in zip(search.bounds.items(), best, strict=True):
            tried = [math.log(values[field]) for values in points]
            length = math.log(high / low) / 4
            start = min(max(math.log(middle) - length / 2, math.log(low)), math.log(high) - length)
            assert start - 1e-3 <= min(tried) < start + 0.02 * length
            assert start + 0.98 * length < max(tried) <= start + length + 1e-3
            assert all(low <= values[field] <= high for values in points)

    def test_what_is_better_in_the_box_moves_it(self):
        search = ranges()
        trials = [({LR: 1e-3, DECAY: 0.03}, 2.0)]
        inside = zoomed(search, 7, 10, trials)
        moved = zoomed(search, 8, 10, [*trials, (inside, 1.0)])
        assert moved != zoomed(search, 8, 10, [*trials, (inside, 3.0)])
        assert moved != zoomed(search, 8, 10, [*trials, (inside, math.inf)])

    def test_where_all_have_diverged_it_goes_on_evenly(self):
        search = ranges()
        trials = self.tuned(search, 10, lambda values: math.inf)
        assert [values for values, _ in trials] == [search.values(index) for index in range(10)]

    @pytest.mark.parametrize("dimensions", [1, 2, 3, 8])
    def test_within_any_ranges_no_trial_is_made_twice(self, dimensions):
        draw = random.Random(dimensions)
        for _ in range(60):
            low = 10 ** draw.uniform(-8, 8)
            ends = (low, low * 10 ** draw.uniform(0.5, 6))
            bounds = {f"optimizer.arguments.a{n}": ends for n in range(dimensions)}
            search = ranges(bounds=bounds)
            trials = self.tuned(search, 20, lambda _: draw.choice([math.inf, draw.random()]))
            values = [tuple(each.values()) for each, _ in trials]
            assert len(set(values)) == 20
            assert all(ends[0] <= each <= ends[1] for point in values for each in point)

    def test_a_range_of_few_numbers_ends_too(self):
        search = ranges(bounds={LR: (0.1, 0.1001)})
        trials = self.tuned(search, 10, lambda values: 1.0)
        assert {values[LR] for values, _ in trials} <= {0.1, 0.1001}

    def test_it_is_nearer_to_the_best_than_the_even_points(self):
        search = ranges()
        nearer = 0
        for decades in range(1, 30):
            aim = 1e-4 * 10 ** (decades / 10)
            trials = self.tuned(search, 10, lambda values, aim=aim: abs(math.log(values[LR] / aim)))
            evenly = min(abs(math.log(search.values(index)[LR] / aim)) for index in range(10))
            nearer += min(loss for _, loss in trials) <= evenly
        assert nearer > 20
