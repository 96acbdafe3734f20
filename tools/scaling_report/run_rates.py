"""A run folder in, its rates out: how fast it was, how evenly, how far it came, and why it ended.

Read from config.json, status.json and the event files of a run, finished or not. Each event file is one launch: the first
steps of each launch are warm-up, and where launches overlap the later one counts. A point is the mean over the steps since
the point before it, and is weighted by them. Runs of versions that wrote no status.json are read as far as the other files
tell.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from himix_megatron.config import Config, read_config
from himix_megatron.monitoring.run_status import RunStatus, read_status, status_path

STEP_SECONDS = "time/step_seconds"
SUMS = {"text_tokens_per_second": "throughput/text_tokens_per_second", "mfu": "compute/model_mfu",
        "bubble": "pipeline/bubble_fraction"}  # fmt: skip
"""Rates and shares: their mean over time."""
MEANS = {"data_wait_seconds": "time/data_wait_seconds"}
"""Seconds of a step: their mean over steps."""
TEXT_RATE = SUMS["text_tokens_per_second"]
PER_RANK = (f"{TEXT_RATE}_per_rank", f"{TEXT_RATE}_per_gpu")
"""The rate of one rank; the second is the tag of earlier versions. The total over it is the number of ranks."""


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
    config: Config | None = None
    """Of config.json."""
    notes: list[str] = field(default_factory=list)

    @property
    def per_gpu(self) -> float | None:
        """Text tokens a second and GPU."""
        total = self.means.get("text_tokens_per_second")
        return total / self.num_gpus if total and self.num_gpus else None


def read_run(folder: Path, warmup_steps: int, known: dict[str, Any] | None = None) -> Run:
    """Everything about one run. `known`: what its series.json says about it."""
    known, status = known or {}, None
    run = Run(folder=folder, global_batch=known.get("global_batch"), num_gpus=known.get("world_size"))
    try:
        status = read_status(folder)
    except ValueError as error:
        run.notes.append(str(error))
    if (folder / "config.json").is_file():
        run.config = read_config(folder / "config.json")
        run.global_batch, run.planned_steps = run.config.global_batch, run.config.train.steps
    if status is not None:
        run.num_gpus, run.planned_steps = status.world_size, status.planned_steps
    starts = read_starts(folder, run.notes)
    sizes = [size for points in starts if (size := ranks_of(points))]
    run.num_gpus = sizes[-1] if sizes else run.num_gpus
    if len(set(sizes)) > 1:
        run.notes.append(f"was run on {', then '.join(map(str, dict.fromkeys(sizes)))} ranks: the last start alone is counted")
        starts = starts[-1:]
    run.last_step = max((points[-1].step for points in starts), default=0)
    measure(run, after_warmup(starts, warmup_steps), warmup_steps)
    run.state = state_of(run, status, known)
    return run


def ranks_of(points: Sequence[Point]) -> int | None:
    """The number of ranks of a launch: the rate of all over the rate of one."""
    for point in points:
        for tag in PER_RANK:
            if point.values.get(tag):
                return round(point.values.get(TEXT_RATE, 0.0) / point.values[tag]) or None
    return None


def read_starts(folder: Path, notes: list[str]) -> list[list[Point]]:
    """The points of each launch, in their order."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # imports a second of other packages

    starts = []
    for file in sorted((folder / "tensorboard").glob("events.out.tfevents.*")):
        events = EventAccumulator(str(file), size_guidance={"scalars": 0}, purge_orphaned_data=False)
        events.Reload()
        tags = set(events.Tags()["scalars"])
        if STEP_SECONDS not in tags:
            if not tags and file.stat().st_size > 1000:
                notes.append(f"{file.name} holds no scalars that can be read")
            continue
        wanted = tags & {STEP_SECONDS, *PER_RANK, *SUMS.values(), *MEANS.values()}
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


def state_of(run: Run, status: RunStatus | None, known: dict[str, Any]) -> str:
    """`finished`, or why not."""
    stop = run.folder / "STOP"
    if stop.is_file():
        return f"stopped on purpose: {' '.join(stop.read_text().split())}"
    if run.planned_steps and run.last_step >= run.planned_steps:
        return "finished"
    outcome, where = known.get("state"), f" at step {run.last_step} of {run.planned_steps or '?'}"
    has_failed = status is not None and status.state == "failed"
    if outcome and outcome not in ("running", "submitted", "finished") and not (has_failed and outcome.startswith("failed")):
        return f"{outcome}{where}"
    no_status = "no status.json" if not status_path(run.folder).is_file() else "no status.json that can be read"
    if status is None and not run.last_step:
        return f"{outcome}, job {known['job']}" if "job" in known else outcome or f"never began: it wrote {no_status}"
    if (run.folder / "checkpoints" / f"step-{run.last_step:08d}").is_dir() and not has_failed:
        return f"saved{where}, and not continued"
    if status is None:
        return f"not finished, and it has {no_status} that says why{where}"
    if has_failed:
        return f"failed: {status.reason}{where}"
    return f"killed, or still running: status.json is {time.time() - status.updated_at:.0f} s old{where}"
