"""A dataset in, what it holds in numbers out: every sample's images and sizes from the indexes, text and formats of some."""

from __future__ import annotations

import os
import random
import tarfile
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from himix_megatron.data.errors import BadSampleError
from himix_megatron.data.loading.token_counts import read_column
from himix_megatron.data.shards import shard_format
from himix_megatron.data.shards.reader import DamagedShardError, ShardDataset, read_index
from himix_megatron.data.shards.shard_format import Receipt, Records
from himix_megatron.runtime.untrusted_files import open_below

Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Statistics:
    """Arrays have one number for each sample or image, in the order of the dataset."""

    images_per_sample: Numbers
    image_widths: Numbers
    """Pixels, as seen."""
    image_heights: Numbers
    image_bytes: Numbers
    """Bytes of the stored files."""
    text_tokens: Mapping[str, Numbers]
    """By column under DIR/lengths: one for each tokenizer and template that was used. Only whole columns."""
    num_looked_at: int
    """Samples whose text and headers were read; the fields below describe these."""
    characters: Numbers
    """Characters of a sample's text, all turns together."""
    turns: Numbers
    formats: Mapping[str, int]
    """Images by the suffix of their format."""
    num_unreadable: int
    """Unreadable samples among them, which count nowhere else."""


def statistics(
    dataset: ShardDataset, num_texts: int, seed: int = 0, progress: Callable[[int, int], None] = lambda done, total: None
) -> Statistics:
    """Look at all indexes, and at `num_texts` samples drawn at random (all, where there are no more).

    `progress` is called with the samples looked at so far, and of all to look at.
    Raises: ValueError for an index that is not what was written.
    """
    drawn = draw(dataset, num_texts, seed)
    samples, images = [np.zeros(0, shard_format.SAMPLE_RECORD)], [np.zeros(0, shard_format.IMAGE_RECORD)]
    texts, formats, start = [], Counter[str](), 0
    for receipt in dataset.manifest.shards:
        try:
            index = read_index(dataset.path, receipt)
        except DamagedShardError as error:
            raise ValueError(f"{error} (--verify names all that is damaged)") from None
        samples.append(index.samples)
        images.append(index.images)
        chosen = drawn[bisect_left(drawn, start) : bisect_left(drawn, start + receipt.num_samples)]
        texts += [_text(dataset, i) for i in chosen]
        formats.update(_formats(dataset, receipt, index.samples[[i - start for i in chosen]], index.images))
        start += receipt.num_samples
        progress(len(texts), len(drawn))
    all_samples, all_images = np.concatenate(samples), np.concatenate(images)
    read = [turns for turns in texts if turns is not None]
    return Statistics(
        images_per_sample=all_samples["num_images"].astype(np.int64),
        image_widths=all_images["width"].astype(np.int64),
        image_heights=all_images["height"].astype(np.int64),
        image_bytes=all_images["size"].astype(np.int64),
        text_tokens=_columns(dataset),
        num_looked_at=len(texts),
        characters=np.array([sum(map(len, turns)) for turns in read], np.int64),
        turns=np.array([len(turns) for turns in read], np.int64),
        formats=dict(formats.most_common()),
        num_unreadable=len(texts) - len(read),
    )


def draw(dataset: ShardDataset, num_samples: int, seed: int) -> list[int]:
    """Different sample numbers, rising; the same ones for the same seed."""
    return sorted(random.Random(seed).sample(range(len(dataset)), min(num_samples, len(dataset))))


def _text(dataset: ShardDataset, i: int) -> list[str] | None:
    """What is said in each turn of sample i; None where it cannot be read."""
    try:
        return [str(turn["value"]) for turn in dataset.text(i)["conversations"]]
    except BadSampleError:
        return None


def _formats(dataset: ShardDataset, receipt: Receipt, samples: Records, images: Records) -> Iterator[str]:
    """The suffixes of these samples' images: names are in the tar's headers only."""
    with open_below(dataset.path, shard_format.shard_files(receipt.name).tar) as tar:
        for sample in samples:
            first = int(sample["first_image"])
            for record in images[first : first + int(sample["num_images"])]:
                header = os.pread(tar.fileno(), shard_format.BLOCK, int(record["offset"]) - shard_format.BLOCK)
                try:
                    yield tarfile.TarInfo.frombuf(header, "ascii", "strict").name.rpartition(".")[2]
                except (tarfile.HeaderError, ValueError):
                    yield "damaged header"


def _columns(dataset: ShardDataset) -> dict[str, Numbers]:
    """Every column of text lengths that all shards have."""
    columns = {}
    for folder in sorted((dataset.path / "lengths").glob("*")):
        parts = [read_column(dataset.path, receipt, folder.name) for receipt in dataset.manifest.shards]
        if parts and all(part is not None for part in parts):
            columns[folder.name] = np.concatenate([part.lengths for part in parts if part is not None]).astype(np.int64)
    return columns
