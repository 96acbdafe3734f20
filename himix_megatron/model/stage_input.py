"""What a pipeline stage is given with a micro-batch, and a step cut into such inputs.

Flows in: a step as the loader reads it, and its images' features; out: a StageInput for each micro-batch, on the device. Where
vision stands in the text's sequence, the texts are made longer here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..config import Config
from ..data.loading.batch import NO_LOSS, MicroBatch, StepBatch
from ..data.loading.image_table import ImageTable, in_sequence, rows_in_text
from ..distributed.megatron_config import text_multiple
from .attention.kv_cache import KVCache
from .attention.packed_layout import PackedLayout


@dataclass(frozen=True, slots=True)
class StageInput:
    """What a stage is given with a micro-batch; text hidden states alone come through the pipeline."""

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
    vision_rows: Tensor | None = None
    """int64[T']: which of the B * S tokens of the text each vision token is, in the order of `images`; None: none is."""
    layout: PackedLayout | None = None
    """Of the micro-batch, where it was made before; None: the stage makes it."""

    def through(self, model_chunk: Any) -> Tensor:
        """What the stage makes of it: hidden states, losses or logits."""
        output: Tensor = model_chunk(
            self.text_ids, self.images, self.blank, self.image_table, labels=self.labels, cache=self.cache,
            packed_lengths=self.packed_lengths, labelled=self.labelled, layout=self.layout,
            vision_rows=self.vision_rows,
        )  # fmt: skip
        return output


def stage_inputs(batch: StepBatch, images: Tensor, config: Config, device: torch.device) -> list[StageInput]:
    """Cut a step into its micro-batches. `images`: features or pixels of all the step's images on this replica; without a row
    on a stage that takes no vision."""
    inputs = []
    vision_rows: list[Tensor | None] = [None] * len(batch.micro_batches)
    if config.injection.in_sequence:
        micro_batches, vision_rows = with_vision(batch.micro_batches, config)
        batch = replace(batch, micro_batches=micro_batches)
    tables = [micro_batch.images for micro_batch in batch.micro_batches]
    rows = [sum(table.rows(images)) if len(images) else 0 for table in tables]
    parts = torch.split(images, rows)
    blanks = torch.split(batch.blank, [len(table) for table in tables])
    for micro_batch, table, part, blank, rows_T in zip(batch.micro_batches, tables, parts, blanks, vision_rows, strict=True):
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
                vision_rows=None if rows_T is None else to_device(rows_T, device),
            )
        )
    return inputs


def with_vision(micro_batches: Sequence[MicroBatch], config: Config) -> tuple[tuple[MicroBatch, ...], list[Tensor | None]]:
    """A step's micro-batches with their vision tokens in the texts, padded to one length again; and each one's
    `StageInput.vision_rows`. The token before an answer's predicts it, also where an image stands between them."""
    tables = [in_sequence(part.images, config) for part in micro_batches]
    lengths = [
        part.text_lengths + torch.tensor(table.sample_tokens()) for part, table in zip(micro_batches, tables, strict=True)
    ]
    longest = max(int(own.sum() if part.packed else own.max()) for part, own in zip(micro_batches, lengths, strict=True))
    width, expanded, vision_rows = -(-longest // (multiple := text_multiple(config))) * multiple, [], list[Tensor | None]()
    for part, own, table in zip(micro_batches, lengths, tables, strict=True):
        rows = rows_in_text(part.text_lengths.tolist(), table, None if part.packed else width)
        text_rows, of_vision = map(torch.from_numpy, rows)
        filled = part.text_lengths.sum()[None] if part.packed else part.text_lengths
        is_text = torch.arange(part.text_ids.shape[1]) < filled[:, None]
        text_ids = torch.zeros(len(part.text_ids), width, dtype=torch.int64)
        text_ids.view(-1)[text_rows] = part.text_ids[is_text]
        labels = torch.full_like(text_ids, NO_LOSS)
        labels.view(-1)[text_rows[1:] - 1] = part.labels[is_text][:-1]  # a sample's last token has none
        expanded.append(replace(part, text_ids=text_ids, labels=labels, text_lengths=own))
        vision_rows.append(of_vision)
    return tuple(expanded), vision_rows


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor there; from the host to a GPU by a copy that the host does not wait for."""
    pins = device.type != "cpu" and tensor.device.type == "cpu"
    return (tensor.pin_memory() if pins else tensor).to(device, non_blocking=pins)
