"""One start of a run: who may stop it, who watches it, where its time goes, and whether starting it helps at all.

Flows in: the command's settings and the run's journal; out: what the loop needs besides the model and the data.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..checkpoint.checkpointer import Position, check_architecture, position_of
from ..config import Config
from ..distributed.launch import Launch
from ..monitoring.run_status import RunStatus, RunStatusWriter
from ..resilience.goodput import Goodput
from ..resilience.journal import Journal, settings_of
from ..resilience.watchdog import Watchdog
from ..runtime.stop_signals import StopRequest
from .resume import RunInputs, stop_file


@dataclass(frozen=True, slots=True)
class RunContext:
    """What belongs to this start of the run."""

    request: StopRequest
    watchdog: Watchdog
    journal: Journal
    goodput: Goodput
    status: RunStatusWriter


def saved_position(config: Config, start: RunInputs) -> Position | None:
    """Where the run stands before this start; None: nothing of it is saved."""
    if not start.continues or start.checkpoint is None:
        return None
    return position_of(check_architecture(start.checkpoint, config))


def refuse_crash_loop(config: Config, start: RunInputs, journal: Journal) -> str | None:
    """Why another start would not help by itself; None: it may."""
    saved = saved_position(config, start)
    if saved is not None and start.end.reached(saved.step, saved.place):
        return None
    step = saved.step if saved else 0
    fruitless = journal.starts_without_progress(step, settings_of(config))
    if fruitless < config.health.max_starts_without_progress or stop_file(config).is_file():
        return None
    return (
        f"{fruitless} starts in a row have saved no step beyond {step} (health.max_starts_without_progress): RUN/log tells why "
        "each of them ended"
    )


def status_writer(config: Config, start: RunInputs, started_at: float, launch: Launch) -> RunStatusWriter:
    """Of this launch, which has not yet written anything."""
    saved = saved_position(config, start)
    status = RunStatus(
        recipe=config.recipe,
        state="starting",
        step=saved.step if saved else 0,
        planned_steps=start.plan.expected_steps(start.end),
        world_size=launch.world_size,
        global_batch=config.global_batch,
        started_at=round(started_at, 3),
        updated_at=round(started_at, 3),
    )
    return RunStatusWriter(config.run_dir, status, writes=launch.rank == 0)


def record_start(
    config: Config, start: RunInputs, journal: Journal, watchdog: Watchdog, request: StopRequest, status: RunStatusWriter
) -> RunContext:
    """Ranks have met: write down that the run is started."""
    saved = saved_position(config, start)
    goodput = Goodput(journal)
    journal.open(writes=watchdog.rank == 0)
    journal.record(
        "start",
        saved.step if saved else 0,
        began=round(goodput.began, 3),
        settings=settings_of(config),
        after_stop=stop_file(config).is_file(),
    )
    goodput.count_past()
    return RunContext(request, watchdog, journal, goodput, status)
