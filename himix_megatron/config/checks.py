"""Checks that sections share."""

from __future__ import annotations

import math


def positive(**values: float) -> None:
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name.replace('__', '.')} is {value}: it must be above 0{' and finite' if value > 0 else ''}")
