"""One pass over micro-batches through megatron-core's schedules: what training, validation and generation share.

Flows in: this rank's model chunks and, per micro-batch, text and images; out: what the last stage reports.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from . import progress
from .data.batch import StepBatch
from .loss import answer_loss
from .model.kv_cache import KVCache


@dataclass(frozen=True, slots=True)
class StageInput:
    """What every stage is given with a micro-batch; text hidden states alone come through the pipeline."""

    text_ids: Tensor
    """int64[B, S]."""
    images: Tensor
    """Features float[K, n, V] of the micro-batch's images; pixels uint8[K, 3, height, width] where the tower trains."""
    blank: Tensor
    """bool[K], images that stand for "no image"."""
    images_per_sample: tuple[int, ...]
    """Of each sample."""
    labels: Tensor | None = None
    """int64[B, S], -100 for no loss; None: logits are wanted."""
    packed_lengths: tuple[int, ...] | None = None
    """Text tokens of each sample, where B is 1 and the row holds n samples one after the other; None: a row is a sample."""
    token_sources: Tensor | None = None
    """int64[B, S]: which of `num_sources` datasets each token is from, where their losses are wanted apart."""
    num_sources: int = 0
    cache: KVCache | None = None
    """Generation: the images and the text before `text_ids`; `images` is not read then."""


def stage_inputs(batch: StepBatch, images: Tensor, device: torch.device) -> list[StageInput]:
    """Cut a step into its micro-batches. `images`: features or pixels of all the step's images on this replica."""
    inputs, first = [], 0
    for micro_batch in batch.micro_batches:
        own = slice(first, first + sum(micro_batch.images_per_sample))
        first = own.stop
        inputs.append(
            StageInput(
                text_ids=micro_batch.text_ids.to(device),
                images=images[own],
                blank=batch.blank[own].to(device),
                images_per_sample=micro_batch.images_per_sample,
                labels=micro_batch.labels.to(device),
                packed_lengths=tuple(micro_batch.text_lengths.tolist()) if micro_batch.packed else None,
                token_sources=micro_batch.token_sources().to(device) if batch.num_sources > 1 else None,
                num_sources=batch.num_sources if batch.num_sources > 1 else 0,
            )
        )
    return inputs


def run_losses(stages: list[DistributedDataParallel], inputs: Sequence[StageInput], *, forward_only: bool) -> list[Tensor]:
    """Forward, and backward unless `forward_only`, over micro-batches of equal shape.

    Returns: on the last stage per micro-batch what `answer_loss` reports; elsewhere nothing.
    """
    return _run(stages, inputs, _loss, forward_only=forward_only)


def run_logits(
    stages: list[DistributedDataParallel], inputs: Sequence[StageInput], take: Callable[[int, Tensor], Tensor]
) -> list[Tensor]:
    """Forward without labels. `take(micro_batch, logits float[B, S, vocab/TP])` says what to keep.

    Returns: on the last stage what was kept, per micro-batch; elsewhere nothing.
    """
    numbers = iter(range(len(inputs)))
    return _run(
        stages, inputs, lambda _: lambda logits, non_loss_data: take(next(numbers), logits), forward_only=True, raw=True
    )


def _loss(given: StageInput) -> Callable[[Tensor], Any]:
    assert given.labels is not None
    return partial(answer_loss, given.labels, token_sources=given.token_sources, num_sources=given.num_sources)


def _run(
    stages: list[DistributedDataParallel],
    inputs: Sequence[StageInput],
    report: Callable[[StageInput], Callable[..., Any]],
    *,
    forward_only: bool,
    raw: bool = False,
) -> list[Tensor]:
    def forward_step(iterator: Iterator[StageInput], stage: DistributedDataParallel) -> tuple[Tensor, Any]:
        given = next(iterator)
        if not forward_only:
            progress.at("step/forward")
        output = stage(
            given.text_ids, given.images, given.blank, given.images_per_sample,
            labels=given.labels, cache=given.cache, packed_lengths=given.packed_lengths,
        )  # fmt: skip
        if output.requires_grad:
            output.register_hook(lambda _: progress.at("step/backward"))
        return output, report(given)

    num_samples, length = inputs[0].text_ids.shape
    reported: list[Tensor] = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(inputs) for _ in stages],
        model=stages,
        num_microbatches=len(inputs),
        seq_length=length,
        micro_batch_size=num_samples,
        forward_only=forward_only,
        collect_non_loss_data=raw,
    )
    return reported
