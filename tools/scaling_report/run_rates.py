"""A run folder in, its rates out: how fast it was, how evenly, how far it came, and why it ended.

Read from what every run leaves behind (event files, logs, config.json, STOP), finished or not. Each event file is one start of
the run: the first steps of each start are warm-up, and where starts overlap the later one counts. A point is the mean over the
steps since the point before it, and is weighted by them.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

STEP_SECONDS = "time/step_seconds"
SUMS = {"text_tokens_per_second": "throughput/text_tokens_per_second", "mfu": "compute/model_mfu",
        "bubble": "pipeline/bubble_fraction"}  # fmt: skip
"""Rates and shares: their mean over time."""
MEANS = {"data_wait_seconds": "time/data_wait_seconds"}
"""Seconds of a step: their mean over steps."""
LOG_RANKS = re.compile(r"\[0/(\d+)\] ")
LOG_STEP = re.compile(r"step (\d+)/(\d+) ")
LOG_START = re.compile(r"\d ranks? \(tensor ")
LOG_RECORD = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} \[")
FAILED = "this rank failed"
VERDICT = re.compile(r": (.*)(?:; shutting down this rank|: this rank ends too)$")


@dataclass(frozen=True, slots=True)
class Point:
    """The numbers of an interval."""

    step: int
    """Its last step."""
    num_steps: int
    values: dict[str, float]
    """By tag."""


@dataclass(kw_only=True)
class Run:
    """What is known of a run. None: its files do not say."""

    folder: Path
    num_gpus: int | None = None
    """Ranks: one a GPU, where there are any."""
    global_batch: int | None = None
    last_step: int = 0
    planned_steps: int | None = None
    state: str = "finished"
    """Or why it has not, as half a sentence."""
    measured_steps: int = 0
    """Behind the numbers that follow."""
    step_seconds: float | None = None
    """Median."""
    spread: tuple[float, float] | None = None
    """10th and 90th percentile of the step time."""
    means: dict[str, float] = field(default_factory=dict)
    """By key of SUMS and MEANS; one that was not written is not there."""
    settings: dict[str, Any] = field(default_factory=dict)
    """config.json."""
    notes: list[str] = field(default_factory=list)

    @property
    def per_gpu(self) -> float | None:
        """Text tokens a second and GPU."""
        total = self.means.get("text_tokens_per_second")
        return total / self.num_gpus if total and self.num_gpus else None


def read_run(folder: Path, warmup_steps: int, known: dict[str, Any] | None = None) -> Run:
    """Everything about one run. `known`: what its series.json says about it."""
    known = known or {}
    run = Run(folder=folder, global_batch=known.get("global_batch"), num_gpus=known.get("world_size"))
    if (folder / "config.json").is_file():
        run.settings = json.loads((folder / "config.json").read_text())
        train = run.settings["train"]
        run.global_batch = train[
            "global_batch_packs" if run.settings["data"]["pack_max_text_tokens"] else "global_batch_samples"
        ]
        run.planned_steps = train["steps"]
    log = folder / "log" / "rank-000.log"
    lines = log.read_text(errors="replace").splitlines() if log.is_file() else []
    sizes = list(dict.fromkeys(int(found[1]) for line in lines if (found := LOG_RANKS.search(line))))
    run.num_gpus = sizes[-1] if sizes else run.num_gpus
    starts = read_starts(folder, run.notes)
    if len(sizes) > 1 and starts:
        run.notes.append(f"was run on {', then '.join(map(str, sizes))} ranks: the last start alone is counted")
        starts = starts[-1:]
    run.last_step = max((points[-1].step for points in starts), default=0)
    totals = [int(found[2]) for line in lines if (found := LOG_STEP.search(line))]
    run.planned_steps = run.planned_steps or (totals[-1] if totals else None)
    measure(run, after_warmup(starts, warmup_steps), warmup_steps)
    run.state = state_of(run, lines, known)
    return run


def read_starts(folder: Path, notes: list[str]) -> list[list[Point]]:
    """The points of each start, in the order of starts."""
    starts = []
    for file in sorted((folder / "tensorboard").glob("events.out.tfevents.*")):
        events = EventAccumulator(str(file), size_guidance={"scalars": 0}, purge_orphaned_data=False)
        events.Reload()
        tags = set(events.Tags()["scalars"])
        if STEP_SECONDS not in tags:
            if not tags and file.stat().st_size > 1000:
                notes.append(f"{file.name} holds no scalars that can be read")
            continue
        wanted = tags & {STEP_SECONDS, *SUMS.values(), *MEANS.values()}
        values: dict[int, dict[str, float]] = {}
        for tag in wanted:
            for event in events.Scalars(tag):
                values.setdefault(event.step, {})[tag] = event.value
        steps = sorted(step for step in values if STEP_SECONDS in values[step])
        # A start writes a point for its first step alone.
        starts.append([Point(b, b - a, values[b]) for a, b in zip([steps[0] - 1, *steps], steps, strict=False)])
    return starts


def after_warmup(starts: Sequence[Sequence[Point]], warmup_steps: int) -> list[Point]:
    """The points that count, by step: no step of a start's warm-up in them, and none that a later start did again."""
    kept: dict[int, Point] = {}
    for points in starts:
        first = points[0].step
        kept = {step: point for step, point in kept.items() if step < first}
        kept |= {point.step: point for point in points if point.step - point.num_steps >= first + warmup_steps - 1}
    return [kept[step] for step in sorted(kept)]


