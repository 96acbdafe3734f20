"""Numbers in, a few bars out: for people, on a terminal or in a picture."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, floor, log10

import numpy as np
import numpy.typing as npt

MOST_BARS = 12


@dataclass(frozen=True, slots=True)
class Bar:
    """How many numbers lie in one interval."""

    label: str
    """`3` for one number, `10-19` for an interval, `200+` for the open one at the end."""
    count: int


def histogram(values: npt.NDArray[np.int64]) -> list[Bar]:
    """Bars of one round width from the smallest value on; a long tail (1 % of the values) shares the last one.

    Few different values get a bar each. Without values there are no bars.
    """
    if not len(values):
        return []
    low, high, top = int(values.min()), int(values.max()), int(np.quantile(values, 0.99, method="higher"))
    if high - low < MOST_BARS:
        return [Bar(str(value), int((values == value).sum())) for value in range(low, high + 1)]
    step = _round_up(max(1.0, (top - low + 1) / (MOST_BARS - 2)))
    first, last = floor(low / step) * step, (floor(top / step) + 1) * step
    bars = []
    for start in range(first, last, step):
        label = str(start) if step == 1 else f"{start}-{start + step - 1}"
        bars.append(Bar(label, int(((values >= start) & (values < start + step)).sum())))
    if high >= last:
        bars.append(Bar(f"{last}+", int((values >= last).sum())))
    return bars


def summary(values: npt.NDArray[np.int64]) -> str:
    """Smallest, middle, mean and largest, in one line."""
    if not len(values):
        return "none"
    return f"min {values.min():,}  median {np.median(values):,.0f}  mean {values.mean():,.1f}  max {values.max():,}"


def drawn(bars: list[Bar], width: int = 40, full: str = "█") -> list[str]:
    """Lines of text: label, bar, count and share."""
    total, largest = max(1, sum(bar.count for bar in bars)), max((bar.count for bar in bars), default=1)
    column = max((len(bar.label) for bar in bars), default=0)
    lines = []
    for bar in bars:
        length = ceil(width * bar.count / largest) if largest else 0
        lines.append(f"{bar.label:>{column}}  {full * length:<{width}} {bar.count:>9,}  {100 * bar.count / total:5.1f} %")
    return lines


def _round_up(step: float) -> int:
    """The next of 1, 2, 5, 10, 20, 50 ..."""
    power: int = 10 ** floor(log10(step))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= step)
