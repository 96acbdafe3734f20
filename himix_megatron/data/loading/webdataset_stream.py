"""Tar files of any WebDataset in, `StepBatch`es out: the fallback for data that was not preprocessed (`data.webdataset_urls`).

A stream is not exact. It has no index, so nothing knows how long it is or what is missing: samples behind a damaged place of a
tar are lost, a restart reads other samples than would have come, and another number of ranks or workers reads another order.

Tar i belongs to data rank i % D, and there to worker (i // D) % W; each reads its tars for ever, in an order that is drawn
anew for each pass and each start. The ranks of a replica read the same stream, and decode only their share of its images.
Only local paths, file:// and s3:// are opened. Only JSON, text and images are read: members of other kinds (pickles) are
left where they are.
"""

from __future__ import annotations

import gzip
import itertools
import logging
import lzma
import math
import random
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from braceexpand import braceexpand
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from webdataset.tariterators import base_plus_ext, group_by_keys

from ...config import DataConfig, VisionConfig, check_batch
from ...runtime.errors import RankError
from ..errors import BadSampleError
from ..images import image_file
from ..images.decode import decode
from ..ingest.sources.base import MAX_SAMPLE_BYTES, MAX_TEXT_BYTES
from ..ingest.sources.webdataset import TEXT_SUFFIXES, facts_of, has_content, images_of, row_turns
from ..shards import storage
from ..shards.shard_format import BLOCK
from ..text import chat_template
from ..text.chat_template import EncodedText
from ..text.tokenizer import load_tokenizer
from .batch import StepBatch, collate, mask_samples
from .image_table import ImageTable, Size, blank_pixels, image_share
from .loader import ReadSpec, worker_options
from .plan import DataPosition, TrainingLength

log = logging.getLogger(__name__)

MAX_KINDS = 20
"""Of members that are not read, counted one by one."""
MAX_TARS = 1_000_000
MAX_BRACE_DEPTH = 20
# What tarfile and the compressions under it raise on damaged content. Other OSErrors are the machine's, and go up: a rank that
# skipped a file for a reason of its own would leave the ranks that read the same stream.
DAMAGE = (tarfile.TarError, gzip.BadGzipFile, zlib.error, lzma.LZMAError, EOFError, ValueError, OverflowError)


@dataclass(frozen=True, slots=True)
class StreamSample:
    """A sample that can be used, as far as its text; its images are not decoded."""

    key: str
    """TAR/KEY."""
    text: EncodedText
    images: list[bytes]


class Stream:
    """The tars of `data.webdataset_urls`. `images_without`: images that a sample without one counts for.

    Raises: ValueError for a scheme that is not read, a file that is not there, or a tokenizer that does not fit the template.
    """

    def __init__(self, config: DataConfig, *, seed: int, global_batch: int, images_without: int) -> None:
        self.config, self.seed, self.global_batch, self.images_without = config, seed, global_batch, images_without
        self.tars = [_checked(url) for pattern in config.webdataset_urls for url in _names(pattern)]
        self.tokenizer = load_tokenizer(config.tokenizer)
        chat_template.check_tokenizer(self.tokenizer, config.template)

    @property
    def sources(self) -> list[str]:
        """What `MicroBatch.sources` counts: there is no fingerprint of a stream."""
        return ["stream"]

    def expected_steps(self, end: TrainingLength) -> int:
        """Optimizer steps of the whole run."""
        assert end.steps is not None, "a stream has no length"
        return end.steps

    def check_ranks(self, data_size: int) -> None:
        """Raises: ValueError for fewer tars than data-parallel ranks."""
        num_tars = len(self.tars)
        if num_tars < data_size:
            raise ValueError(
                f"data.webdataset_urls names {num_tars} tar{'s' if num_tars > 1 else ''} for {data_size} data-parallel ranks: "
                "wanted one or more for each rank"
            )

    def fingerprint_fields(self) -> dict[str, Any]:
        """What must stay as it is for a run to go on, by the field that says it."""
        return {
            "data.webdataset_urls": list(self.config.webdataset_urls),
            "data.tokenizer": self.tokenizer.fingerprint[:16],
            "data.template": self.config.template,
            "data.max_text_tokens": self.config.max_text_tokens,
            "model.text_only_vision": self.images_without,
            "train.seed": self.seed,
            "train.global_batch": self.global_batch,
        }


