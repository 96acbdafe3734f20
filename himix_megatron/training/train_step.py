"""One optimizer step on all ranks: its batch with features, forward and backward passes, the loss guard's decision, the update.

Flows in: batches as this rank reads them; out: what the step processed over all ranks, and the decision.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ..config import Config
from ..data.loading.batch import StepBatch, mask_samples, pinned
from ..distributed.topology import Topology
from ..model.schedule import run_losses
from ..model.stage_input import stage_inputs
from ..monitoring.metrics import StepCounts
from ..resilience.loss_guard import StepDecision
from ..runtime.failpoints import failpoint
from ..runtime.stop_signals import StopConsensus, StopRequest
from .builder import TrainingComponents
from .optimizer import gradient_norm, update

logger = logging.getLogger(__name__)


def synced_batches(
    run: TrainingComponents, batches: Iterable[StepBatch], request: StopRequest
) -> Iterator[tuple[StepBatch, Tensor]]:
    """As `with_features`, each step once all ranks have it; none after a stop request on any rank."""
    return with_features(run, batches, StopConsensus(request, run.topology.control))


def with_features(
    run: TrainingComponents, batches: Iterable[StepBatch], stop: StopConsensus | None = None
) -> Iterator[tuple[StepBatch, Tensor]]:
    """Each step with its images (features or pixels), prepared while the step before it trains (see `FeaturePrefetcher`)."""

    def encode(batch: StepBatch) -> tuple[StepBatch, Tensor]:
        batch = agree_on_bad(batch, run.topology)
        return batch, run.encoder.encode(batch.pixels, batch.blank, batch.images)

    return run.prefetcher.steps(_read(batches, run.topology.device), encode, stop)


def _read(batches: Iterable[StepBatch], device: torch.device) -> Iterator[StepBatch]:
    """The steps in memory from which they can be copied to the device; runs on the prefetcher's thread."""
    source = iter(batches)
    while True:
        failpoint("data/wait")
        if (batch := next(source, None)) is None:
            return
        yield pinned(batch) if device.type != "cpu" else batch


def train_step(
    config: Config, run: TrainingComponents, batch: StepBatch, images: Tensor, check: Callable[[float, bool], StepDecision]
) -> tuple[StepCounts, float, StepDecision]:
    """One optimizer step, if `check(loss, finite)` decides for the update, which it decides alike on every rank. The host waits
    for the device once, in `count`; megatron-core may wait for it too.

    Returns: what it processed over all ranks, the gradient's global norm before clipping, and the decision.
    """
    for model_chunk in run.model_chunks:
        model_chunk.zero_grad_buffer()
    run.optimizer.zero_grad()
    reported = run_schedule(run, batch, images, forward_only=False)
    failpoint("step/gradient", (buffer.grad_data for model_chunk in run.model_chunks for buffer in model_chunk.buffers))
    own_norm, own_finite = gradient_norm(run.optimizer), has_finite_gradients(run)
    failpoint("step/collective", progress=True)
    counts, finite, norm = count(run.topology, batch, reported, finite=own_finite, norm=own_norm)
    decision = check(counts.loss, finite)
    if decision.action == "update":
        failpoint("step/optimizer", progress=True)
        update(run.optimizer, norm, config.optimizer.clip_norm)
    return counts, norm, decision


def has_finite_gradients(run: TrainingComponents) -> Tensor:
    """bool[] on the device: whether all gradients that this rank holds are finite, also those that another rank counts in the
    norm."""
    largest = [
        torch.linalg.vector_norm(buffer.grad_data, ord=math.inf)
        for model_chunk in run.model_chunks
        for buffer in model_chunk.buffers + model_chunk.expert_parallel_buffers
        if buffer.grad_data.numel()
    ]
    device = run.topology.device
    return torch.stack(largest).isfinite().all() if largest else torch.ones((), dtype=torch.bool, device=device)


def run_schedule(run: TrainingComponents, batch: StepBatch, images: Tensor, *, forward_only: bool) -> list[Tensor]:
    """Forward (and backward) over a step's micro-batches. `images`: as `with_features` gives them.

    Returns: for each micro-batch what `loss.answer_loss` reports, on the last stage; elsewhere nothing.
    """
    inputs = stage_inputs(batch, images, run.config, run.topology.device)
    return run_losses(run.model_chunks, inputs, forward_only=forward_only, graphs=run.graphs)


