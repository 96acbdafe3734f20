"""What the loader hands to training: a step's texts for one data-parallel rank, and this rank's share of its images."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from himix_megatron.data.conversation import EncodedText

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
    images_per_sample: tuple[int, ...]
    """n numbers; with text_only "zero_image" a sample without an image counts one blank image."""
    keys: tuple[str, ...]
    """SHARD/KEY of each sample."""
    packed: bool = False


@dataclass(frozen=True, slots=True)
class StepBatch:
    """One optimizer step of one data-parallel rank. K counts all its images: by micro-batch, sample, image."""

    step: int
    micro_batches: tuple[MicroBatch, ...]
    """All padded to one S."""
    blank: Tensor
    """bool[K]: the image is all zero after normalisation, whatever its pixels say."""
    pixels: Tensor
    """uint8[K_share, 3, H, W]: the images `share_of(K, replica_rank, replica_size)`; zeros where blank."""
    bad_keys: tuple[str, ...]
    """Samples that this rank could not read or decode."""
    bad_samples: tuple[int, ...] = ()
    """Their places, counted over micro-batches and samples. A damaged image is seen only by the rank that decodes it: where a
    replica has several ranks, they agree on the union and apply `without_loss`. (Damaged texts are seen by every rank, and
    in a replica of one rank there is nobody to agree with: those samples have no loss already.)"""
    num_cut: int = 0
    """Samples whose text was cut to data.max_text_tokens."""


def share_of(num_images: int, replica_rank: int, replica_size: int) -> range:
    """Which of a step's images one rank of a replica encodes: contiguous, ceil(K / R) each, the last ones fewer or none."""
    each = -(-num_images // replica_size)
    return range(min(replica_rank * each, num_images), min((replica_rank + 1) * each, num_images))


def collate(
    texts: Sequence[EncodedText], images_per_sample: Sequence[int], keys: Sequence[str], padded_length: int
) -> MicroBatch:
    """Put B texts, none longer than `padded_length`, into one micro-batch."""
    text_ids = torch.zeros(len(texts), padded_length, dtype=torch.int64)
    labels = torch.full_like(text_ids, NO_LOSS)
    for b, text in enumerate(texts):
        ids, counts = torch.from_numpy(text.ids), torch.from_numpy(text.loss_mask)
        text_ids[b, : len(ids)] = ids
        labels[b, : len(ids) - 1] = ids[1:].masked_fill(~counts[1:], NO_LOSS)
    lengths = torch.tensor([len(text.ids) for text in texts])
    return MicroBatch(text_ids, labels, lengths, tuple(images_per_sample), tuple(keys))


def without_loss(batch: StepBatch, samples: Collection[int]) -> StepBatch:
    """The same step with all labels of some samples (numbered as `bad_samples`) set to -100. Their slots stay."""
    if not samples:
        return batch
    micro_batches, first = [], 0
    for micro_batch in batch.micro_batches:
        end = first + len(micro_batch.keys)
        labels = micro_batch.labels.clone()
        labels[[i - first for i in samples if first <= i < end]] = NO_LOSS
        micro_batches.append(dataclasses.replace(micro_batch, labels=labels))
        first = end
    return dataclasses.replace(batch, micro_batches=tuple(micro_batches))
