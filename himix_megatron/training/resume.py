"""Where a launch continues: the checkpoint it starts from, its lock on the run folder, and whether starting helps at all.

Flows in: Config and RunInputs; out: a `ResumePoint`, then a Position. The run folder stays as it is until the launch is known
to be able to start.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch

from ..checkpoint.checkpointer import Checkpoints
from ..checkpoint.description import Description, Position, check_architecture, position_of
from ..checkpoint.frozen_tower import tower_hash
from ..checkpoint.manifest import LATEST, complete_checkpoints, first_intact, latest_intact, quarantine, resolve_checkpoints
from ..checkpoint.run_lock import RunLock, acquire_on_all_ranks
from ..config import Config, differences, in_vision_tokens, to_json
from ..data.loading.plan import START, SamplingPlan, TrainingLength
from ..data.loading.webdataset_stream import Stream
from ..distributed.control_group import ControlGroup
from ..distributed.launch import Launch
from ..distributed.topology import Topology
from ..monitoring.run_status import RunStatus, RunStatusWriter
from ..resilience.goodput import Goodput
from ..resilience.journal import Journal, settings_of
from ..resilience.watchdog import Watchdog
from ..runtime import log
from ..runtime.durable_files import publish
from ..runtime.failpoints import failpoint
from ..runtime.stop_signals import StopRequest
from .data_setup import RunInputs, stop_file

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StartCheckpoint:
    """The checkpoint that a launch starts from."""

    folder: Path
    description: Description
    is_own: bool
    """It is the run's own: the run continues at its position with its optimizer. Otherwise only the weights are taken."""

    @property
    def position(self) -> Position | None:
        """Where the run continues; None if it starts at its first step."""
        return position_of(self.description) if self.is_own else None


@dataclass(frozen=True, slots=True)
class ResumePoint:
    """What the ranks of a launch share once they have met."""

    ranks: ControlGroup
    """The group of everything about checkpoints."""
    run_lock: RunLock
    """The right to write into the run folder."""
    checkpoint: StartCheckpoint | None
    """None: the weights are fresh."""


@dataclass(frozen=True, slots=True)
class RunContext:
    """What belongs to this launch of the run, beside the model and the data."""

    request: StopRequest
    watchdog: Watchdog
    journal: Journal
    goodput: Goodput
    status: RunStatusWriter


# ---- which checkpoint ----------------------------------------------------------------------------------------------


def _candidates(config: Config) -> tuple[bool, list[Path]]:
    """Whether the run has checkpoints of its own; the checkpoints that it may start from, best first.

    Raises: ValueError if `checkpoint.init_from` holds none.
    """
    own, initial = complete_checkpoints(config.run_dir)[::-1], config.checkpoint.init_from
    return bool(own), own if own or initial is None else resolve_checkpoints(initial)


def expected_checkpoint(config: Config, plan: SamplingPlan | Stream) -> StartCheckpoint | None:
    """The checkpoint to start from, as far as one rank sees without reading all of it.

    Raises: ValueError if none is intact, or it does not fit the configuration.
    """
    is_own, folders = _candidates(config)
    return _checked(config, plan, first_intact(folders), is_own=is_own) if folders else None


def select_checkpoint(config: Config, plan: SamplingPlan | Stream, ranks: ControlGroup) -> StartCheckpoint | None:
    """Verify every byte of the checkpoint to start from; fall back to the newest intact one.

    All ranks call it, with the run folder locked. Raises: ValueError that lists what is wrong with each, if none is intact.
    """
    is_own, folders = ranks.on_rank_zero(lambda: _candidates(config))
    if not folders:
        return None
    folder = latest_intact(folders, ranks)
    checkpoint = _checked(config, plan, folder, is_own=is_own)
    if is_own:
        ranks.on_rank_zero(lambda: quarantine(folders[: folders.index(folder)]))
    latest = config.run_dir / "checkpoints" / LATEST
    named = latest.read_text(errors="replace").strip() if latest.is_file() else folder.name
    if is_own and ranks.rank == 0 and named != folder.name:
        logger.warning("%s names %s, but the newest intact checkpoint is %s", latest, named, folder)
    return checkpoint


def _checked(config: Config, plan: SamplingPlan | Stream, folder: Path, *, is_own: bool) -> StartCheckpoint:
    """Raises: ValueError for another architecture; for a run's own checkpoint also if other parts train, the optimizer is of
    the other kind, or the data would come in another order."""
    description = check_architecture(folder, config)
    if is_own:
        _check_continues(config, plan, folder, description)
    return StartCheckpoint(folder, description, is_own)


def _check_continues(config: Config, plan: SamplingPlan | Stream, folder: Path, description: Description) -> None:
    if set(description.parts) != set(config.train.trainable_parts):
        raise ValueError(
            f"checkpoint {folder} trained {' '.join(description.parts)}, but train.trainable_parts is "
            f"{' '.join(config.train.trainable_parts)}: continue with the same parts, or start a new --run.dir from it "
            "with --checkpoint.init-from"
        )
    if description.distributed_optimizer != config.parallel.distributed_optimizer:
        raise ValueError(
            f"checkpoint {folder} holds the state of "
            f"{'a distributed' if description.distributed_optimizer else 'an undivided'} optimizer, which is stored in "
            "another form: continue with --parallel.distributed-optimizer as it was"
        )
    position, fixed = position_of(description), plan.fingerprint_fields()
    stored = in_vision_tokens(position.data, config.vision.max_tokens_per_image)
    for field in stored | fixed:
        old, new = stored.get(field), fixed.get(field)
        if field == "data.tokenizer" and new == f"2-{old}":
            _check_control_tokens(config)
        elif old != new:
            raise ValueError(
                f"cannot resume {config.run_dir} (step {position.step}): {field} changed from {old} to {new}, which changes "
                "the data order. Restore it or use a new --run.dir"
            )


