"""Training: from a configuration to a trained run folder, at any layout of ranks.

`pretrain` reads as the list of what happens; `run_until` is the loop. One step: read this rank's texts and image share, encode
the share and gather the replica's features, run megatron-core's schedule over the micro-batches, clip, update, report, and now
and then save.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

from ..checkpoint.checkpointer import Position
from ..checkpoint.manifest import publish
from ..config import Config, check_ranks
from ..data.loading.plan import Place
from ..distributed.launch import check_launch
from ..distributed.topology import init_distributed
from ..monitoring.metrics import Metrics, StepCounts
from ..monitoring.profiler import profiled
from ..monitoring.sample_ledger import Ledger
from ..monitoring.sample_predictions import Pictures
from ..resilience import out_of_memory
from ..resilience.journal import Journal
from ..resilience.loss_guard import Health
from ..resilience.replica_check import check_replicas
from ..resilience.watchdog import Watch
from ..runtime import failpoints, log, progress
from ..runtime.stop_signals import REQUEUE, STOPPED, StopRequest, leave
from .builder import Run, batches_from, build_run, describe
from .optimizer import Schedule, apply_settings
from .resume import Start, begin, claim, prepare, settle, stop_file
from .supervision import Supervision, in_vain, supervise
from .train_step import together, train_step
from .validation import Validation

logger = logging.getLogger(__name__)


def pretrain(config: Config, request: StopRequest | None = None) -> int:
    """Train one run to its last step, or continue it. `request`: where it has been listened for longer already.

    Returns: 0 at the last step; 85 (`signals.REQUEUE`) if it was asked to stop and saved; 3 (`signals.STOPPED`) if it gave up
    on purpose, with the reason in RUN/STOP. Raises: ValueError for a user's mistake, before ranks meet.
    """
    request = request or StopRequest()
    launch = check_launch(config)
    failpoints.plan(config.run.faults, launch.rank)
    start = prepare(config, check_ranks(config, launch.world_size))
    journal = Journal(config.run_dir)
    if reason := in_vain(config, start, journal):
        request.leave_in_peace()
        return give_up(config, reason, launch.rank)
    topology = init_distributed(config.parallel, seed=config.train.seed, launch=launch)
    start = claim(config, start)
    log.start(config.run_dir, topology.rank, topology.world_size)
    start = settle(config, start)
    watch = Watch.over(config, topology, launch.host, request)
    with log.failures(), watch, out_of_memory.explained(config):
        supervision = supervise(config, start, journal, watch, request)
        progress.at("start/load")
        run = build_run(config, start, topology)
        describe(config, start, run)
        run.checkpoints.check_room()
        position = begin(config, start, run.checkpoints)
        apply_settings(config, run.optimizer)
        code = run_steps(config, start, run, position, supervision)
        run.checkpoints.close()
    if not run.ahead.settle(seconds=2):
        leave(code)  # a read or a peer of the next step is stuck, and nobody needs that step
    return code


def run_steps(config: Config, start: Start, run: Run, position: Position, supervision: Supervision) -> int:
    """From a position to the last step; each rollback begins anew from an earlier position. Returns: the exit code."""
    supervision.watch.begin_steps()
    while not isinstance(end := run_until(config, start, run, position, supervision), int):
        position = roll_back(config, run, supervision, end)
    return end


@dataclass(frozen=True, slots=True)
class Rollback:
    """The loop ended at a spike."""

    place: Place
    """Where the data goes on behind it."""
    reason: str


def run_until(config: Config, start: Start, run: Run, position: Position, supervision: Supervision) -> int | Rollback:
    """From a position to the last step, a stop or a rollback. Returns: the exit code, or what to roll back."""
    request, goodput, journal = supervision.request, supervision.goodput, supervision.journal
    detours = journal.detours()
    schedule = Schedule(config, run.optimizer)
    metrics = Metrics(config, start, run, position.step)
    pictures = Pictures(config, start, run)
    ledger = Ledger(config, start.plan.sources, run.topology)
    validation = Validation(config, start, run, supervision)
    tolerance = Tolerance(config)
    health = Health(config.health, journal.health_at(position.step), num_rollbacks=journal.num_rollbacks)
    saver = Saver(config, run, supervision, health, metrics, position.step)
    end: int | Rollback = 0
    goodput.switch("data")
    for batch, images in together(run, batches_from(config, start, run.topology, position, detours), request):
        metrics.data_ready(batch)
        goodput.switch("step")
        failpoints.begin_step(position.step + 1)
        progress.at("step/begin")
        position = replace(position, place=detours.get(position.step, position.place))
        learning_rate = schedule.set(start.end.progress(position.step, position.place))
        health.expect(position.step + 1, can_roll_back=saver.can_go_back and not start.end.reached(saver.step, batch.after))
        with profiled(config, run.topology, position.step + 1):
            counts, grad_norm, verdict = train_step(config, run, batch, images, health.judge)
        if verdict.action == "rollback":
            end = Rollback(batch.after, verdict.reason)
            break
        position = replace(position, step=position.step + 1, place=batch.after)
        if metrics.step_done(position.step, counts, learning_rate, grad_norm, last=batch.is_last):
            metrics.add(position.step, goodput.points() | health.points())
            goodput.note_alive(position.step)
        ledger.note(position.step, batch, counts.loss, grad_norm)
        run.checkpoints.poll()
        reason = verdict.stop_reason or tolerance.exceeded(counts, batch.num_samples)
        if not reason:
            with goodput.doing("validation"):
                loss = validation.measure(position.step, last=batch.is_last)
            if loss is not None:
                metrics.validation(position.step, loss)
            with goodput.doing("validation"):
                metrics.pictures(position.step, pictures.look(position.step, last=batch.is_last))
            reason = saver.visit(position, loss, due=batch.is_last or validation.is_best(loss))
        if reason:
            end = give_up(config, reason, run.topology.rank)
            break
        metrics.resume_clock()
        progress.at("step/end")
        supervision.watch.mark("waiting for data")
        goodput.switch("data")
        if batch.is_last or request.is_agreed:
            break
    if request.is_agreed and end != STOPPED:
        reason = saver.visit_last(position)
        end = give_up(config, reason, run.topology.rank) if reason else REQUEUE
    with goodput.doing("save"):
        if isinstance(end, Rollback) or end == STOPPED:
            run.checkpoints.wait()  # there is an older one to go back to, or to go on from
        else:
            run.checkpoints.finish()
    if end == REQUEUE:
        logger.info("asked to stop (%s): step %d is saved", request.received, saver.step)
    metrics.close()
    ledger.close()
    if isinstance(end, int):
        goodput.note_end(position.step, end)
    return end


def roll_back(config: Config, run: Run, supervision: Supervision, spike: Rollback) -> Position:
    """Go back to the newest checkpoint, and on from there behind the spike. Returns: the position there."""
    logger.warning("%s: going back to the newest checkpoint, and on behind the spike", spike.reason)
    supervision.goodput.switch("recovery")
    position = run.checkpoints.roll_back()
    apply_settings(config, run.optimizer)
    supervision.journal.note_rollback(position.step, spike.place, spike.reason)
    supervision.goodput.note_rollback(position.step)
    return position


class Saver:
    """Saves when it is time, and only what replicas agree on."""

    def __init__(self, config: Config, run: Run, supervision: Supervision, health: Health, metrics: Metrics, step: int):
        """`step`: of the checkpoint that the run goes on from, 0 if there is none."""
        self.config, self.run, self.supervision, self.health = config, run, supervision, health
        self.metrics, self.step = metrics, step

    @property
    def can_go_back(self) -> bool:
        """Whether there is a checkpoint of this run."""
        return self.step > 0

    def visit(self, position: Position, validation_loss: float | None, *, due: bool) -> str | None:
        """After a step: check and save if it is time, or `due` for another reason; a step is saved once.

        Returns: why the run must not go on; None: all is well.
        """
        checkpoint, health = self.config.checkpoint, self.config.health
        due = (due or position.step % checkpoint.interval_steps == 0) and position.step > self.step
        if due or position.step % health.replica_check_steps == 0:
            difference = check_replicas(self.run.topology, self.run.stages, self.run.checkpoints.frozen_tower)
            if difference:
                return (
                    f"after step {position.step} {difference}. A machine may be broken: find it before you go on, from the "
                    f"checkpoint of step {self.step}"
                )
        if due:
            with self.supervision.goodput.doing("save"):
                self.supervision.goodput.note_save(position.step, self.health.state())
                stall_seconds = self.run.checkpoints.save(position, validation_loss=validation_loss)
            self.metrics.save_stall(position.step, stall_seconds)
            self.step = position.step
        return None

    def visit_last(self, position: Position) -> str | None:
        """Before leaving: what is not on the disk, because its save failed, is saved once more. Returns: as `visit`."""
        self.run.checkpoints.wait()
        if self.run.checkpoints.saves.failures:
            self.step = 0
        return self.visit(position, None, due=True)


class Tolerance:
    """How many samples may fail to read: `data.max_bad_fraction` of those since this start, counted as at least 1,000."""

    def __init__(self, config: Config):
        self.fraction = config.data.max_bad_fraction
        self.bad = self.seen = 0

    def exceeded(self, counts: StepCounts, num_samples: int) -> str | None:
        """Note a step. Returns: that there were too many, in one line for RUN/STOP; the same on every rank."""
        self.bad, self.seen = self.bad + counts.bad_samples, self.seen + num_samples
        if self.bad <= self.fraction * max(self.seen, 1000):
            return None
        return (
            f"{self.bad} of {self.seen} samples could not be read, more than data.max_bad_fraction {self.fraction}: "
            "RUN/log names them"
        )


def give_up(config: Config, reason: str, rank: int) -> int:
    """Stop on purpose: say why in RUN/STOP. Nothing is saved, so going on starts from the last good checkpoint."""
    if rank == 0:
        logger.error("stopped: %s", reason)
        publish(stop_file(config), f"{reason}\n".encode())
    return STOPPED
