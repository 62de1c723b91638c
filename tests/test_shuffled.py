"""Rows in passes: the steps of a training, which begin at 1, go through the data from its start."""

import numpy as np
import pytest

from nomadam.experiments.data.shuffled import shuffled_rows


def rows(steps, **changes):
    place = {"seed": 0, "micro": 0, "batch_size": 4, **changes}
    return np.concatenate([shuffled_rows(12, step=step, **place) for step in steps]).tolist()


def test_the_first_steps_of_a_training_have_every_row_once():
    assert sorted(rows([1, 2, 3])) == sorted(rows([4, 5, 6])) == list(range(12))
    assert rows([1, 2, 3]) != rows([4, 5, 6])
    assert rows([1, 2], batch_size=6) == rows([1, 2, 3])


def test_a_batch_may_reach_over_the_end_of_a_pass():
    assert rows([1, 2], batch_size=8)[:12] == rows([1, 2, 3])
    assert rows([1], batch_size=30)[12:24] == rows([4, 5, 6])


def test_each_micro_batch_and_seed_has_an_order_of_its_own():
    assert rows([1, 2, 3], micro=1) != rows([1, 2, 3]) != rows([1, 2, 3], seed=1)


def test_there_is_no_step_before_the_first():
    with pytest.raises(ValueError, match="step = 0: must be at least 1"):
        rows([0])
