"""Limits of single numbers, written in the types of settings: `steps: Count | None`. In: settings; out: one line."""

from __future__ import annotations

import functools
import math
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any


@dataclass(frozen=True, slots=True)
class Limit:
    """Numbers from `low` to `high`, always finite."""

    low: float
    high: float = math.inf
    without_low: bool = False
    without_high: bool = False

    def allows(self, number: float) -> bool:
        """Whether a number is within the limits."""
        above = self.low < number if self.without_low else self.low <= number
        return above and (number < self.high if self.without_high else number <= self.high) and math.isfinite(number)

    def __str__(self) -> str:
        if self.high < math.inf:
            return f"{self.low} to {'below ' if self.without_high else ''}{self.high}"
        return f"a finite number above {self.low}" if self.without_low else f"{self.low} or more"


Count = Annotated[int, Limit(1)]
CountOrZero = Annotated[int, Limit(0)]
Positive = Annotated[float, Limit(0, without_low=True)]
ZeroOrMore = Annotated[float, Limit(0)]
Fraction = Annotated[float, Limit(0, 1)]
BelowOne = Annotated[float, Limit(0, 1, without_high=True)]


def check_limits(settings: Any, section: str | None = None) -> None:
    """Check every field of a dataclass that has a limit in its type; of a tuple each number. `section`: its name in Config.

    Raises: ValueError, naming `section.field`, or the flag of a command's own settings.
    """
    cls: Any = type(settings)
    for name, limit in _limits(cls).items():
        value = getattr(settings, name)
        for number in value if isinstance(value, tuple) else (value,):
            if number is not None and not limit.allows(number):
                shown = f"{section}.{name}" if section else f"--{name.replace('_', '-')}"
                raise ValueError(f"{shown} is {number}: wanted {limit}")


def check_known(field: str, value: str, names: Iterable[str]) -> None:
    """Raises: ValueError for a value that is not among the names."""
    if value not in (known := list(names)):
        raise ValueError(f"{field} is {value}: wanted one of {', '.join(known)}")


@functools.cache
def _limits(cls: Any) -> dict[str, Limit]:
    hints = typing.get_type_hints(cls, include_extras=True)
    return {name: limit for name, hint in hints.items() if (limit := _limit_in(hint)) is not None}


def _limit_in(hint: Any) -> Limit | None:
    own = (item for item in getattr(hint, "__metadata__", ()) if isinstance(item, Limit))
    inner = (limit for part in typing.get_args(hint) if (limit := _limit_in(part)) is not None)
    return next(own, None) or next(inner, None)
