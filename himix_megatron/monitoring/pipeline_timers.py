"""How long a pipeline stage computes, and how long it waits for others: megatron-core's schedules tell when.

Flows in: the schedule's calls at the beginning and end of each forward and backward pass of a micro-batch; out: seconds within
them, and seconds from the schedule's beginning to the end of its last pass. What lies between passes is the bubble: waiting for
other stages. On a GPU the times are the device's own (events), so queued work counts where it runs.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

_PASSES = ("forward-compute", "backward-compute")
_SCHEDULE = "forward-backward"


class ScheduleTimers:
    """Stands where megatron-core's schedules look for their timers (`config.timers`)."""

    def __init__(self, device: torch.device):
        self._mark = _event if device.type == "cuda" else time.perf_counter
        self._busy: list[tuple[Any, Any]] = []
        self._schedules: list[tuple[Any, Any]] = []
        self._opened: dict[str, Any] = {}

    def __call__(self, name: str, log_level: int | None = None) -> _Timer:
        """The timer of that name, as the schedules ask for it."""
        return _Timer(self, name)

    def open(self, name: str) -> None:
        """A pass, or the schedule, begins."""
        if name in _PASSES or name == _SCHEDULE:
            self._opened[name] = self._mark()

    def close(self, name: str) -> None:
        """It ends; ending what is not open is nothing."""
        begun = self._opened.pop(name, None)
        if begun is not None:
            (self._schedules if name == _SCHEDULE else self._busy).append((begun, self._mark()))

    def ends_with(self, finalize: Callable[..., None]) -> Callable[..., None]:
        """`finalize` (the sum of gradients over ranks, within the schedule), before which the last pass has ended."""

        def wrapped(*args: Any, **kwargs: Any) -> None:
            self.close(_SCHEDULE)
            finalize(*args, **kwargs)

        return wrapped

    def take(self) -> tuple[float, float]:
        """Seconds within passes, and within schedules, since the last call; what was queued on the device must be done."""
        found = _seconds(self._busy), _seconds(self._schedules)
        self._busy, self._schedules = [], []
        return found


class _Timer:
    """One of megatron-core's named timers."""

    def __init__(self, clock: ScheduleTimers, name: str):
        self._clock, self._name = clock, name

    def start(self, barrier: bool = False) -> None:
        self._clock.open(self._name)

    def stop(self, barrier: bool = False) -> None:
        self._clock.close(self._name)


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


def _seconds(pairs: list[tuple[Any, Any]]) -> float:
    return sum(float(end - begun if isinstance(begun, float) else begun.elapsed_time(end) / 1000) for begun, end in pairs)
