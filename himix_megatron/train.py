"""Training: from a configuration to a trained run folder, at any layout of ranks.

`pretrain` reads as the list of what happens. One step: read this rank's texts and image share, encode the share and gather
the replica's features, run megatron-core's schedule over the micro-batches, clip, update, report, and now and then save.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from . import log, parallel
from .adapter import overlaps, params_dtype, text_multiple
from .checkpoint import Checkpoints, Position, publish
from .config import Config, check_ranks
from .data.batch import StepBatch, without_loss
from .data.features import FeatureCache
from .data.loader import Reads, StepReader, step_loader
from .data.plan import End, Plan, StepPlan
from .data.stream import Stream, stream_steps
from .data.vision_reader import FeatureReader
from .ledger import Ledger
from .metrics import Metrics, StepCounts
from .model.encoder import Ahead, ReplicaEncoder, encoding_place
from .model.himix import build_stage, finalize_gradients
from .model.vision import build_tower
from .optim import Schedule, apply_settings, build_optimizer
from .parallel import Topology
from .passes import PassClock
from .pictures import Pictures
from .profiling import profiled
from .signals import REQUEUE, STOPPED, StopRequest
from .start import Start, begin, prepare, stop_file
from .step import run_losses, stage_inputs

logger = logging.getLogger(__name__)


def pretrain(config: Config) -> int:
    """Train one run to its last step, or continue it.

    Returns: 0 at the last step; 85 (`signals.REQUEUE`) if it was asked to stop and saved; 3 (`signals.STOPPED`) if it gave up
    on purpose, with the reason in RUN/STOP. Raises: ValueError for a user's mistake, before ranks meet.
    """
    launch = parallel.check_launch(config)
    request = StopRequest()
    start = prepare(config, check_ranks(config, launch.world_size))
    topology = parallel.start(config.parallel, seed=config.train.seed, launch=launch)
    log.start(config.run_dir, topology.rank, topology.world_size)
    with log.failures():
        run = build_run(config, start, topology)
        describe(config, start, run)
        position = begin(config, start, run.checkpoints)
        apply_settings(config, run.optimizer)
        code = run_steps(config, start, run, position, request)
    request.leave_in_peace()
    return code


def run_steps(config: Config, start: Start, run: Run, position: Position, request: StopRequest) -> int:
    """From a position to the last step. Returns: the exit code."""
    schedule = Schedule(config, run.optimizer)
    metrics = Metrics(config, start, run, position.step)
    pictures = Pictures(config, start, run)
    ledger = Ledger(config, start.plan.sources, run.topology)
    validation = Validation(config, start, run)
    tolerance = Tolerance(config)
    code = 0
    for batch, images in encoded(run, batches_from(config, start, run.topology, position)):
        metrics.data_ready(batch)
        learning_rate = schedule.set(start.end.progress(position.step, position.place))
        with profiled(config, run.topology, position.step + 1):
            counts, grad_norm, stop = train_step(config, run, batch, images, request)
        position = replace(position, step=position.step + 1, place=batch.after)
        metrics.step_done(position.step, counts, learning_rate, grad_norm, last=batch.is_last)
        ledger.note(position.step, batch)
        if tolerance.exceeded(counts, batch.num_samples):
            code = give_up(config, tolerance.reason, run.topology)
            break
        loss = None if stop else validation.measure(position.step, last=batch.is_last)
        if loss is not None:
            metrics.validation(position.step, loss)
        metrics.pictures(position.step, [] if stop else pictures.look(position.step, last=batch.is_last))
        if batch.is_last or stop or position.step % config.checkpoint.interval_steps == 0 or validation.is_best(loss):
            begun = time.perf_counter()
            run.checkpoints.save(position, validation_loss=loss)
            metrics.saved(position.step, time.perf_counter() - begun)
        metrics.resume_clock()
        if stop and not batch.is_last:
            code = REQUEUE
            break
    run.ahead.settle()
    metrics.close()
    ledger.close()
    return code


class Validation:
    """The loss on the held-out set, at the intervals that `log` says."""

    def __init__(self, config: Config, start: Start, run: Run):
        self.config, self.run, self.best = config, run, run.checkpoints.best_validation_loss()
        self.plan = start.held_out
        self.reader = (
            None if start.held_out is None else step_reader(config, start.held_out, run.topology, start.held_out_features)
        )

    @torch.no_grad()
    def measure(self, step: int, *, last: bool) -> float | None:
        """Mean loss over the answer tokens of the set's first samples, in its own fixed order; None: not now, or no answers."""
        if self.plan is None or self.reader is None:
            return None
        if not (last or step % self.config.log.validation_interval_steps == 0):
            return None
        total = tokens = 0.0
        for batch, images in encoded(self.run, step_loader(self.reader, self._steps(self.plan), self.config.data.num_workers)):
            reported = run_schedule(self.run, batch, images, forward_only=True)
            counts, _ = count(self.config, self.run.topology, batch, reported, asked=False)
            if counts.answer_tokens:
                total, tokens = total + counts.loss * counts.answer_tokens, tokens + counts.answer_tokens
        return total / tokens if tokens else None

    def _steps(self, plan: Plan) -> Iterator[StepPlan]:
        """Whole batches, as many as the samples to look at fill, but at least one."""
        available = min(self.config.log.validation_samples, plan.epoch_samples)
        for step in plan.steps(End(None, available)):
            if step.step and step.after.samples > available:
                return
            yield step

    def is_best(self, loss: float | None) -> bool:
        """Whether this is the lowest loss of the run so far; remembers it."""
        better = loss is not None and (self.best is None or loss < self.best)
        if better:
            self.best = loss
        return better


