"""What the loader hands to training: a step's texts for one data-parallel rank, and this rank's share of its images."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..text.chat_template import EncodedText
from .image_table import ImageTable
from .plan import DataPosition

NO_LOSS = -100
"""Label of a position whose prediction does not count (torch's `ignore_index`)."""


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """The texts of n samples: n rows, each right-padded to S tokens; or packed, one after the other in a single row of S.

    Packed sample i lies at [sum(text_lengths[:i]), sum(text_lengths[:i + 1])) of the row, its positions start at 0 again,
    and it sees nothing of the other samples; what is left of the row is padding.
    """

    text_ids: Tensor
    """int64[n, S], packed int64[1, S]; padded with 0."""
    labels: Tensor
    """As text_ids: the token to predict at each position, i.e. the sample's next one; -100: no loss."""
    text_lengths: Tensor
    """int64[n]: tokens of each sample."""
    images: ImageTable
    """The samples' images; with text_only_vision "zero_image" a sample without an image has one blank image."""
    keys: tuple[str, ...]
    """SHARD/KEY of each sample."""
    sources: tuple[int, ...] = ()
    """Which dataset of `data.datasets` each sample is from."""
    packed: bool = False

    def token_sources(self) -> Tensor:
        """int64 as text_ids: which dataset each token is from; 0 for padding."""
        sources = torch.tensor(self.sources)
        if not self.packed:
            # A number of its own for each token: memory that is pinned cannot be written through one that stands for many.
            return sources[:, None].expand(self.text_ids.shape).contiguous()
        found = torch.zeros_like(self.text_ids)
        found[0, : int(self.text_lengths.sum())] = sources.repeat_interleave(self.text_lengths)
        return found

    def answer_tokens(self) -> list[int]:
        """Tokens with loss of each sample."""
        counted = self.labels != NO_LOSS
        if not self.packed:
            return [int(number) for number in counted.sum(1)]
        lengths = self.text_lengths.tolist()
        return [int(own.sum()) for own in torch.split(counted[0, : sum(lengths)], lengths)]


@dataclass(frozen=True, slots=True)
class StepBatch:
    """One optimizer step of one data-parallel rank. K counts all its images: by micro-batch, sample, image."""

    step: int
    micro_batches: tuple[MicroBatch, ...]
    """All padded to one S."""
    blank: Tensor
    """bool[K]: the image is all zero after normalisation, whatever its pixels say."""
    pixels: Tensor
    """Of this rank's share of the images (`divide_images`), in their order: pixels as `blank_pixels` makes them, zeros where
    blank; or in their place features[T_share, V] that were made before, the all-zero image's where blank."""
    bad_keys: tuple[str, ...]
    """Samples that this rank could not read or decode."""
    after: DataPosition
    """Where in the data the run stands after this step."""
    is_last: bool
    """The run ends with this step."""
    num_samples: int
    """Samples of the step over all data ranks."""
    bad_samples: tuple[int, ...] = ()
    """Their places, counted over micro-batches and samples; they have no loss. A damaged image is seen only by the rank that
    decodes it, a damaged text by those that read texts: where a replica has several ranks, they agree on the union and
    apply `mask_samples`."""
    num_cut: int = 0
    """Samples whose text was cut to data.max_text_tokens."""
    num_sources: int = 1
    """Datasets that the run reads: what `MicroBatch.sources` counts."""

    @property
    def images(self) -> ImageTable:
        """All K images."""
        return ImageTable.joined(micro_batch.images for micro_batch in self.micro_batches)


def collate(
    texts: Sequence[EncodedText | None],
    lengths: Sequence[int],
    images: ImageTable,
    keys: Sequence[str],
    sources: Sequence[int],
    width: int,
    *,
    packed: bool,
) -> MicroBatch:
    """Put the texts of n samples into one micro-batch of rows of `width` tokens: a row each, or packed into one.

    `lengths`: n numbers, of each text. None stands for a text that was not read: zeros in its place, and no loss.
    """
    text_ids = torch.zeros(1 if packed else len(texts), width, dtype=torch.int64)
    labels = torch.full_like(text_ids, NO_LOSS)
    start = 0
    for row, (text, length) in enumerate(zip(texts, lengths, strict=True)):
        if text is not None:
            ids, counts = torch.from_numpy(text.ids), torch.from_numpy(text.loss_mask)
            into = (0, slice(start, start + length)) if packed else (row, slice(length))
            text_ids[into] = ids
            labels[into][:-1] = ids[1:].masked_fill(~counts[1:], NO_LOSS)
        start += length
    return MicroBatch(text_ids, labels, torch.tensor(lengths), images, tuple(keys), tuple(sources), packed)


def pinned(batch: StepBatch) -> StepBatch:
    """The same step in page-locked memory: from anywhere else a copy to the GPU keeps the host waiting for what is queued."""
    micro_batches = tuple(
        dataclasses.replace(part, text_ids=part.text_ids.pin_memory(), labels=part.labels.pin_memory())
        for part in batch.micro_batches
    )
    pixels, blank = batch.pixels.pin_memory(), batch.blank.pin_memory()
    return dataclasses.replace(batch, micro_batches=micro_batches, pixels=pixels, blank=blank)


def mask_samples(batch: StepBatch, samples: Collection[int]) -> StepBatch:
    """The same step with all labels of some samples (numbered as `bad_samples`) set to -100. Their slots stay."""
    if not samples:
        return batch
    micro_batches, first = [], 0
    for micro_batch in batch.micro_batches:
        end = first + len(micro_batch.keys)
        labels = micro_batch.labels.clone()
        starts = [0, *micro_batch.text_lengths.cumsum(0).tolist()]
        for i in (sample - first for sample in samples if first <= sample < end):
            if micro_batch.packed:
                labels[0, starts[i] : starts[i + 1]] = NO_LOSS
            else:
                labels[i] = NO_LOSS
        micro_batches.append(dataclasses.replace(micro_batch, labels=labels))
        first = end
    return dataclasses.replace(batch, micro_batches=tuple(micro_batches))
