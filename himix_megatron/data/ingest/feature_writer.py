"""Encodes images and writes feature files. The layout is in loading/feature_cache.py.

A file is written beside its place, synced and renamed, and its receipt last, so what has a receipt is whole.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...runtime.durable_files import file_digest, sync_file
from ..errors import BadSampleError
from ..loading import feature_cache
from ..loading.feature_cache import BLANK, Dtype, FeatureReceipt, Layout, token_starts
from ..loading.image_table import ImageTable, Size, token_batches
from ..loading.vision_reader import PixelReader
from ..shards.reader import ShardDataset
from ..shards.shard_format import shard_files
from ..shards.storage import LocalFolder
from .shard_writer import load_receipt, write_record

log = logging.getLogger(__name__)

FP8_MAX = 448.0
"""Largest float8_e4m3fn."""

Encode = Callable[[Tensor, Tensor, Sequence[Size]], Tensor]
"""(pixels as `blank_pixels` lays them out, blank bool[K], sizes of the K images) -> features [T, V] on the CPU."""
Batch = tuple[Tensor, Tensor, ImageTable]
"""Pixels of some images, bool[K] of those that have none, and the table of the images."""


@dataclass(frozen=True, slots=True)
class FeatureJob:
    """Which feature file to make, and where."""

    folder: LocalFolder
    attempt: Path
    """Where files are written before they are renamed; this attempt's own."""
    key_hash: str
    dtype: Dtype
    shape: tuple[int | None, int]
    """(n, V) of one image; n None: images differ."""
    shard: int | None
    """Of the dataset; None: the blank image."""


def pack(computed_TV: Tensor, dtype: Dtype) -> tuple[Tensor, Tensor | None]:
    """Features as they are stored: bf16[T, V] and None, or float8_e4m3fn[T, V] and scales float32[T]."""
    if dtype == "bf16":
        return computed_TV.bfloat16(), None
    wide = computed_TV.float()
    scales = (wide.abs().amax(dim=-1) / FP8_MAX).clamp(min=torch.finfo(torch.float32).tiny)
    # A quotient may round to just above the largest number, which has no neighbour but NaN.
    return (wide / scales[..., None]).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn), scales


def make_features(
    job: FeatureJob, dataset: ShardDataset, encode: Encode, reader: PixelReader, *, max_tokens: int, pool: Executor
) -> tuple[FeatureReceipt, bool]:
    """See that a feature file exists: verify it by its receipt, or write it.

    Args: max_tokens: vision tokens that are encoded at once; pool: threads that decode.
    Returns: the receipt, and whether the file was written.
    """
    name = BLANK if job.shard is None else dataset.manifest.shards[job.shard].name
    receipt = load_receipt(job.folder, FeatureReceipt, name)
    if receipt is not None and receipt.name == name and is_whole(job, receipt):
        return receipt, False
    partial = job.attempt / f"{name}.safetensors"
    if job.shard is None:
        source, images = "", ImageTable.of(reader.vision, [[reader.vision.blank_size]])
        batches = iter([(reader.blanks(images), torch.ones(1, dtype=torch.bool), images)])
    else:
        source, places = dataset.manifest.shards[job.shard].tar.sha256, images_of(dataset, job.shard)
        sizes = [reader.vision.input_size(*dataset.image_size(*place)) for place in places]
        images = ImageTable.of(reader.vision, [sizes])
        batches = _decoded(dataset, places, images, reader, max_tokens, pool)
    receipt = _write(partial, job, name, source, images, batches, encode)
    job.folder.put({feature_cache.feature_file(name): partial})
    write_record(job.folder, job.attempt, shard_files(name).receipt, receipt)
    return receipt, True


def is_whole(job: FeatureJob, receipt: FeatureReceipt) -> bool:
    """Whether a feature file is the one its receipt describes, made for this key."""
    return receipt.key_hash == job.key_hash and bool(
        job.folder.is_whole(feature_cache.feature_file(receipt.name), receipt.file)
    )


def images_of(dataset: ShardDataset, shard: int) -> list[tuple[int, int]]:
    """(sample, image) of every image of a shard, in the order of its index."""
    sizes = dataset.shard_sizes()
    first = sum(sizes[:shard])
    return [(i, k) for i in range(first, first + sizes[shard]) for k in range(dataset.num_images(i))]


def _decoded(
    dataset: ShardDataset,
    places: list[tuple[int, int]],
    images: ImageTable,
    reader: PixelReader,
    max_tokens: int,
    pool: Executor,
) -> Iterator[Batch]:
    """A batch of images at a time; the next one is decoded meanwhile."""

    def start(part: slice) -> tuple[Tensor, list[Future[bool]], ImageTable]:
        own = images.images_of(range(part.start, part.stop))
        pixels = reader.blanks(own)
        read = [pool.submit(decode, into, *place) for into, place in zip(own.split(pixels), places[part], strict=True)]
        return pixels, read, own

    def decode(into: Tensor, i: int, k: int) -> bool:
        try:
            reader.read_into(into, dataset, i, k)
            return True
        except BadSampleError as error:
            log.warning("%s: image %d is left out: %s", dataset.key(i), k, error.detail)
            return False

    started = map(start, token_batches(images.tokens, max_tokens))
    waiting = next(started, None)
    while waiting is not None:
        pixels, read, own = waiting
        waiting = next(started, None)
        yield pixels, torch.tensor([not future.result() for future in read]), own


def _write(
    path: Path,
    job: FeatureJob,
    name: str,
    source: str,
    images: ImageTable,
    batches: Iterator[Batch],
    encode: Encode,
) -> FeatureReceipt:
    """Write one feature file as the tower goes along. Images marked as missing get zeros; the blank one is encoded as such."""
    tokens, width = job.shape
    layout = Layout(token_starts(len(images), tokens, images.tokens), width, job.dtype)
    checksums: list[int] = []
    scales: list[bytes] = []
    damaged: list[int] = []
    error = squared = 0.0
    with path.open("wb") as file:
        file.write(layout.header)
        for pixels, missing, own in batches:
            computed = encode(pixels, missing, own.sizes)
            assert computed.shape == (sum(own.tokens), width), (computed.shape, own.tokens, width)
            if job.shard is not None:
                damaged += [len(checksums) + int(n) for n in missing.nonzero()]
                computed = computed.masked_fill(missing.repeat_interleave(torch.tensor(own.tokens))[:, None], 0)
            values, scale = pack(computed, job.dtype)
            stored = values.double() if scale is None else values.double() * scale.double()[..., None]
            error += float((stored - computed.double()).square().sum())
            squared += float(computed.double().square().sum())
            of_images = [b""] * len(own) if scale is None else map(_bytes, own.split(scale))
            for image, image_scales in zip(map(_bytes, own.split(values)), of_images, strict=True):
                file.write(image)
                scales.append(image_scales)
                checksums.append(zlib.crc32(image_scales, zlib.crc32(image)))
        file.write(b"".join(scales))
        file.write(np.array(checksums, "<i8").tobytes())
        if layout.version == feature_cache.FLAT_VERSION:
            file.write(np.array(images.tokens, "<i8").tobytes())
        sync_file(file)
    return FeatureReceipt(
        features_version=layout.version,
        name=name,
        key_hash=job.key_hash,
        source=source,
        num_images=len(images),
        damaged=tuple(damaged),
        squared_error=error,
        squared=squared,
        file=file_digest(path),
    )


def _bytes(tensor: Tensor) -> Any:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()