def measure(run: Run, points: Sequence[Point], warmup_steps: int) -> None:
    """Fill in the run's numbers."""
    run.measured_steps = sum(point.num_steps for point in points)
    if not points:
        if run.last_step:
            run.notes.append(f"no interval of its {run.last_step} steps lies after the {warmup_steps} of warm-up")
        return
    counts = np.array([point.num_steps for point in points])
    seconds = np.array([point.values[STEP_SECONDS] for point in points])
    low, middle, high = np.percentile(np.repeat(seconds, counts), [10, 50, 90])
    run.step_seconds, run.spread = float(middle), (float(low), float(high))
    if counts.max() > 1:
        run.notes.append(
            f"step times are means over up to {counts.max()} steps (log.interval_steps), so their spread is larger"
        )
    for names, weights in ((SUMS, counts * seconds), (MEANS, counts)):
        for name, tag in names.items():
            there = np.array([tag in point.values for point in points])
            if there.any():
                values = np.array([point.values.get(tag, 0.0) for point in points])
                run.means[name] = float((values * weights)[there].sum() / weights[there].sum())


# ---- why it ended --------------------------------------------------------------------------------------------------


def state_of(run: Run, lines: Sequence[str], known: dict[str, Any]) -> str:
    """`finished`, or why not."""
    stop = run.folder / "STOP"
    if stop.is_file():
        return f"stopped on purpose: {' '.join(stop.read_text().split())}"
    if run.planned_steps and run.last_step >= run.planned_steps:
        return "finished"
    told, where = known.get("state"), f" at step {run.last_step} of {run.planned_steps or '?'}"
    failure = last_failure(run.folder)
    if told and told not in ("running", "submitted", "finished") and not (failure and told.startswith("failed")):
        return f"{told}{where}"
    if failure:
        return f"{failure}{where}"
    if not lines:
        return f"{told}, job {known['job']}" if "job" in known else told or "never began: it wrote no log"
    if (run.folder / "checkpoints" / f"step-{run.last_step:08d}").is_dir():
        return f"saved{where}, and not continued"
    age = time.time() - max(file.stat().st_mtime for file in (run.folder / "log").iterdir())
    return f"killed, or still running: no word for {age:.0f} s{where}"


def last_failure(folder: Path) -> str | None:
    """What ended the ranks of the last start, from their logs; None: no rank logged an error."""
    failed, silent = [], []
    for file in sorted((folder / "log").glob("rank-*.log")):
        lines = file.read_text(errors="replace").splitlines()
        lines = lines[max((number for number, line in enumerate(lines) if LOG_START.search(line)), default=0) :]
        if verdict := next((found[1] for line in lines if (found := VERDICT.search(line))), None):
            return f"killed: {verdict}" if " died" in verdict else f"failed: {verdict}"
        rank, error = int(file.stem.removeprefix("rank-")), logged_error(lines)
        if error is None:
            silent.append(rank)
        else:
            failed.append((error[0], rank, error[1]))
    if not failed:
        return None
    _, rank, words = min(failed)
    if silent:
        return f"killed: rank {_words(silent)} ended without a word (then rank {rank}: {words})"
    return f"failed: rank {rank}: {words}"


def logged_error(lines: Sequence[str]) -> tuple[str, str] | None:
    """When a rank failed, and the last line of its traceback."""
    at = max((number for number, line in enumerate(lines) if line.endswith(FAILED)), default=None)
    if at is None:
        return None
    words = ""
    for line in lines[at + 1 :]:
        if LOG_RECORD.match(line):
            break
        words = line if line.strip() and not line.startswith(" ") else words
    return lines[at][:23], " ".join(words.split())[:160]


def _words(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))