def stream_steps(
    stream: Stream,
    *,
    vision_config: VisionConfig,
    micro_batch: int,
    reads: ReadSpec,
    end: TrainingLength,
    place: DataPosition,
    step: int = 0,
    pad_multiple: int = 1,
) -> Iterator[StepBatch]:
    """The steps after `step`, to the end, as one rank sees them; read ahead by up to `data.num_workers` processes.

    Raises: ValueError for fewer tars than data ranks, or a global batch that does not divide; RankError when no tar can be
    read, or more than `data.max_bad_fraction` of the samples cannot be used; OSError when the machine or the store fails.
    """
    stream.check_ranks(reads.data_size)
    check_batch(stream.global_batch, reads.data_size, micro_batch)
    log.warning(
        "data.webdataset_urls is not exact: samples are lost where a tar is damaged, a restart reads other samples, and "
        "another number of ranks another order (pipelines.preprocess --source webdataset makes an exact dataset of it)"
    )
    reader = _StreamReader(stream, vision_config, micro_batch, reads, end, place, step, pad_multiple)
    num_workers = min(stream.config.num_workers, len(stream.tars) // reads.data_size)
    return iter(DataLoader(reader, batch_size=None, **worker_options(num_workers)))


def _names(pattern: str) -> Iterator[str]:
    """The names that a pattern's braces stand for, counted before any is made. Raises: ValueError for too many."""

    def count(braces: re.Match[str]) -> str:
        if span := re.fullmatch(r"(-?\d+|[A-Za-z])\.\.(-?\d+|[A-Za-z])(\.\..*)?", braces[1]):
            first, last = (ord(end) if end.isalpha() else int(end) for end in span.groups()[:2])
            return f"\0{min(abs(first - last), MAX_TARS) + 1}\0"
        parts = (math.prod(map(int, re.findall("\0(.*?)\0", part))) for part in braces[1].split(","))
        return f"\0{min(sum(parts), MAX_TARS + 1)}\0"

    left, found = re.sub(r"\\.|\0", "", pattern[:4096]), 1
    for _ in range(MAX_BRACE_DEPTH):
        left, found = re.subn(r"\{([^{}]*)\}", count, left) if found else (left, 0)
    if found or len(pattern) > 4096 or math.prod(map(int, re.findall("\0(.*?)\0", left))) > MAX_TARS:
        raise ValueError(f"data.webdataset_urls {pattern}: more than {MAX_TARS} names, or braces too deep in each other")
    return braceexpand(pattern)


def _checked(place: str) -> str:
    """A place that may be opened. Raises: ValueError for any other scheme, and for a local file that is not there."""
    storage.check_scheme(place, "data.webdataset_urls")
    if not storage.is_remote(place) and not storage.is_file(place):
        raise ValueError(f"data.webdataset_urls {place}: no such file")
    return place


@dataclass(eq=False)
class _StreamReader(IterableDataset[StepBatch]):
    """What `stream_steps` hands to workers: worker w of W yields steps first + w, first + w + W ... from tars of its own."""

    stream: Stream
    vision_config: VisionConfig
    micro_batch: int
    reads: ReadSpec
    end: TrainingLength
    place: DataPosition
    first_step: int
    pad_multiple: int

    def __iter__(self) -> Iterator[StepBatch]:
        info = get_worker_info()
        worker, num_workers = (0, 1) if info is None else (info.id, info.num_workers)
        tars = self.stream.tars[self.reads.data_rank :: self.reads.data_size][worker::num_workers]
        # The place is in the seed, so that a run that is often restarted does not always begin with the same tars.
        seed = f"{self.stream.seed}/{self.place.samples}/{self.reads.data_rank}/{worker}"
        samples = _TarReader(self.stream, tars).forever(seed)
        for step in itertools.count(self.first_step + worker, num_workers):
            if self.end.reached(step, self._place(step)):
                return
            yield self._batch(step, list(itertools.islice(samples, self.stream.global_batch // self.reads.data_size)))

    def _place(self, step: int) -> DataPosition:
        """Where the run stands before a step."""
        return DataPosition(self.place.samples + (step - self.first_step) * self.stream.global_batch)

    def _batch(self, step: int, samples: Sequence[StreamSample]) -> StepBatch:
        vision, without = self.vision_config, self.stream.images_without
        sizes = [[_size(data, vision) for data in s.images] or [vision.blank_size] * without for s in samples]
        places = [s.text.image_places.tolist() if s.images else [0] * without for s in samples]
        numbered = [(slot, k) for slot, own in enumerate(sizes) for k in range(len(own))]
        blank = torch.tensor([not samples[slot].images for slot, _ in numbered], dtype=torch.bool)
        table = ImageTable.of(vision, sizes, places)
        share, bad = image_share(table, vision, self.reads.image_rank, self.reads.image_size), []
        pixels = blank_pixels(own_images := table.images_of(share), vision)
        for n, into in zip(share, own_images.split(pixels), strict=True):
            slot, k = numbered[n]
            if blank[n]:
                continue
            try:
                decode(samples[slot].images[k], vision, self.stream.config.decode, out=into.numpy())
            except BadSampleError as error:
                log.warning("%s is left out of the loss: image %d, %s", samples[slot].key, k, error.detail)
                blank[n] = True
                bad.append(slot)
        lengths = [len(sample.text.ids) for sample in samples]
        width = -(-max(lengths) // self.pad_multiple) * self.pad_multiple
        parts = [slice(first, first + self.micro_batch) for first in range(0, len(samples), self.micro_batch)]
        texts, keys = [sample.text for sample in samples], [sample.key for sample in samples]
        sources = [0] * len(samples)
        after, bad = self._place(step + 1), sorted(set(bad))
        batch = StepBatch(
            step=step,
            micro_batches=tuple(
                collate(
                    texts[part],
                    lengths[part],
                    ImageTable.of(vision, sizes[part], places[part]),
                    keys[part],
                    sources[part],
                    width,
                    packed=False,
                )
                for part in parts
            ),
            blank=blank,
            pixels=pixels,
            bad_keys=tuple(keys[slot] for slot in bad),
            after=after,
            is_last=self.end.reached(step + 1, after),
            num_samples=self.stream.global_batch,
            bad_samples=tuple(bad),
            num_cut=sum(text.was_cut for text in texts),
        )
        return mask_samples(batch, bad)


def _size(data: bytes, vision: VisionConfig) -> Size:
    """(width, height) of an image as the tower gets it; of one without a header, which no rank can decode, the blank one's."""
    if vision.has_fixed_size:
        return vision.blank_size
    try:
        facts = image_file.header(data)
    except BadSampleError:
        return vision.blank_size
    return vision.input_size(facts.width, facts.height)


class _TarReader:
    """Samples of some tars. Counts what it leaves out, and says so."""

    def __init__(self, stream: Stream, tars: Sequence[str]) -> None:
        self.stream, self.tars = stream, tars
        self.num_read = self.num_bad = self.num_damaged = 0
        self.ignored: Counter[str] = Counter()

    def forever(self, seed: str) -> Iterator[StreamSample]:
        """Pass after pass, each in an order of its own. Raises: RankError after a pass without a sample."""
        for number in itertools.count():
            before = self.num_read
            order = list(self.tars)
            random.Random(f"{seed}/{number}").shuffle(order)
            for tar in order:
                yield from self._usable(tar)
            if self.num_read == before:
                raise RankError(f"data.webdataset_urls: no usable sample in {len(order)} tars ({Path(order[0]).name} ...)")
            if number == 0 and self.ignored:
                log.warning("members that are neither text nor images were not read: %s", dict(self.ignored))

    def _usable(self, tar: str) -> Iterator[StreamSample]:
        config = self.stream.config
        for members in group_by_keys(self._members(tar), handler=self._again):
            key = f"{PurePosixPath(tar).stem}/{members['__key__']}"
            try:
                text = self._text(members)
                if text.was_cut and config.overlong == "drop":
                    raise BadSampleError("too_long", f"more than {config.max_text_tokens} tokens")
            except BadSampleError as error:
                self.num_bad += 1
                log.warning("%s is left out: %s (%d so far)", key, error, self.num_bad)
                if self.num_bad > config.max_bad_fraction * max(self.num_bad + self.num_read, 1000):
                    raise RankError(
                        f"{self.num_bad} of {self.num_bad + self.num_read} samples of data.webdataset_urls are bad, more than "
                        f"data.max_bad_fraction {config.max_bad_fraction}; the last one: {error}"
                    ) from None
                continue
            self.num_read += 1
            yield StreamSample(key, text, images_of(members))

    def _again(self, error: Exception) -> bool:
        """webdataset asks what to do with a name that is there twice: the first one is kept."""
        log.warning("data.webdataset_urls: %s", error.args[0])
        return True

    def _text(self, members: dict[str, Any]) -> EncodedText:
        """Raises: BadSampleError for a sample without a text, or one that contradicts its images or the template."""
        config = self.stream.config
        if refused := next((data for data in members.values() if isinstance(data, BadSampleError)), None):
            raise refused
        sample = {"conversations": row_turns(members, facts_of(members), len(images_of(members)))}
        try:
            return chat_template.encode(sample, self.stream.tokenizer, config.template, config.max_text_tokens)
        except ValueError as error:
            raise BadSampleError("no_place_in_template", str(error)) from None

    def _members(self, tar: str) -> Iterator[dict[str, Any]]:
        """The members to read, in webdataset's form; where the tar is damaged they end, and a warning says so."""
        number, key, held = 0, None, 0
        try:
            with storage.open_file(tar) as file, tarfile.open(fileobj=file, mode="r:*") as opened:
                while (member := opened.next()) is not None:
                    opened.members = []  # type: ignore[attr-defined]  # it would keep them all
                    before, (key, suffix) = key, base_plus_ext(member.name)
                    suffix = (suffix or "").lower()
                    if not member.isreg() or not has_content(suffix):
                        kind = suffix if member.isreg() else "not a file"
                        self.ignored[kind if len(self.ignored) < MAX_KINDS else "others"] += 1
                        continue
                    held = member.size + (held if key == before else 0)
                    reason = "oversized_text" if suffix in TEXT_SUFFIXES else "oversized_image"
                    is_large = held > MAX_SAMPLE_BYTES or (suffix in TEXT_SUFFIXES and member.size > MAX_TEXT_BYTES)
                    refused = BadSampleError(reason, f"{member.name!r:.150} takes the sample above its limit")
                    content = opened.extractfile(member)
                    assert content is not None
                    yield {"fname": member.name, "data": refused if is_large else content.read(), "__url__": tar}
                    number += 1
                _check_end(opened)
        except DAMAGE as error:
            self.num_damaged += 1
            why = " ".join(str(error).split())
            log.warning("%s is damaged after %d members: %s (damaged so far: %d)", tar, number, why, self.num_damaged)


def _check_end(tar: tarfile.TarFile) -> None:
    """tarfile takes a header that is cut off or damaged for the end, and says nothing. Raises: ReadError."""
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    header = tar.fileobj.read(BLOCK)
    if any(header) or len(header) < BLOCK:
        raise tarfile.ReadError("no end mark" if len(header) < BLOCK else "no header where one should be")
