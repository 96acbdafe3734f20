"""Training: from a configuration to a trained run folder, at any layout of ranks.

`pretrain` reads as the list of what happens; `train_loop` is the loop. One step: read this rank's texts and image share, encode
the share and gather the replica's features, run megatron-core's schedule over the micro-batches, clip, update, report, and now
and then save.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, replace

from ..checkpoint.checkpointer import Position
from ..config import Config, check_ranks
from ..data.loading.plan import DataPosition
from ..distributed.launch import check_launch
from ..distributed.topology import init_distributed
from ..monitoring.metrics import Metrics
from ..monitoring.profiler import profiled
from ..monitoring.run_status import RunStatusWriter
from ..monitoring.sample_ledger import Ledger
from ..monitoring.sample_predictions import SamplePredictions
from ..resilience import out_of_memory
from ..resilience.bad_samples import BadSampleBudget
from ..resilience.journal import Journal
from ..resilience.loss_guard import LossGuard
from ..resilience.replica_check import check_replica_weights
from ..resilience.watchdog import Watchdog
from ..runtime import failpoints, log
from ..runtime.durable_files import publish
from ..runtime.failpoints import failpoint
from ..runtime.stop_signals import EXIT_REQUEUE, EXIT_STOPPED, StopRequest, exit_now
from .builder import TrainingComponents, batches_from, build_components, describe
from .optimizer import Schedule, apply_settings
from .resume import RunInputs, lock_run_dir, prepare_inputs, restore_or_initialize, select_checkpoint, stop_file
from .startup import RunContext, record_start, refuse_crash_loop, status_writer
from .train_step import synced_batches, train_step
from .validation import Validation

logger = logging.getLogger(__name__)


def pretrain(config: Config, request: StopRequest | None = None) -> int:
    """Train one run to its last step, or continue it. `request`: where it has been listened for longer already.

    Returns: 0 at the last step; 85 (`EXIT_REQUEUE`) after a stop request, saved; 3 (`EXIT_STOPPED`) if it gave up on
    purpose, with the reason in RUN/STOP. Raises: ValueError for a user's mistake, before ranks meet.
    """
    started_at, request = time.time(), request or StopRequest()
    launch = check_launch(config)
    failpoints.schedule_faults(config.run.fault_injection, launch.rank)
    start = prepare_inputs(config, check_ranks(config, launch.world_size))
    journal = Journal(config.run_dir)
    if reason := refuse_crash_loop(config, start, journal):
        request.ignore_signals()
        return stop_run(config, reason, status_writer(config, start, started_at, launch))
    topology = init_distributed(config.parallel, seed=config.train.seed, launch=launch)
    start = lock_run_dir(config, start)
    log.start(config.run_dir, topology.rank, topology.world_size)
    start = select_checkpoint(config, start)
    watchdog = Watchdog.over(config, topology, launch.host, request)
    status = status_writer(config, start, started_at, launch)
    with log.failures(), status.failures(), watchdog, out_of_memory.explained(config):
        context = record_start(config, start, journal, watchdog, request, status)
        status.record_state("starting")
        failpoint("start/load", progress=True)
        run = build_components(config, start, topology)
        describe(config, start, run)
        run.checkpoints.check_disk_space()
        position = restore_or_initialize(config, start, run.checkpoints)
        apply_settings(config, run.optimizer)
        code = train_with_rollbacks(config, start, run, position, context)
        run.checkpoints.close()
        if code != EXIT_STOPPED:
            status.record_end(code)
    if not run.prefetcher.drain(seconds=2):
        exit_now(code)  # a read or a peer of the next step is stuck, and nobody needs that step
    return code


def train_with_rollbacks(
    config: Config, start: RunInputs, run: TrainingComponents, position: Position, context: RunContext
) -> int:
    """From a position to the last step; each rollback begins anew from an earlier position. Returns: the exit code."""
    context.watchdog.begin_steps()
    context.status.record_state("training", step=position.step)
    while not isinstance(end := train_loop(config, start, run, position, context), int):
        position = roll_back(config, run, context, end)
    return end


@dataclass(frozen=True, slots=True)
class Rollback:
    """The loop ended at a spike."""

    place: DataPosition
    """Where the data goes on behind it."""
    reason: str


def train_loop(
    config: Config, start: RunInputs, run: TrainingComponents, position: Position, context: RunContext
) -> int | Rollback:
    """From a position to the last step, a stop or a rollback. Returns: the exit code, or what to roll back."""
    request, goodput, journal = context.request, context.goodput, context.journal
    rollback_data_offsets = journal.rollback_data_offsets()
    schedule = Schedule(config, run.optimizer)
    metrics = Metrics(config, start, run, position.step, context.status)
    pictures = SamplePredictions(config, start, run)
    ledger = Ledger(config, start.plan.sources, run.topology)
    validation = Validation(config, start, run, context)
    tolerance = BadSampleBudget(config)
    health = LossGuard(config.health, journal.loss_guard_state_at(position.step), num_rollbacks=journal.num_rollbacks)
    policy = CheckpointPolicy(config, run, context, health, metrics, position.step)
    end: int | Rollback = 0
    goodput.switch("data")
    for batch, images in synced_batches(
        run, batches_from(config, start, run.topology, position, rollback_data_offsets), request
    ):
        metrics.data_ready(batch)
        goodput.switch("step")
        failpoints.begin_step(position.step + 1)
        failpoint("step/begin", progress=True)
        position = replace(position, place=rollback_data_offsets.get(position.step, position.place))
        learning_rate = schedule.set(start.end.progress(position.step, position.place))
        health.begin_step(
            position.step + 1, can_roll_back=policy.can_go_back and not start.end.reached(policy.step, batch.after)
        )
        with profiled(config, run.topology, position.step + 1):
            counts, grad_norm, decision = train_step(config, run, batch, images, health.check)
        if decision.action == "rollback":
            end = Rollback(batch.after, decision.reason)
            break
        position = replace(position, step=position.step + 1, place=batch.after)
        context.status.record_step(position.step, counts.loss)
        if metrics.step_done(position.step, counts, learning_rate, grad_norm, last=batch.is_last):
            metrics.add(position.step, goodput.points() | health.points())
            goodput.record_alive(position.step)
        ledger.record(position.step, batch, counts.loss, grad_norm)
        run.checkpoints.poll()
        reason = decision.stop_reason or tolerance.exceeded(counts, batch.num_samples)
        if not reason:
            with goodput.doing("validation"):
                loss = validation.measure(position.step, last=batch.is_last)
            if loss is not None:
                metrics.validation(position.step, loss)
            with goodput.doing("validation"):
                metrics.pictures(position.step, pictures.maybe_predict(position.step, last=batch.is_last))
            reason = policy.maybe_save(position, loss, due=batch.is_last or validation.is_best(loss))
        if reason:
            end = stop_run(config, reason, context.status)
            break
        metrics.resume_clock()
        failpoint("step/end", progress=True)
        context.watchdog.heartbeat("waiting for data")
        goodput.switch("data")
        if batch.is_last or request.is_agreed:
            break
    if request.is_agreed and end != EXIT_STOPPED:
        reason = policy.save_before_exit(position)
        end = stop_run(config, reason, context.status) if reason else EXIT_REQUEUE
    with goodput.doing("save"):
        if isinstance(end, Rollback) or end == EXIT_STOPPED:
            run.checkpoints.wait()  # there is an older one to go back to, or to go on from
        else:
            run.checkpoints.finish()
    if end == EXIT_REQUEUE:
        logger.info("stop requested (%s): step %d is saved", request.received, policy.step)
    metrics.close()
    ledger.close()
    if isinstance(end, int):
        goodput.record_end(position.step, end)
    return end


def roll_back(config: Config, run: TrainingComponents, context: RunContext, spike: Rollback) -> Position:
    """Go back to the newest checkpoint, and on from there behind the spike. Returns: the position there."""
    logger.warning("%s: going back to the newest checkpoint, and on behind the spike", spike.reason)
    context.goodput.switch("recovery")
    position = run.checkpoints.roll_back()
    apply_settings(config, run.optimizer)
    context.journal.record_rollback(position.step, spike.place, spike.reason)
    context.goodput.record_rollback(position.step)
    return position


class CheckpointPolicy:
    """Saves when it is time, and only what replicas agree on."""

    def __init__(
        self, config: Config, run: TrainingComponents, context: RunContext, health: LossGuard, metrics: Metrics, step: int
    ):
        """`step`: of the checkpoint that the run goes on from, 0 if there is none."""
        self.config, self.run, self.context, self.health = config, run, context, health
        self.metrics, self.step = metrics, step

    @property
    def can_go_back(self) -> bool:
        """Whether there is a checkpoint of this run."""
        return self.step > 0

    def maybe_save(self, position: Position, validation_loss: float | None, *, due: bool) -> str | None:
        """After a step: check and save if it is time, or `due` for another reason; a step is saved once.

        Returns: why the run must not go on; None: all is well.
        """
        checkpoint, health = self.config.checkpoint, self.config.health
        due = (due or position.step % checkpoint.interval_steps == 0) and position.step > self.step
        if due or position.step % health.replica_check_steps == 0:
            difference = check_replica_weights(self.run.topology, self.run.stages, self.run.checkpoints.frozen_tower)
            if difference:
                return (
                    f"after step {position.step} {difference}. A machine may be broken: find it before you go on, from the "
                    f"checkpoint of step {self.step}"
                )
        if due:
            with self.context.goodput.doing("save"):
                self.context.goodput.record_save(position.step, self.health.state())
                stall_seconds = self.run.checkpoints.save(position, validation_loss=validation_loss)
            self.metrics.save_stall(position.step, stall_seconds)
            self.step = position.step
        return None

    def save_before_exit(self, position: Position) -> str | None:
        """Before leaving: what is not on the disk, because its save failed, is saved once more. Returns: as `maybe_save`."""
        self.run.checkpoints.wait()
        if self.run.checkpoints.saves.failures:
            self.step = 0
        return self.maybe_save(position, None, due=True)


def stop_run(config: Config, reason: str, status: RunStatusWriter) -> int:
    """Stop on purpose: say why in RUN/STOP. Nothing is saved, so going on starts from the last good checkpoint."""
    if status.writes:
        logger.error("stopped: %s", reason)
        publish(stop_file(config), f"{reason}\n".encode())
        status.record_end(EXIT_STOPPED, reason)
    return EXIT_STOPPED
