"""What a run works with on this rank: model, optimizer, checkpoints; and the steps that it reads.

Flows in: Config, Start and Topology; out: a Run, and an iterator of batches.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron.core.distributed import DistributedDataParallel

from ..checkpoint.checkpointer import Checkpoints, Position
from ..config import Config
from ..data.loading.batch import StepBatch
from ..data.loading.feature_cache import FeatureCache
from ..data.loading.loader import ReadSpec, StepReader, step_loader
from ..data.loading.plan import DataPosition, SamplingPlan, StepPlan, TrainingLength
from ..data.loading.vision_reader import FeatureReader
from ..data.loading.webdataset_stream import Stream, stream_steps
from ..distributed.megatron_config import kernel_lines, overlaps, params_dtype, text_multiple
from ..distributed.topology import Topology
from ..model.feature_prefetch import FeaturePrefetcher
from ..model.himix_model import build_stage, finalize_gradients
from ..model.micro_batch_graphs import MicroBatchGraphs
from ..model.towers import build_tower
from ..model.vision_encoder import ShardedVisionEncoder, encoder_share
from ..monitoring.pipeline_timers import ScheduleTimers
from .optimizer import build_optimizer
from .resume import RunInputs

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TrainingComponents:
    """What training works with on this rank."""

    topology: Topology
    stages: list[DistributedDataParallel]
    """One model chunk, or several with an interleaved pipeline."""
    encoder: ShardedVisionEncoder
    prefetcher: FeaturePrefetcher
    optimizer: Any
    checkpoints: Checkpoints
    schedule_timers: ScheduleTimers
    graphs: MicroBatchGraphs | None = None
    """Where training runs micro-batches as CUDA graphs."""


def build_components(config: Config, start: RunInputs, topology: Topology) -> TrainingComponents:
    """Tower, model chunks, optimizer and checkpoints of this rank."""
    trainable = "tower" in config.train.trainable_parts
    tower = build_tower(config.vision, seed=config.train.seed, dtype=params_dtype(config)).requires_grad_(trainable)
    if not start.features or (start.held_out is not None and not start.held_out_features):
        tower = tower.to(topology.device)  # else it stays where it costs least, for checkpoints to refer to
    stages = build_stage(config, start.kernels, topology, tower)
    optimizer = build_optimizer(config, stages)
    mcore_config = stages[0].config
    mcore_config.grad_scale_func = optimizer.scale_loss
    schedule_timers = ScheduleTimers(topology.device)
    mcore_config.timers = schedule_timers
    mcore_config.finalize_model_grads_func = schedule_timers.ends_with(finalize_gradients)
    if overlaps(config):
        # Gradients are summed over data ranks in the last micro-batch's backward pass only.
        syncs = [stage.no_sync for stage in stages]
        mcore_config.no_sync_func = syncs if len(syncs) > 1 else syncs[0]
    return TrainingComponents(
        topology=topology,
        stages=stages,
        encoder=ShardedVisionEncoder(
            tower,
            None if config.vision.encoder_placement == "replicated" else topology.encoding,
            trainable=trainable,
            dtype=params_dtype(config),
            device=topology.device,
            place=encoder_share(config.vision.encoder_placement, topology),
        ),
        prefetcher=FeaturePrefetcher(topology.device, enabled=config.vision.prefetch_features),
        optimizer=optimizer,
        checkpoints=Checkpoints(config, stages, optimizer, None if trainable else tower, start.run_lock, start.ranks),
        schedule_timers=schedule_timers,
        graphs=MicroBatchGraphs(config, stages[0]) if config.train.cuda_graphs == "on" else None,
    )


def step_reader(config: Config, plan: SamplingPlan, topology: Topology, features: Sequence[FeatureCache] = ()) -> StepReader:
    """What this rank reads of a plan; `features` instead of images where there are any."""
    return StepReader(
        plan,
        vision_config=config.vision,
        micro_batch=config.micro_batch,
        reads=reads_of(config, topology),
        pad_multiple=text_multiple(config),
        features=FeatureReader(features, params_dtype(config)) if features else None,
    )


def reads_of(config: Config, topology: Topology) -> ReadSpec:
    """Which samples and images this rank reads."""
    image_rank, image_size = encoder_share(config.vision.encoder_placement, topology)
    return ReadSpec(
        data_rank=topology.data_rank,
        data_size=topology.data_size,
        texts=topology.is_first_stage or topology.is_last_stage,
        image_rank=image_rank,
        image_size=image_size,
    )


def batches_from(
    config: Config, start: RunInputs, topology: Topology, position: Position, rollback_data_offsets: Mapping[int, DataPosition]
) -> Iterator[StepBatch]:
    """The steps that are left of the run, as this rank sees them. `rollback_data_offsets`: by step, where the data goes on."""
    if isinstance(start.plan, Stream):
        return stream_steps(
            start.plan,
            vision_config=config.vision,
            micro_batch=config.micro_batch,
            reads=reads_of(config, topology),
            end=start.end,
            place=rollback_data_offsets.get(position.step, position.place),
            step=position.step,
            pad_multiple=text_multiple(config),
        )
    steps = planned(start.plan, start.end, position, rollback_data_offsets)
    return step_loader(step_reader(config, start.plan, topology, start.features), steps, config.data.num_workers)


def planned(
    plan: SamplingPlan, end: TrainingLength, position: Position, rollback_data_offsets: Mapping[int, DataPosition]
) -> Iterator[StepPlan]:
    """The plan's steps from a position to the end, with its detours."""
    step, place = position.step, position.place
    while not end.reached(step, place):
        for planned_step in plan.steps(end, rollback_data_offsets.get(step, place), step):
            yield planned_step
            step, place = planned_step.step + 1, planned_step.after
            if step in rollback_data_offsets:
                break
        else:
            return


def describe(config: Config, start: RunInputs, run: TrainingComponents) -> None:
    """Say what runs: layout, what trains, which kernels."""
    parallel_config, topology = config.parallel, run.topology
    trained = sum(p.numel() for stage in run.stages for p in stage.parameters() if p.requires_grad)
    logger.info(
        "%s: %d ranks (tensor %d%s, pipeline %d x %d, data %d), %s, %d steps of %d %s",
        config.recipe, topology.world_size, parallel_config.tensor, " + sequence" if parallel_config.sequence else "",
        parallel_config.pipeline, parallel_config.virtual_pipeline, topology.data_size, config.train.precision,
        start.plan.expected_steps(start.end), config.global_batch, "packs" if config.data.packs else "samples",
    )  # fmt: skip
    if config.run.fault_injection is not None:
        logger.warning("this is a rehearsal: faults are planned by run.fault_injection %s", config.run.fault_injection)
    logger.info("training %s: %d parameters on this rank", ", ".join(config.train.trainable_parts), trained)
    vision = config.vision
    logger.info("images: %s", f"features in {' '.join(config.data.features)}" if start.features else
                f"{vision.tower} tower, {vision.encoder_placement}{', a step ahead' if vision.prefetch_features else ''}",
                )  # fmt: skip
    for line in kernel_lines(config, start.kernels):
        logger.info("%s", line)