class Tolerance:
    """How many samples may fail to read: `data.max_bad_fraction` of those since this start, counted as at least 1,000."""

    def __init__(self, config: Config):
        self.fraction = config.data.max_bad_fraction
        self.bad = self.seen = 0

    def exceeded(self, counts: StepCounts, num_samples: int) -> bool:
        """Note a step; the same answer on every rank."""
        self.bad, self.seen = self.bad + counts.bad_samples, self.seen + num_samples
        return self.bad > self.fraction * max(self.seen, 1000)

    @property
    def reason(self) -> str:
        """One line for RUN/STOP."""
        return (
            f"{self.bad} of {self.seen} samples could not be read, more than data.max_bad_fraction {self.fraction}: "
            "RUN/log names them"
        )


def give_up(config: Config, reason: str, topology: Topology) -> int:
    """Stop on purpose: say why in RUN/STOP. Nothing is saved, so going on starts from the last good checkpoint."""
    logger.error("stopped: %s", reason)
    if topology.rank == 0:
        publish(stop_file(config), f"{reason}\n".encode())
    return STOPPED


# ---- before the first step -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Run:
    """What training works with on this rank."""

    topology: Topology
    stages: list[DistributedDataParallel]
    """One model chunk, or several with an interleaved pipeline."""
    encoder: ReplicaEncoder
    ahead: Ahead
    optimizer: Any
    checkpoints: Checkpoints
    passes: PassClock


def build_run(config: Config, start: Start, topology: Topology) -> Run:
    """Tower, model chunks, optimizer and checkpoints of this rank."""
    trainable = "tower" in config.train.parts
    tower = build_tower(config.vision, seed=config.train.seed, dtype=params_dtype(config))
    if not start.features or (start.held_out is not None and not start.held_out_features):
        tower = tower.to(topology.device)  # else it stays where it costs least, for checkpoints to refer to
    stages = build_stage(config, start.kernels, topology, tower)
    optimizer = build_optimizer(config, stages)
    mcore_config = stages[0].config
    mcore_config.grad_scale_func = optimizer.scale_loss
    passes = PassClock(topology.device)
    mcore_config.timers = passes
    mcore_config.finalize_model_grads_func = passes.ends_with(finalize_gradients)
    if overlaps(config):
        # Gradients are summed over data ranks in the last micro-batch's backward pass only.
        syncs = [stage.no_sync for stage in stages]
        mcore_config.no_sync_func = syncs if len(syncs) > 1 else syncs[0]
    return Run(
        topology=topology,
        stages=stages,
        encoder=ReplicaEncoder(
            tower,
            None if config.vision.placement == "replicated" else topology.encoding,
            trainable=trainable,
            dtype=params_dtype(config),
            device=topology.device,
            place=encoding_place(config.vision.placement, topology),
        ),
        ahead=Ahead(topology.device, enabled=config.vision.encode_ahead),
        optimizer=optimizer,
        checkpoints=Checkpoints(config, stages, optimizer, None if trainable else tower),
        passes=passes,
    )


