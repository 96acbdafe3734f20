"""How long a pipeline stage computes, and how long it waits for other stages, from the timers of megatron-core's schedules.

Flows in: the schedule's calls at the start and end of each forward and backward pass of a micro-batch; out: the seconds within
passes, and from the schedule's start to the end of its last pass. The time between passes is the bubble. On a GPU the times
come from CUDA events, so queued work counts when it runs.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

_PASSES = ("forward-compute", "backward-compute")
_SCHEDULE = "forward-backward"


class ScheduleTimers:
    """The timers that megatron-core's schedules call (`config.timers`)."""

    def __init__(self, device: torch.device):
        self._mark = _event if device.type == "cuda" else time.perf_counter
        self._busy: list[tuple[Any, Any]] = []
        self._schedules: list[tuple[Any, Any]] = []
        self._opened: dict[str, Any] = {}

    def __call__(self, name: str, log_level: int | None = None) -> Any:
        """The timer of that name, as megatron-core starts and stops it."""
        return SimpleNamespace(start=lambda barrier=False: self.open(name), stop=lambda barrier=False: self.close(name))

    def open(self, name: str) -> None:
        """A pass or the schedule starts."""
        if name in _PASSES or name == _SCHEDULE:
            self._opened[name] = self._mark()

    def close(self, name: str) -> None:
        """It ends; nothing happens if it was not open."""
        begun = self._opened.pop(name, None)
        if begun is not None:
            (self._schedules if name == _SCHEDULE else self._busy).append((begun, self._mark()))

    def ends_with(self, finalize: Callable[..., None]) -> Callable[..., None]:
        """`finalize`, which reduces gradients within the schedule after its last pass: it ends the schedule first."""

        def wrapped(*args: Any, **kwargs: Any) -> None:
            self.close(_SCHEDULE)
            finalize(*args, **kwargs)

        return wrapped

    def take(self) -> tuple[float, float]:
        """Seconds within passes, and within schedules, since the last call; the device must have finished its queue."""
        found = _seconds(self._busy), _seconds(self._schedules)
        self._busy, self._schedules = [], []
        return found


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


def _seconds(pairs: list[tuple[Any, Any]]) -> float:
    return sum(float(end - begun if isinstance(begun, float) else begun.elapsed_time(end) / 1000) for begun, end in pairs)
