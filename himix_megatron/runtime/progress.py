"""Where this process is in its work: said once, heard by the watch over the ranks and by planned faults.

Flows in: named points, such as `step/backward`, on the main thread; out: a mark for whoever listens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from . import failpoints

_listeners: list[Callable[[str], None]] = []


@contextmanager
def told_to(listener: Callable[[str], None]) -> Iterator[None]:
    """Within it `listener` is called with each point."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


def at(point: str) -> None:
    """This process has come to a point of its work."""
    for listener in _listeners:
        listener(point)
    failpoints.reach(point)
