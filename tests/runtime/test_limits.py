"""Limits in the types of settings."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import pytest

from himix_megatron.config import Count, CountOrZero, Fraction, Limit, Positive, ZeroOrMore, check_limits


@dataclass(frozen=True)
class Settings:
    count: Count = 1
    none: Count | None = None
    zero: CountOrZero = 0
    rate: Positive = 0.5
    decay: ZeroOrMore = 0.0
    share: Fraction = 1.0
    pair: tuple[Positive, Positive] = (1.0, 1.0)
    many: tuple[Count, ...] = ()
    below: Annotated[float, Limit(0, 1, without_high=True)] = 0.0
    free: int = -1


def test_numbers_within_their_limits_pass() -> None:
    check_limits(Settings())
    check_limits(Settings(count=2**70, none=3, rate=1e-300, share=0.0, many=(1, 2), below=0.999))


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("count", 0, "1 or more"),
        ("none", 0, "1 or more"),
        ("zero", -1, "0 or more"),
        ("rate", 0.0, "a finite number above 0"),
        ("rate", math.inf, "a finite number above 0"),
        ("decay", math.nan, "0 or more"),
        ("share", 1.01, "0 to 1"),
        ("pair", (1.0, -2.0), "a finite number above 0"),
        ("many", (3, 0), "1 or more"),
        ("below", 1.0, "0 to below 1"),
    ],
)
def test_a_number_beyond_its_limit_is_named(name: str, value: float | tuple[float, ...], wanted: str) -> None:
    shown = min(value) if isinstance(value, tuple) else value
    for section, prefix in ((None, "--"), ("train", "train.")):
        with pytest.raises(ValueError) as caught:  # noqa: PT011
            check_limits(Settings(**{name: value}), section)  # type: ignore[arg-type]
        assert str(caught.value) == f"{prefix}{name} is {shown}: wanted {wanted}"
