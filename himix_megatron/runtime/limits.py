"""Limits of single numbers and texts, written in the types of settings: `steps: Count | None`. In: settings; out: one line."""

from __future__ import annotations

import functools
import math
import re
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
        return above and (number < self.high if self.without_high else number <= self.high) and abs(number) != math.inf

    def __str__(self) -> str:
        if self.high < math.inf:
            return f"{self.low} to {'below ' if self.without_high else ''}{self.high}"
        return f"a finite number above {self.low}" if self.without_low else f"{self.low} or more"


@dataclass(frozen=True, slots=True)
class Pattern:
    """Text of ASCII characters that a regular expression describes as a whole."""

    expression: str
    wanted: str
    """The same in words."""

    def allows(self, text: str) -> bool:
        """Whether the text is of that form."""
        return re.fullmatch(self.expression, text, re.ASCII) is not None

    def __str__(self) -> str:
        return self.wanted


Count = Annotated[int, Limit(1)]
CountOrZero = Annotated[int, Limit(0)]
Size = Annotated[int, Limit(0, 2**63 - 1)]
"""A number of bytes, samples or images that a file tells: it fits into what the file system and arrays count with."""
Positive = Annotated[float, Limit(0, without_low=True)]
ZeroOrMore = Annotated[float, Limit(0)]
Fraction = Annotated[float, Limit(0, 1)]
Sha256 = Annotated[str, Pattern("[0-9a-f]{64}", "64 hexadecimal digits")]
ShardName = Annotated[str, Pattern(r"[A-Za-z0-9_][A-Za-z0-9._-]{,99}-\d{6,}", "a shard's name, NAME-000000")]
"""It becomes a part of paths, so nothing that a manifest says can lead out of its folder."""
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
