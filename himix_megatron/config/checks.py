"""Checks that sections share."""

from __future__ import annotations

import math
from collections.abc import Iterable


def positive(**values: float) -> None:
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name.replace('__', '.')} is {value}: it must be above 0{' and finite' if value > 0 else ''}")


def known(field: str, value: str, names: Iterable[str]) -> None:
    """Raises: ValueError for a value that is not among the names."""
    if value not in (names := list(names)):
        raise ValueError(f"{field} is {value}: wanted one of {', '.join(names)}")