def step_reader(config: Config, plan: Plan, topology: Topology, features: Sequence[FeatureCache] = ()) -> StepReader:
    """What this rank reads of a plan; `features` instead of images where there are any."""
    return StepReader(
        plan,
        vision_config=config.vision,
        micro_batch=config.micro_batch,
        reads=reads_of(config, topology),
        pad_multiple=text_multiple(config),
        features=FeatureReader(features, params_dtype(config)) if features else None,
    )


def reads_of(config: Config, topology: Topology) -> Reads:
    """Which samples and images this rank reads."""
    image_rank, image_size = encoding_place(config.vision.placement, topology)
    return Reads(
        data_rank=topology.data_rank,
        data_size=topology.data_size,
        texts=topology.is_first_stage or topology.is_last_stage,
        image_rank=image_rank,
        image_size=image_size,
    )


def batches_from(config: Config, start: Start, topology: Topology, position: Position) -> Iterator[StepBatch]:
    """The steps that are left of the run, as this rank sees them."""
    if isinstance(start.plan, Stream):
        return stream_steps(
            start.plan,
            vision_config=config.vision,
            micro_batch=config.micro_batch,
            reads=reads_of(config, topology),
            end=start.end,
            place=position.place,
            step=position.step,
            pad_multiple=text_multiple(config),
        )
    steps = start.plan.steps(start.end, position.place, position.step)
    return step_loader(step_reader(config, start.plan, topology, start.features), steps, config.data.num_workers)


def describe(config: Config, start: Start, run: Run) -> None:
    """Say what runs: layout, what trains, which kernels."""
    parallel_config, topology = config.parallel, run.topology
    trained = sum(p.numel() for stage in run.stages for p in stage.parameters() if p.requires_grad)
    logger.info(
        "%s: %d ranks (tensor %d%s, pipeline %d x %d, data %d), %s, %d steps of %d %s",
        config.recipe, topology.world_size, parallel_config.tensor, " + sequence" if parallel_config.sequence else "",
        parallel_config.pipeline, parallel_config.virtual_pipeline, topology.data_size, config.train.precision,
        start.plan.expected_steps(start.end), config.global_batch, "packs" if config.data.packs else "samples",
    )  # fmt: skip
    logger.info("training %s: %d parameters on this rank", ", ".join(config.train.parts), trained)
    vision = config.vision
    logger.info("images: %s", f"features in {' '.join(config.data.features)}" if start.features else
                f"{vision.tower} tower, {vision.placement}{', a step ahead' if vision.encode_ahead else ''}")  # fmt: skip
    for line in start.kernels.reasons():
        logger.info("%s", line)


# ---- one step ------------------------------------------------------------------------------------------------------


def encoded(run: Run, batches: Iterable[StepBatch]) -> Iterator[tuple[StepBatch, Tensor]]:
    """Each step with its images, features or pixels, made while the step before it trains."""

    def encode(batch: StepBatch) -> tuple[StepBatch, Tensor]:
        batch = agree_on_bad(batch, run.topology)
        return batch, run.encoder.encode(batch.pixels, batch.blank, len(batch.blank))

    return run.ahead.steps(batches, encode)


