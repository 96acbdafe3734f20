"""Goodput: where a run's wall time goes, by cause, over all its launches.

Flows in: what this launch is doing, and the journal of the launches before it; out: seconds by cause, which add up to the time
since the first launch. A launch is timed from the start of its process; the time between the last record of one and the start
of the next is recovery. Steps after the checkpoint that a later launch (or a rollback) resumed from are lost.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Literal, TypeVar

import psutil  # type: ignore[import-untyped]

from ..runtime.stop_signals import EXIT_STOPPED
from .journal import Event, Journal

logger = logging.getLogger(__name__)

Cause = Literal["start", "data", "step", "validation", "save", "recovery", "lost"]
CAUSES: tuple[Cause, ...] = ("start", "data", "step", "validation", "save", "recovery", "lost")
"""start: before the first step; data: waiting for the slowest rank's data; save: training blocked by a save; lost: steps
redone."""
_REDONE: tuple[Cause, ...] = ("data", "step", "validation")
_NOTE_SECONDS = 60.0

Seconds = dict[Cause, float]
Item = TypeVar("Item")


class Goodput:
    """The stopwatches of this launch; exactly one runs at any time."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._before: Seconds = dict.fromkeys(CAUSES, 0.0)
        self._seconds: Seconds = dict.fromkeys(CAUSES, 0.0)
        self._at_save: dict[int, Seconds] = {}
        self.began = process_began()
        self._cause: Cause = "start"
        # The wall clock once, to include what came before this line; from here on a monotonic one.
        self._since = time.perf_counter() - max(0.0, time.time() - self.began)
        self._noted_at = time.perf_counter()

    def count_past(self) -> None:
        """This launch is in the journal: count the time before it."""
        self._before = account(self._journal.events)

    def _switch(self, cause: Cause) -> None:
        """From now on time counts for this cause."""
        now = time.perf_counter()
        self._seconds[self._cause] += now - self._since
        self._cause, self._since = cause, now

    @contextmanager
    def doing(self, cause: Cause) -> Iterator[None]:
        """Within it time counts for this cause, afterwards for the earlier one."""
        before = self._cause
        self._switch(cause)
        try:
            yield
        finally:
            self._switch(before)

    def waiting(self, cause: Cause, items: Iterable[Item]) -> Iterator[Item]:
        """The same items; the time in which the next one is waited for is this cause's."""
        iterator, end = iter(items), object()
        while True:
            with self.doing(cause):
                item = next(iterator, end)
            if item is end:
                return
            yield item  # type: ignore[misc]

    def record_save(self, step: int, health: Event) -> None:
        """A checkpoint of this step is about to be written."""
        self._at_save[step] = dict(self._now())
        self._journal.record("save", step, seconds=self._rounded(), health=health)

    def record_rollback(self, step: int) -> None:
        """The run rolls back to the checkpoint of this step: the time since then is lost."""
        _lose(self._now(), self._at_save.get(step, dict.fromkeys(CAUSES, 0.0)))

    def record_alive(self, step: int) -> None:
        """Record the account once a minute, so that a kill loses little of it."""
        if time.perf_counter() - self._noted_at > _NOTE_SECONDS:
            self._noted_at = time.perf_counter()
            self._journal.record("alive", step, seconds=self._rounded())

    def record_end(self, step: int, code: int) -> None:
        """This launch is over."""
        self._journal.record("end", step, code=code, seconds=self._rounded())
        total = self.seconds()
        elapsed = sum(total.values())
        logger.info(
            "goodput %.1f %% of %.1f s: %s",
            100 * total["step"] / elapsed, elapsed, ", ".join(f"{cause} {total[cause]:.1f} s" for cause in CAUSES),
        )  # fmt: skip

    def seconds(self) -> Seconds:
        """By cause, since the first launch."""
        own = self._now()
        return {cause: self._before[cause] + own[cause] for cause in CAUSES}

    def points(self) -> dict[str, float]:
        """For TensorBoard."""
        total = self.seconds()
        points = {f"goodput/{cause}_seconds": total[cause] for cause in CAUSES}
        return points | {"goodput/step_fraction": total["step"] / max(sum(total.values()), 1e-9)}

    def _now(self) -> Seconds:
        self._switch(self._cause)
        return self._seconds

    def _rounded(self) -> dict[str, float]:
        return {cause: round(seconds, 3) for cause, seconds in self._now().items()}


def process_began() -> float:
    """When this process began, by the wall clock. The kernel tells the time of boot in whole seconds, so psutil's answer is up
    to one too early."""
    since_boot: float = psutil.Process().create_time() - psutil.boot_time()
    return time.time() - (time.clock_gettime(time.CLOCK_BOOTTIME) - since_boot)


def account(events: Sequence[Event]) -> Seconds:
    """Seconds by cause from the first launch to the start of the last one, which is the last of `events`."""
    total: Seconds = dict.fromkeys(CAUSES, 0.0)
    starts = [number for number, event in enumerate(events) if event["event"] == "start"]
    for first, following in pairwise(starts):
        noted = [event for event in events[first:following] if "seconds" in event]
        own: Seconds = dict.fromkeys(CAUSES, 0.0)
        ended = events[first]["began"]
        if noted:
            own |= noted[-1]["seconds"]
            ended += sum(own.values())
        kept: Seconds = dict.fromkeys(CAUSES, 0.0)
        for event in noted:
            if event["event"] == "save" and event["step"] == events[following]["step"]:
                kept |= event["seconds"]
        if events[following]["step"] < (noted[-1]["step"] if noted else 0):
            _lose(own, kept)
        if noted and noted[-1]["event"] == "end" and noted[-1]["code"] in (0, EXIT_STOPPED):
            ended = events[following]["began"]  # the run was over; continuing it later is not a recovery
        own["recovery"] += max(0.0, events[following]["began"] - ended)
        for cause in CAUSES:
            total[cause] += own[cause]
    return total


def _lose(seconds: Seconds, kept: Seconds) -> None:
    """Move the seconds after `kept` to `lost`."""
    for cause in _REDONE:
        seconds["lost"] += seconds[cause] - kept[cause]
        seconds[cause] = kept[cause]
