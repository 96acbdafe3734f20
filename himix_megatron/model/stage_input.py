"""What a pipeline stage is given with a micro-batch, and a step cut into such inputs.

Flows in: a step as the loader reads it, and its images' features; out: a StageInput for each micro-batch, on the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..data.loading.batch import StepBatch
from ..data.loading.image_table import ImageTable
from .attention.kv_cache import KVCache
from .attention.packed_layout import PackedLayout


@dataclass(frozen=True, slots=True)
class StageInput:
    """What every stage is given with a micro-batch; text hidden states alone come through the pipeline."""

    text_ids: Tensor
    """int64[B, S]."""
    images: Tensor
    """Features float[T, V] of the micro-batch's images, one after the other; where the tower trains their pixels, as
    `blank_pixels` lays them out."""
    blank: Tensor
    """bool[K], images that stand for "no image"."""
    image_table: ImageTable
    """The same K images, without their pixels."""
    labels: Tensor | None = None
    """int64[B, S], -100 for no loss; None: logits are wanted."""
    packed_lengths: tuple[int, ...] | None = None
    """Text tokens of each sample, where B is 1 and the row holds n samples one after the other; None: a row is a sample."""
    token_sources: Tensor | None = None
    """int64[B, S]: which of `num_sources` datasets each token is from, where their losses are wanted apart."""
    num_sources: int = 0
    labelled: Tensor | None = None
    """int64[M]: which of the B * S labels count; None: the stage finds out."""
    cache: KVCache | None = None
    """Generation: the images and the text before `text_ids`; `images` is not read then."""
    layout: PackedLayout | None = None
    """Of the micro-batch, where it was made before; None: the stage makes it."""

    def through(self, model_chunk: Any) -> Tensor:
        """What the stage makes of it: hidden states, losses or logits."""
        output: Tensor = model_chunk(
            self.text_ids, self.images, self.blank, self.image_table, labels=self.labels, cache=self.cache,
            packed_lengths=self.packed_lengths, labelled=self.labelled, layout=self.layout,
        )  # fmt: skip
        return output


def stage_inputs(batch: StepBatch, images: Tensor, device: torch.device) -> list[StageInput]:
    """Cut a step into its micro-batches. `images`: features or pixels of all the step's images on this replica."""
    inputs = []
    tables = [micro_batch.images for micro_batch in batch.micro_batches]
    rows = [sum(table.rows(images)) if len(images) else 0 for table in tables]  # a stage that takes no vision gets none
    parts = torch.split(images, rows)
    blanks = torch.split(batch.blank, [len(table) for table in tables])
    for micro_batch, table, part, blank in zip(batch.micro_batches, tables, parts, blanks, strict=True):
        inputs.append(
            StageInput(
                text_ids=to_device(micro_batch.text_ids, device),
                images=part,
                blank=to_device(blank, device),
                image_table=table,
                labels=to_device(micro_batch.labels, device),
                labelled=to_device((micro_batch.labels.flatten() >= 0).nonzero()[:, 0], device),
                packed_lengths=tuple(micro_batch.text_lengths.tolist()) if micro_batch.packed else None,
                token_sources=to_device(micro_batch.token_sources(), device) if batch.num_sources > 1 else None,
                num_sources=batch.num_sources if batch.num_sources > 1 else 0,
            )
        )
    return inputs


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor there; from the host to a GPU by a copy that the host does not wait for."""
    pins = device.type != "cpu" and tensor.device.type == "cpu"
    return (tensor.pin_memory() if pins else tensor).to(device, non_blocking=pins)