def train_step(
    config: Config, run: Run, batch: StepBatch, images: Tensor, request: StopRequest
) -> tuple[StepCounts, float, bool]:
    """One optimizer step.

    Returns: what it processed over all ranks, the gradient's global norm before clipping, and whether any rank was asked to
    stop (all ranks learn it at the same step).
    """
    for stage in run.stages:
        stage.zero_grad_buffer()
    run.optimizer.zero_grad()
    reported = run_schedule(run, batch, images, forward_only=False)
    _, grad_norm, _ = run.optimizer.step()
    counts, stop = count(config, run.topology, batch, reported, asked=request.received is not None)
    return counts, float(grad_norm or 0.0), stop


def run_schedule(run: Run, batch: StepBatch, images: Tensor, *, forward_only: bool) -> list[Tensor]:
    """Forward (and backward) over a step's micro-batches. `images`: as `encoded` gives them.

    Returns: on the last stage float64[2] per micro-batch: summed loss, answer tokens; elsewhere nothing.
    """
    return run_losses(run.stages, stage_inputs(batch, images, run.topology.device), forward_only=forward_only)


def agree_on_bad(batch: StepBatch, topology: Topology) -> StepBatch:
    """The same step on every rank of a replica: an image that one rank could not read is blank and silent on all."""
    if topology.replica_size == 1:
        return batch
    num_samples = sum(len(m.keys) for m in batch.micro_batches)
    marks = torch.zeros(len(batch.blank) + num_samples, dtype=torch.uint8, device=topology.device)
    marks[: len(batch.blank)] = batch.blank
    marks[[len(batch.blank) + sample for sample in batch.bad_samples]] = 1
    torch.distributed.all_reduce(marks, op=torch.distributed.ReduceOp.MAX, group=topology.encoding)
    marks = marks.cpu()
    bad = marks[len(batch.blank) :].nonzero().flatten().tolist()
    keys = [key for m in batch.micro_batches for key in m.keys]
    agreed = replace(
        batch,
        blank=marks[: len(batch.blank)].bool(),
        bad_samples=tuple(bad),
        bad_keys=tuple(keys[sample] for sample in bad),
    )
    return without_loss(agreed, bad)


def count(
    config: Config, topology: Topology, batch: StepBatch, reported: list[Tensor], *, asked: bool
) -> tuple[StepCounts, bool]:
    """Add the step up over all ranks: the loss from the last stages, the counts once from each replica.

    Returns: the counts, and whether any rank was `asked` to stop; one collective for both.
    """
    if batch.bad_keys:
        logger.warning("could not read %s: no loss from them", ", ".join(batch.bad_keys))
    num_sources = batch.num_sources if batch.num_sources > 1 else 0
    totals = torch.zeros(7 + 2 * num_sources, dtype=torch.float64, device=topology.device)
    if topology.is_last_stage and topology.tensor_rank == 0:
        found = torch.stack(reported).sum(0)
        totals[:2], totals[7:] = found[:2], found[2:]
    if topology.replica_rank == 0:
        totals[2] = text_tokens_read(batch)
        totals[3] = images_seen(batch)
        totals[4] = len(batch.bad_keys)
        totals[5] = batch.num_cut
    totals[6] = asked
    torch.distributed.all_reduce(totals)
    loss, answer_tokens, text_tokens, images, bad, cut, num_asked, *apart = totals.tolist()
    counts = StepCounts(
        loss=loss / answer_tokens if answer_tokens else math.nan,
        answer_tokens=int(answer_tokens),
        text_tokens=int(text_tokens),
        vision_tokens=int(images) * config.vision.tokens_per_image,
        images=int(images),
        bad_samples=int(bad),
        cut_samples=int(cut),
        sources=tuple(zip(apart[::2], apart[1::2], strict=True)),
    )
    return counts, num_asked > 0


def text_tokens_read(batch: StepBatch) -> int:
    """Text tokens of a step on this replica, without padding and without samples that could not be read."""
    lengths = torch.cat([m.text_lengths for m in batch.micro_batches])
    return int(lengths.sum() - lengths[list(batch.bad_samples)].sum())


def images_seen(batch: StepBatch) -> int:
    """Real images of a step on this replica; those that stand for "no image" are not counted."""
    return int((~batch.blank).sum())
