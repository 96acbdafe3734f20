"""Faults on purpose, at named points, so that recovery is proven by real ones. Off unless a run is told otherwise.

Flows in: the points that the product passes (`reach("save/manifest")`); out: nothing, or the planned fault.
"""

from __future__ import annotations

from collections.abc import Callable

_planned: dict[str, Callable[[], None]] = {}
"""What happens at which point of this process; empty in every run that nobody tests."""


def reach(point: str) -> None:
    """Say that this process has come to a named point, such as `step/backward` or `save/rename`."""
    if _planned and point in _planned:
        _planned[point]()
