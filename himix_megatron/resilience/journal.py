"""The run's journal: what happened to a run over all its starts, one JSON line an event, in RUN/journal.jsonl.

Flows in: starts, saves, rollbacks, ends, each with the step and the time; out: what a later start must know: whether starting
helps at all, how the loss was doing at a checkpoint, which batches a rollback left out, where the time went. Every rank reads
it, rank 0 writes it, a line at a time and synced; a line that a kill cut short is passed over.
"""

from __future__ import annotations

import json
import logging
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ..config import Config, RunConfig, to_json
from ..data.loading.plan import DataPosition
from ..data.shards.shard_format import hash_of
from ..runtime.durable_files import append_synced

logger = logging.getLogger(__name__)

Event = dict[str, Any]


class Journal:
    """The events so far, and those of this start."""

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / "journal.jsonl"
        self.events = _read(self.path)
        self._writes = self._is_torn = False

    def open(self, *, writes: bool) -> None:
        """Ranks have met, so all have read: from now on one of them `writes`."""
        self._writes = writes
        # Else the last writer was killed within a line.
        self._is_torn = writes and self.path.is_file() and not self.path.read_bytes().endswith(b"\n")

    def record(self, event: str, step: int, **facts: Any) -> None:
        """Something happened after `step` steps. All ranks call it alike, with what all know."""
        noted = {"event": event, "time": round(time.time(), 3), "step": step} | facts
        self.events.append(noted)
        if self._writes:
            self._append(json.dumps(noted) + "\n")

    def _append(self, text: str) -> None:
        """A full disk costs the line, not the run."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            append_synced(self.path, "\n" * self._is_torn + text)
            self._is_torn = False
        except OSError as error:
            self._is_torn = True
            logger.warning("%s misses a line: %s", self.path, error)

    def starts_without_progress(self, step: int, settings: str) -> int:
        """How many of the last starts in a row began at this saved step with these settings. One that went on after a stop on
        purpose begins the count anew."""
        count = 0
        for event in reversed(self.events):
            if event["event"] == "start":
                if event["step"] != step or event["settings"] != settings:
                    break
                count += 1
                if event["after_stop"]:
                    break
        return count

    def rollback_data_offsets(self) -> dict[int, DataPosition]:
        """Where rollbacks made the data go on: after so many steps, at which place. One that went further back than those
        before it has left them behind."""
        found: dict[int, DataPosition] = {}
        for event in self.events:
            if event["event"] == "rollback":
                found = {step: place for step, place in found.items() if step < event["step"]}
                found[event["step"]] = DataPosition(**event["place"])
        return found

    @property
    def num_rollbacks(self) -> int:
        """In the whole run."""
        return sum(event["event"] == "rollback" for event in self.events)

    def record_rollback(self, step: int, place: DataPosition, reason: str) -> None:
        """The run goes back to `step`, and on from there at `place`."""
        self.record("rollback", step, place=asdict(place), reason=reason)

    def loss_guard_state_at(self, step: int) -> Event:
        """`Health.state` as it was noted with the newest save of that step; empty where there is none."""
        saves = (event for event in reversed(self.events) if event["event"] == "save" and event["step"] == step)
        return next((event["health"] for event in saves), {})


def settings_of(config: Config) -> str:
    """A fingerprint of everything that a user chose, but for where the run is."""
    return hash_of(json.loads(to_json(replace(config, run=RunConfig()))))[:16]


def _read(path: Path) -> list[Event]:
    if not path.is_file():
        return []
    events = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            events.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return events
