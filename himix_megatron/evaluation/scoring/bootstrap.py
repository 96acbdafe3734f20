"""How sure a figure is: bootstrap intervals over questions.

Every published figure here is a function of sums over questions, so a resample is a draw of weights and one matrix product.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .base import Tally


@dataclass(frozen=True, slots=True)
class Interval:
    """A figure and its central 95 % bootstrap interval."""

    value: float
    low: float
    high: float


def with_intervals(
    tallies: Sequence[Tally],
    figures: Callable[[Mapping[str, float]], dict[str, float]],
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Interval]:
    """Each figure over all units, with the 2.5th and 97.5th percentile over resamples of the units with replacement.

    Resamples in which a figure does not exist (none of its questions was drawn) do not count for it. The same seed and units
    in the same order give the same interval. Source: Efron, "Bootstrap methods: another look at the jackknife", 1979.
    """
    if not tallies:
        return {}
    columns = sorted({name for tally in tallies for name in tally})
    place = {name: i for i, name in enumerate(columns)}
    table = np.zeros((len(tallies), len(columns)))
    for row, tally in enumerate(tallies):
        for name, value in tally.items():
            table[row, place[name]] = value
    draw = np.random.default_rng(seed)

    def of(weights: np.ndarray) -> dict[str, float]:
        return figures(dict(zip(columns, (weights @ table).tolist(), strict=True)))

    whole = of(np.ones(len(tallies)))
    found: dict[str, list[float]] = {name: [] for name in whole}
    for _ in range(resamples):
        drawn = draw.integers(len(tallies), size=len(tallies))
        for name, value in of(np.bincount(drawn, minlength=len(tallies)).astype(float)).items():
            found[name].append(value)
    return {name: Interval(value, *_central(found[name], value)) for name, value in whole.items()}


def crossed_interval(values: npt.NDArray[np.float64], *, resamples: int = 1000, seed: int = 0) -> Interval:
    """The mean of float[seeds, questions], with its percentiles over resamples of both the seeds and the questions.

    Of pairs, give the differences. With few seeds it is narrow: of 3, one in 9 resamples has all three the same.
    Source: Owen, "The pigeonhole bootstrap", 2007.
    """
    draw, (seeds, questions) = np.random.default_rng(seed), values.shape
    weights = (draw.integers(seeds, size=(resamples, seeds, 1)) == np.arange(seeds)).mean(axis=1)
    found = np.take_along_axis(weights @ values, draw.integers(questions, size=(resamples, questions)), axis=1).mean(axis=1)
    mean = float(values.mean())
    return Interval(mean, *_central(found.tolist(), mean))


def _central(values: Sequence[float], otherwise: float) -> tuple[float, float]:
    """2.5th and 97.5th percentile of what exists."""
    known = np.array(values)[~np.isnan(values)]
    if not len(known):
        return otherwise, otherwise
    low, high = np.percentile(known, [2.5, 97.5])
    return float(low), float(high)
