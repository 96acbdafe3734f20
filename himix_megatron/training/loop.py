"""Training: from a configuration to a trained run folder, at any layout of ranks.

`pretrain` is the table of contents; `TrainLoop` runs the steps. A step: wait for the batch and its features, run
megatron-core's schedule over the micro-batches, clip, update, report; at intervals validate, show predictions and save.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import Tensor

from ..checkpoint.description import Position
from ..checkpoint.run_lock import refuse_if_in_use
from ..config import Config, check_ranks
from ..data.loading.batch import StepBatch
from ..data.loading.plan import DataPosition
from ..distributed.launch import check_launch
from ..distributed.topology import init_distributed
from ..monitoring.metrics import Metrics, StepCounts
from ..monitoring.profiler import profiled
from ..monitoring.run_status import RunStatusWriter
from ..monitoring.sample_ledger import Ledger
from ..monitoring.sample_predictions import SamplePredictions
from ..resilience import out_of_memory
from ..resilience.bad_samples import BadSampleBudget
from ..resilience.journal import Journal
from ..resilience.loss_guard import LossGuard, StepDecision
from ..resilience.watchdog import Watchdog
from ..runtime import failpoints, log
from ..runtime.durable_files import publish
from ..runtime.failpoints import failpoint
from ..runtime.stop_signals import EXIT_REQUEUE, EXIT_STOPPED, StopRequest, exit_now
from .builder import TrainingComponents, build_components, describe
from .checkpoint_policy import CheckpointPolicy
from .data_setup import RunInputs, batches_from, prepare_inputs, stop_file
from .optimizer import Schedule, apply_settings
from .resume import (
    RunContext,
    expected_checkpoint,
    lock_run_dir,
    record_start,
    refuse_crash_loop,
    restore_or_initialize,
    status_writer,
)
from .train_step import synced_batches, train_step
from .validation import Validation

logger = logging.getLogger(__name__)


def pretrain(config: Config, request: StopRequest | None = None) -> int:
    """Train one run to its last step, or continue it. `request`: one that has listened for signals for longer already.

    Returns: 0 after the last step; 85 (`EXIT_REQUEUE`) after a requested stop, saved; 3 (`EXIT_STOPPED`) after a stop on
    purpose, with the reason in RUN/STOP. Raises: ValueError for a mistake of the user, before ranks meet.
    """
    started_at, request = time.time(), request or StopRequest()
    launch = check_launch(config)
    failpoints.schedule_faults(config.run.fault_injection, launch.rank)
    inputs = prepare_inputs(config, check_ranks(config, launch.world_size))
    expected = expected_checkpoint(config, inputs.plan)
    journal = Journal(config.run_dir)
    if reason := refuse_crash_loop(config, expected, inputs.length, journal):
        request.ignore_signals()
        refuse_if_in_use(config.run_dir)  # the last of the starts may well be training: it would find a reason to stop
        return stop_run(config, reason, status_writer(config, inputs, expected, launch, started_at))
    topology = init_distributed(config.parallel, seed=config.train.seed, launch=launch)
    resume = lock_run_dir(config, inputs.plan, topology)
    status = status_writer(config, inputs, resume.checkpoint, launch, started_at)
    watchdog = Watchdog.over(config, topology, launch.host, request, status.record_end)
    with log.failures(), status.failures(), watchdog, out_of_memory.explained(config):
        context = record_start(config, resume.checkpoint, journal, watchdog, request, status)
        failpoint("start/load", progress=True)
        run = build_components(config, inputs, topology, ranks=resume.ranks, run_lock=resume.run_lock)
        describe(config, inputs, run)
        run.checkpoints.check_disk_space()
        position = restore_or_initialize(config, inputs, resume.checkpoint, run.checkpoints)
        apply_settings(config.optimizer, run.optimizer)
        code = train_with_rollbacks(config, inputs, run, position, context)
        run.checkpoints.close()
        if code != EXIT_STOPPED:
            status.record_end(code)
    if not run.prefetcher.drain(seconds=2):
        exit_now(code)  # the read of a step that nobody needs any more is stuck
    return code


def stop_run(config: Config, reason: str, status: RunStatusWriter) -> int:
    """Stop on purpose: write the reason into RUN/STOP. Nothing is saved, so the run would continue from the last checkpoint."""
    if status.writes:
        logger.error("stopped: %s", reason)
        publish(stop_file(config), f"{reason}\n".encode())
        status.record_end(EXIT_STOPPED, reason)
    return EXIT_STOPPED


def train_with_rollbacks(
    config: Config, inputs: RunInputs, run: TrainingComponents, position: Position, context: RunContext
) -> int:
    """Train from a position to the end of the run; after a rollback again from an earlier one. Returns: the exit code."""
    context.watchdog.begin_steps()
    context.status.record_state("training", step=position.step)
    loop = TrainLoop(config, inputs, run, position, context)
    while isinstance(end := loop.run(), Rollback):
        del loop  # its second set of modules, before the next loop makes its own
        with context.goodput.doing("recovery"):
            loop = TrainLoop(config, inputs, run, roll_back(config, run, context, end), context)
    return end


@dataclass(frozen=True, slots=True)
class Rollback:
    """The loop ended at a loss spike."""

    place: DataPosition
    """Where the data continues behind it."""
    reason: str


def roll_back(config: Config, run: TrainingComponents, context: RunContext, spike: Rollback) -> Position:
    """Restore the newest checkpoint; the data will continue behind the spike. Returns: the position of the checkpoint."""
    logger.warning("%s: going back to the newest checkpoint, and on behind the spike", spike.reason)
    position = run.checkpoints.roll_back()
    apply_settings(config.optimizer, run.optimizer)
    context.journal.record_rollback(position.step, spike.place, spike.reason)
    context.goodput.record_rollback(position.step)
    return position


class TrainLoop:
    """Takes steps from a position to the last step, a stop or a rollback."""

    def __init__(self, config: Config, inputs: RunInputs, run: TrainingComponents, position: Position, context: RunContext):
        self.config, self.inputs, self.components, self.position, self.context = config, inputs, run, position, context
        self.request, self.goodput = context.request, context.goodput
        journal, topology, model_chunks = context.journal, run.topology, run.model_chunks
        self.rollback_data_offsets = journal.rollback_data_offsets()
        self.schedule = Schedule(config.optimizer, run.optimizer)
        self.metrics = _metrics(config, inputs, run, position.step, context.status)
        self.predictions = SamplePredictions(
            config, inputs.held_out or inputs.plan, inputs.kernels, topology, model_chunks, run.encoder.tower
        )
        self.ledger = Ledger(
            config.run_dir,
            topology,
            enabled=config.log.ledger,
            sources=inputs.plan.sources,
        )
        self.validation = Validation(config, inputs.held_out, inputs.held_out_features, run, context.request)
        self.bad_samples = BadSampleBudget(config.data.max_bad_fraction)
        state = journal.loss_guard_state_at(position.step)
        self.loss_guard = LossGuard(config.health, state, num_rollbacks=journal.num_rollbacks)
        self.policy = CheckpointPolicy(
            config,
            run,
            loss_guard=self.loss_guard,
            goodput=context.goodput,
            metrics=self.metrics,
            saved_step=position.step,
        )

    def run(self) -> int | Rollback:
        """Returns: the exit code, or what to roll back."""
        with self.goodput.doing("step"):
            end = self._finish(self._steps())
            self.metrics.close()
            self.ledger.close()
        if isinstance(end, int):
            self.goodput.record_end(self.position.step, end)
        return end

    def _steps(self) -> int | Rollback:
        """Take steps. Returns: why it ended, as `run`; 0 also where a stop was requested and is still to be saved."""
        for batch, images in self.goodput.waiting("data", self._batches()):
            counts, decision = self._train(batch, images)
            if decision.action == "rollback":
                return Rollback(batch.after, decision.reason)
            reason = decision.stop_reason or self.bad_samples.exceeded(counts.bad_samples, batch.num_samples)
            if reason := reason or self._evaluate_and_save(last=batch.is_last):
                return stop_run(self.config, reason, self.context.status)
            self.metrics.resume_clock()
            failpoint("step/end", progress=True)
            self.context.watchdog.heartbeat("waiting for data")
            if batch.is_last or self.request.is_agreed:
                break
        return 0

    def _batches(self) -> Iterator[tuple[StepBatch, Tensor]]:
        """The remaining steps of the run, each with its images or features."""
        topology = self.components.topology
        batches = batches_from(self.config, self.inputs, topology, self.position, self.rollback_data_offsets)
        return synced_batches(self.components, batches, self.request)

    def _train(self, batch: StepBatch, images: Tensor) -> tuple[StepCounts, StepDecision]:
        """Take a step and record it, unless it is to be rolled back."""
        self.metrics.data_ready(batch)
        step, length = self.position.step + 1, self.inputs.length
        failpoints.begin_step(step)
        failpoint("step/begin", progress=True)
        place = self.rollback_data_offsets.get(self.position.step, self.position.place)
        learning_rate = self.schedule.set(length.progress(self.position.step, place))
        data_remains = not length.reached(self.policy.saved_step, batch.after)
        self.loss_guard.begin_step(step, can_roll_back=self.policy.can_roll_back and data_remains)
        with profiled(self.config.run_dir, self.components.topology, enabled=step in self.config.log.profile_steps, step=step):
            counts, grad_norm, decision = train_step(self.config, self.components, batch, images, self.loss_guard.check)
        if decision.action == "rollback":
            self.position = replace(self.position, place=place)
            return counts, decision
        self.position = replace(self.position, step=step, place=batch.after)
        if self.metrics.step_done(step, counts, learning_rate, grad_norm, last=batch.is_last):
            self.metrics.add(step, self.goodput.points() | self.loss_guard.points())
            self.goodput.record_alive(step)
        self.ledger.record(step, batch, counts.loss, grad_norm)
        self.components.checkpoints.poll()
        return counts, decision

    def _evaluate_and_save(self, *, last: bool) -> str | None:
        """After a step: validate, show predictions and save, where it is time. Returns: why the run must stop, if it must."""
        step = self.position.step
        with self.goodput.doing("validation"):
            loss = self.validation.measure(step, last=last)
            if loss is not None:
                self.metrics.validation(step, loss)
            self.metrics.predictions(step, self.predictions.maybe_predict(step, last=last))
        return self.policy.maybe_save(self.position, loss, due=last or self.validation.is_best(loss))

    def _finish(self, end: int | Rollback) -> int | Rollback:
        """Save what a requested stop leaves to be saved, and complete the save in flight. Returns: as `run`."""
        if self.request.is_agreed and end != EXIT_STOPPED:
            reason = self.policy.save_before_exit(self.position)
            end = stop_run(self.config, reason, self.context.status) if reason else EXIT_REQUEUE
        with self.goodput.doing("save"):
            if isinstance(end, Rollback) or end == EXIT_STOPPED:
                self.components.checkpoints.wait()  # if it fails, there is an older one to continue from
            else:
                self.components.checkpoints.finish()
        if end == EXIT_REQUEUE:
            logger.info("stop requested (%s): step %d is saved", self.request.received, self.policy.saved_step)
        return end


def _metrics(config: Config, inputs: RunInputs, run: TrainingComponents, first_step: int, status: RunStatusWriter) -> Metrics:
    reporter = None
    if run.topology.rank == 0:
        from ..monitoring.tensorboard import TensorBoardReporter  # importing TensorBoard takes a second

        reporter = TensorBoardReporter(config, inputs.plan, inputs.kernels, run.topology, first_step=first_step)
    return Metrics(
        config,
        run.topology,
        model_chunks=run.model_chunks,
        optimizer=run.optimizer,
        schedule_timers=run.schedule_timers,
        take_data_wait=run.prefetcher.take_waited_seconds,
        status=status,
        reporter=reporter,
        first_step=first_step,
    )
