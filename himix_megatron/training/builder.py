"""What a run works with on this rank: encoder, model chunks, optimizer and checkpoints.

Flows in: Config, RunInputs and Topology; out: TrainingComponents.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from megatron.core.distributed import DistributedDataParallel

from ..checkpoint.checkpointer import Checkpoints
from ..checkpoint.run_lock import RunLock
from ..config import Config
from ..distributed.control_group import ControlGroup
from ..distributed.megatron_config import kernel_lines, overlaps, params_dtype
from ..distributed.topology import Topology
from ..model.feature_prefetch import FeaturePrefetcher
from ..model.himix_model import build_model_chunks, finalize_gradients
from ..model.micro_batch_graphs import MicroBatchGraphs
from ..model.towers import build_tower
from ..model.vision_encoder import ShardedVisionEncoder, encoder_share, feature_ranks
from ..monitoring.pipeline_timers import ScheduleTimers
from .data_setup import RunInputs
from .optimizer import build_optimizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TrainingComponents:
    """What training works with on this rank."""

    config: Config
    topology: Topology
    model_chunks: list[DistributedDataParallel]
    """One model chunk, or several with an interleaved pipeline."""
    encoder: ShardedVisionEncoder
    prefetcher: FeaturePrefetcher
    optimizer: Any
    checkpoints: Checkpoints
    schedule_timers: ScheduleTimers
    graphs: MicroBatchGraphs | None = None
    """None unless micro-batches run as CUDA graphs."""


def build_components(
    config: Config,
    inputs: RunInputs,
    topology: Topology,
    *,
    ranks: ControlGroup | None = None,
    run_lock: RunLock | None = None,
) -> TrainingComponents:
    """Tower, model chunks, optimizer and checkpoints of this rank. `ranks`, `run_lock`: as `Checkpoints` takes them."""
    trainable = "tower" in config.train.trainable_parts
    tower = build_tower(config.vision, seed=config.train.seed, dtype=params_dtype(config)).requires_grad_(trainable)
    if not inputs.features or (inputs.held_out is not None and not inputs.held_out_features):
        tower = tower.to(topology.device)  # with cached features it stays on the host: only checkpoints need it
    model_chunks = build_model_chunks(config, inputs.kernels, topology, tower)
    optimizer = build_optimizer(config, model_chunks)
    mcore_config = model_chunks[0].config
    mcore_config.grad_scale_func = optimizer.scale_loss
    schedule_timers = ScheduleTimers(topology.device)
    mcore_config.timers = schedule_timers
    mcore_config.finalize_model_grads_func = schedule_timers.ends_with(finalize_gradients)
    if overlaps(config):
        # Gradients are summed over data ranks in the last micro-batch's backward pass only.
        syncs = [model_chunk.no_sync for model_chunk in model_chunks]
        mcore_config.no_sync_func = syncs if len(syncs) > 1 else syncs[0]
    return TrainingComponents(
        config=config,
        topology=topology,
        model_chunks=model_chunks,
        encoder=ShardedVisionEncoder(
            tower,
            None if config.vision.encoder_placement == "replicated" else topology.encoding,
            trainable=trainable,
            dtype=params_dtype(config),
            device=topology.device,
            place=encoder_share(config, topology),
            receivers=feature_ranks(config),
        ),
        prefetcher=FeaturePrefetcher(topology.device, enabled=config.vision.prefetch_features),
        optimizer=optimizer,
        checkpoints=Checkpoints(config, model_chunks, optimizer, None if trainable else tower, run_lock, ranks),
        schedule_timers=schedule_timers,
        graphs=MicroBatchGraphs(config, model_chunks[0]) if config.train.cuda_graphs == "on" else None,
    )


def describe(config: Config, inputs: RunInputs, run: TrainingComponents) -> None:
    """Log what runs: layout, trainable parts, kernels."""
    parallel_config, topology = config.parallel, run.topology
    trained = sum(p.numel() for model_chunk in run.model_chunks for p in model_chunk.parameters() if p.requires_grad)
    logger.info(
        "%s: %d ranks (tensor %d%s, pipeline %d x %d, data %d), %s, %d steps of %d %s",
        config.recipe, topology.world_size, parallel_config.tensor, " + sequence" if parallel_config.sequence else "",
        parallel_config.pipeline, parallel_config.virtual_pipeline, topology.data_size, config.train.precision,
        inputs.planned_steps, config.global_batch, "packs" if config.data.packs else "samples",
    )  # fmt: skip
    if config.run.fault_injection is not None:
        logger.warning("fault injection is on (run.fault_injection %s)", config.run.fault_injection)
    logger.info("training %s: %d parameters on this rank", ", ".join(config.train.trainable_parts), trained)
    vision = config.vision
    logger.info("images: %s", f"features in {' '.join(config.data.features)}" if inputs.features else
                f"{vision.tower} tower, {vision.encoder_placement}{', a step ahead' if vision.prefetch_features else ''}",
                )  # fmt: skip
    for line in kernel_lines(config, inputs.kernels):
        logger.info("%s", line)