def agree_on_bad(batch: StepBatch, topology: Topology) -> StepBatch:
    """The same step on every rank of a replica: an image that one rank could not read is blank, without loss, on all."""
    if topology.replica_size == 1:
        return batch
    num_samples = sum(len(m.keys) for m in batch.micro_batches)
    marks = torch.zeros(len(batch.blank) + num_samples, dtype=torch.uint8)
    marks[: len(batch.blank)] = batch.blank
    marks[[len(batch.blank) + sample for sample in batch.bad_samples]] = 1
    torch.distributed.all_reduce(marks, op=torch.distributed.ReduceOp.MAX, group=topology.replica_control)
    bad = marks[len(batch.blank) :].nonzero().flatten().tolist()
    keys = [key for m in batch.micro_batches for key in m.keys]
    blank = marks[: len(batch.blank)].bool()
    agreed = replace(
        batch,
        blank=blank if topology.device.type == "cpu" else blank.pin_memory(),
        bad_samples=tuple(bad),
        bad_keys=tuple(keys[sample] for sample in bad),
    )
    return mask_samples(agreed, bad)


def own_totals(
    topology: Topology, batch: StepBatch, reported: list[Tensor], finite: Tensor | bool, norm: Tensor | float
) -> Tensor:
    """What this rank adds to the sums of a step, in the order in which `count` names them: float64[9], and 2 more for each of
    several sources."""
    num_sources = batch.num_sources if batch.num_sources > 1 else 0
    totals = torch.zeros(9 + 2 * num_sources, dtype=torch.float64, device=topology.device)
    totals[8] = norm
    totals[7] = ~(totals[8].isfinite() & finite)
    if topology.rank > 0:
        totals[8] = 0.0
    if topology.is_last_stage and topology.tensor_rank == 0:
        found = torch.stack(reported).sum(0)
        totals[:2], totals[9:] = found[:2], found[2:]
    if topology.replica_rank == 0:
        counts = text_tokens_read(batch), *vision_seen(batch), len(batch.bad_keys), batch.num_cut
        for number, value in enumerate(counts, 2):
            totals[number] = value
    return totals


def count(
    topology: Topology,
    batch: StepBatch,
    reported: list[Tensor],
    *,
    finite: Tensor | bool = True,
    norm: Tensor | float = 0.0,
) -> tuple[StepCounts, bool, float]:
    """Sum the step over all ranks, with one collective and one wait for the device: the loss from the last stages, the counts
    once from each replica.

    Returns: the counts; whether loss, norm and the gradients of all ranks (`finite`) are finite; and rank 0's norm.
    """
    if batch.bad_keys:
        logger.warning("could not read %s: no loss from them", ", ".join(batch.bad_keys))
    totals = own_totals(topology, batch, reported, finite, norm)
    torch.distributed.all_reduce(totals)
    loss, answer_tokens, text_tokens, images, vision_tokens, bad, cut, not_finite, whole_norm, *apart = totals.tolist()
    counts = StepCounts(
        loss=loss / answer_tokens if answer_tokens else math.nan,
        answer_tokens=int(answer_tokens),
        text_tokens=int(text_tokens),
        vision_tokens=int(vision_tokens),
        images=int(images),
        bad_samples=int(bad),
        truncated_samples=int(cut),
        sources=tuple(zip(apart[::2], apart[1::2], strict=True)),
    )
    return counts, not_finite == 0 and (not answer_tokens or math.isfinite(loss)), whole_norm


def text_tokens_read(batch: StepBatch) -> int:
    """Text tokens of a step on this replica, without padding and without samples that could not be read."""
    lengths = torch.cat([m.text_lengths for m in batch.micro_batches])
    return int(lengths.sum() - lengths[list(batch.bad_samples)].sum())


def vision_seen(batch: StepBatch) -> tuple[int, int]:
    """Real images of a step on this replica, and their tokens; those that stand for "no image" are not counted."""
    real = ~batch.blank
    return int(real.sum()), int(torch.tensor(batch.images.tokens, dtype=torch.int64)[real].sum())
