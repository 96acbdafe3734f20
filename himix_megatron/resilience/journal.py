"""The journal: what happened to a run over all its launches, one JSON line per event, in RUN/journal.jsonl.

Flows in: launches, saves, rollbacks, ends, each with the step and the time; out: what a later launch needs: whether launches
make progress, the loss guard's state at a checkpoint, which batches a rollback skipped, where the time went. Every rank reads
it, rank 0 writes it, line by line and synced; a line that is damaged, by a kill for one, is passed over with a warning.
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
from ..runtime import typed_json
from ..runtime.durable_files import append_synced
from ..runtime.untrusted_files import read_regular

logger = logging.getLogger(__name__)

Event = dict[str, Any]
_FACTS: dict[str, dict[str, Any]] = {
    "start": {"began": float, "settings": str, "after_stop": bool},
    "save": {"health": dict[str, list[float]]},
    "rollback": {"place": DataPosition},
    "end": {"code": int},
}
"""What a later launch reads of an event, and of all `step`."""


class Journal:
    """The events of earlier launches, and those of this one."""

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / "journal.jsonl"
        self.events = _read(self.path)
        self._writes = self._is_torn = False

    def open(self, *, writes: bool) -> None:
        """The ranks have met, so all have read the file: from now on one of them `writes`."""
        self._writes = writes
        # The last writer may have been killed within a line.
        self._is_torn = writes and self.path.is_file() and not self.path.read_bytes().endswith(b"\n")

    def record(self, event: str, step: int, **facts: Any) -> None:
        """Record an event after `step` steps. All ranks make the same call."""
        noted = {"event": event, "time": round(time.time(), 3), "step": step} | facts
        self.events.append(noted)
        if self._writes:
            self._append(json.dumps(noted) + "\n")

    def _append(self, text: str) -> None:
        """A full disk loses the line, not the run."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            append_synced(self.path, "\n" * self._is_torn + text)
            self._is_torn = False
        except OSError as error:
            self._is_torn = True
            logger.warning("%s: a line could not be written: %s", self.path, error)

    def starts_without_progress(self, step: int, settings: str) -> int:
        """How many of the last launches in a row began at this saved step with these settings. A launch that ignored the stop
        file restarts the count."""
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
        """Data position after a rollback, by the step it went back to. A rollback cancels earlier ones to the same step or a
        later one."""
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
        """The run rolls back to `step` and continues with the data at `place`."""
        self.record("rollback", step, place=asdict(place), reason=reason)

    def loss_guard_state_at(self, step: int) -> Event:
        """`LossGuard.state` as recorded with the newest save of that step; empty where there is none."""
        saves = (event for event in reversed(self.events) if event["event"] == "save" and event["step"] == step)
        return next((event["health"] for event in saves), {})


def settings_of(config: Config) -> str:
    """A fingerprint of all settings except those of the run folder."""
    return hash_of(json.loads(to_json(replace(config, run=RunConfig()))))[:16]


def _read(path: Path) -> list[Event]:
    events, wrong = [], []
    try:
        lines = read_regular(path, typed_json.MAX_FILE_BYTES).splitlines() if path.exists() else []
    except (OSError, ValueError) as error:
        lines, wrong = [], [error]
    for number, line in enumerate(lines, 1):
        try:
            events.append(_event(line, f"line {number}"))
        except ValueError as error:
            wrong.append(error)
    if wrong:  # of a kill, or a disk: what it tells is not worth the run
        logger.warning("%s: passed over %d lines: %s", path, len(wrong), wrong[0])
    return events


def _event(line: bytes, where: str) -> Event:
    """The event in a line. Raises: ValueError for one without its facts."""
    event = typed_json.parse_object(line, where)
    seconds = {"seconds": dict[str, float]} if "seconds" in event else {}
    for name, hint in ({"event": str, "step": int} | seconds | _FACTS.get(str(event.get("event")), {})).items():
        typed_json.as_type(hint, event.get(name), where, name)
    return event