def _check_control_tokens(config: Config) -> None:
    """A run begun when names of control tokens in texts were control tokens. Raises: ValueError if they decide its order."""
    if config.data.packs or config.data.overlong == "drop":
        raise ValueError(
            f"cannot resume {config.run_dir}: names of control tokens in texts are text now, which can change lengths and so "
            "which samples are in which step. End it with the version that began it, or start a new --run.dir from it with "
            "--checkpoint.init-from"
        )
    logger.warning("names of control tokens in texts are text from now on; which samples are in which step stays the same")


# ---- starting ------------------------------------------------------------------------------------------------------


def status_writer(
    config: Config, inputs: RunInputs, checkpoint: StartCheckpoint | None, launch: Launch, started_at: float
) -> RunStatusWriter:
    """The status of this launch, before anything of it is written."""
    status = RunStatus(
        recipe=config.recipe,
        state="starting",
        step=_saved_step(checkpoint),
        planned_steps=inputs.planned_steps,
        world_size=launch.world_size,
        global_batch=config.global_batch,
        started_at=round(started_at, 3),
        updated_at=round(started_at, 3),
    )
    return RunStatusWriter(config.run_dir, status, writes=launch.rank == 0)


def refuse_crash_loop(
    config: Config, checkpoint: StartCheckpoint | None, length: TrainingLength, journal: Journal
) -> str | None:
    """Why another launch would not help; None if it may."""
    saved = checkpoint.position if checkpoint else None
    if saved is not None and length.reached(saved.step, saved.place):
        return None
    step = _saved_step(checkpoint)
    launches = journal.starts_without_progress(step, settings_of(config))
    if launches < config.health.max_starts_without_progress or stop_file(config).is_file():
        return None
    return (
        f"{launches} consecutive launches made no progress past step {step} (health.max_starts_without_progress); see RUN/log "
        "for the reason of each"
    )


def _saved_step(checkpoint: StartCheckpoint | None) -> int:
    saved = checkpoint.position if checkpoint else None
    return saved.step if saved else 0


def lock_run_dir(config: Config, plan: SamplingPlan | Stream, topology: Topology) -> ResumePoint:
    """Make this launch the only one that writes into the run folder, start the log there, and select the checkpoint to start
    from; all ranks call it.

    Raises: ValueError while another launch holds the lock, if the folder cannot be written, or as `select_checkpoint`.
    """
    ranks = ControlGroup(config.checkpoint.group_timeout_seconds)
    run_lock = acquire_on_all_ranks(config.run_dir, ranks)
    log.start(config.run_dir, topology.rank, topology.world_size)
    return ResumePoint(ranks, run_lock, select_checkpoint(config, plan, ranks))


def record_start(
    config: Config,
    checkpoint: StartCheckpoint | None,
    journal: Journal,
    watchdog: Watchdog,
    request: StopRequest,
    status: RunStatusWriter,
) -> RunContext:
    """Write down that the run is launched; ranks have met."""
    goodput = Goodput(journal)
    journal.open(writes=watchdog.rank == 0)
    journal.record(
        "start",
        _saved_step(checkpoint),
        began=round(goodput.began, 3),
        settings=settings_of(config),
        after_stop=stop_file(config).is_file(),
    )
    goodput.count_past()
    status.record_state("starting")
    return RunContext(request, watchdog, journal, goodput, status)


def restore_or_initialize(
    config: Config, inputs: RunInputs, checkpoint: StartCheckpoint | None, checkpoints: Checkpoints
) -> Position:
    """Continue the run, or load the weights that it starts from; then write RUN/config.json. All ranks call it.

    Returns: where the run continues.
    """
    position = Position(step=0, place=START, data=inputs.plan.fingerprint_fields())
    failpoint("start/restore")
    if checkpoint is None:
        if "language" not in config.train.trainable_parts:
            logger.warning("the language model is fresh and frozen: give pretrained weights with --checkpoint.init-from")
    elif checkpoint.is_own:
        position = checkpoints.restore(checkpoint.folder, verified=True)
        for name, old, new in differences(inputs.previous, config) if inputs.previous else []:
            logger.warning("%s changed from %s to %s", name, old, new)
        if inputs.length.reached(position.step, position.place):
            logger.info("nothing to do: %s has ended with step %d", config.run_dir, position.step)
    else:
        checkpoints.load_weights(checkpoint.folder, verified=True)
    failpoint("start/restored")
    check_tower(inputs, checkpoints)
    if torch.distributed.get_rank() == 0:
        publish(config.run_dir / "config.json", to_json(config).encode())
        stop_file(config).unlink(missing_ok=True)
    return position


def check_tower(inputs: RunInputs, checkpoints: Checkpoints) -> None:
    """Raises: ValueError if the features were made by a tower with other weights than the run's."""
    caches = (*inputs.features, *inputs.held_out_features)
    if caches:
        assert checkpoints.frozen_tower is not None
        tower = tower_hash(checkpoints.frozen_tower.state_dict())
        for cache in caches:
            cache.check({"tower": tower})
