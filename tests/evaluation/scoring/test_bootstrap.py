"""Bootstrap intervals: the same for the same seed, and about as wide as the textbook says."""

from __future__ import annotations

import math

import pytest

from himix_megatron.evaluation.scoring.base import mean_tally, means
from himix_megatron.evaluation.scoring.bootstrap import Interval, with_intervals


def test_interval_of_a_share_is_the_binomial_one() -> None:
    tallies = [mean_tally(n % 4 == 0, ()) for n in range(400)]
    (found,) = with_intervals(tallies, means).values()
    half = 100 * 1.96 * math.sqrt(0.25 * 0.75 / 400)
    assert found.value == 25.0
    assert found.low == pytest.approx(25 - half, abs=0.6)
    assert found.high == pytest.approx(25 + half, abs=0.6)


def test_the_same_seed_gives_the_same_interval_and_another_seed_another() -> None:
    tallies = [mean_tally(n % 3 == 0, ("a",) if n % 2 else ("b",)) for n in range(50)]
    assert with_intervals(tallies, means) == with_intervals(tallies, means)
    assert with_intervals(tallies, means) != with_intervals(tallies, means, seed=1)


def test_a_figure_without_questions_in_a_resample_leaves_that_resample_out() -> None:
    tallies = [mean_tally(1.0, ("rare",)), *[mean_tally(0.0, ("often",))] * 30]
    found = with_intervals(tallies, means)
    assert found["accuracy_percent/rare"] == Interval(100.0, 100.0, 100.0)
    assert found["accuracy_percent/often"] == Interval(0.0, 0.0, 0.0)


def test_nothing_has_no_figures() -> None:
    assert with_intervals([], means) == {}
