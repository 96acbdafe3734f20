"""How many tokens each sample's text has and where its images stand in it, for one tokenizer and template.

It is a column beside the index, four bytes a sample and four an image. Packs are planned from it, and pipeline stages that
read no text know its shape. Flows in: a dataset folder; out: a file a shard under OUT/lengths/COLUMN/, the lengths of all of
them as one array, and the places of one sample's images at a time. Preprocessing writes it while it has the texts at hand;
otherwise the first run that needs it does. All is of whole texts: what a run cuts is its own business.
"""

from __future__ import annotations

import dataclasses
import errno
import functools
import logging
import multiprocessing
import os
import sys
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ...runtime.durable_files import publish
from ...runtime.untrusted_files import folder_below, open_below, read_below
from ..errors import BadSampleError
from ..shards import shard_format
from ..shards.reader import AGAIN, MAX_OPEN_SHARDS, DamagedShardError, ShardDataset, as_text, read_index
from ..shards.shard_format import Receipt, TextColumn
from ..shards.storage import locked
from ..text import chat_template
from ..text.tokenizer import Tokenizer, load_tokenizer

log = logging.getLogger(__name__)

Lengths = npt.NDArray[np.uint32]

UNUSABLE = 0
"""Length of a text that the template has no place for."""

FEW_SAMPLES = 20_000
"""So many are counted in this process: starting others takes longer."""


def column_of(tokenizer: Tokenizer, template: str) -> str:
    """The column's name: the same for the same ids."""
    # Marks are a conversation's; a template has none.
    form = dataclasses.asdict(
        chat_template.template_of(template, tokenizer),
        dict_factory=lambda fields: {name: value for name, value in fields if name != "marks"},
    )
    return shard_format.hash_of([tokenizer.fingerprint, form])[:16]


def make_column(folder: Path, receipt: Receipt, tokenizer: str, template: str) -> bool:
    """Count the tokens of one shard's texts, unless that is done.

    Args: `tokenizer`, `template`: as in DataConfig.
    Returns: whether the column was written. Raises: DamagedShardError for a text that is not what was written.
    """
    spelled = load_tokenizer(tokenizer)
    column = column_of(spelled, template)
    if read_column(folder, receipt, column) is not None:
        return False
    lengths, places, without = [], list[int](), 0
    for text, key, num_images in _texts(folder, receipt):
        length, own = _count(text, key, spelled, template)
        without += length != UNUSABLE and len(own) != num_images
        lengths.append(length)
        places += own if len(own) == num_images else [0] * num_images
    if without:
        log.warning(
            "%s: %d samples have another number of %s marks than of images: their images stand before the text",
            receipt.name, without, chat_template.IMAGE_MARK,
        )  # fmt: skip
    _write(folder, receipt, column, TextColumn(np.array(lengths, np.uint32), np.array(places, np.uint32)))
    return True


def _write(folder: Path, receipt: Receipt, column: str, content: TextColumn) -> None:
    parent, _, name = shard_format.lengths_file(column, receipt.name).rpartition("/")
    path = folder_below(folder, parent) / name
    # The process's own partial file: without file locks several processes may count the same shard.
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    publish(path, shard_format.encode_text_column(content, receipt), partial=partial)


def read_column(folder: Path, receipt: Receipt, column: str) -> TextColumn | None:
    """The column of one shard; None where there is none, or one that cannot be trusted (it is then made again)."""
    try:
        return _stored_column(folder, receipt, column)
    except (FileNotFoundError, ValueError):
        return None


def _stored_column(folder: Path, receipt: Receipt, column: str) -> TextColumn:
    return shard_format.decode_text_column(read_below(folder, shard_format.lengths_file(column, receipt.name)), receipt)


def text_lengths(dataset: ShardDataset, tokenizer: str, template: str) -> Lengths:
    """uint32[len(dataset)], in the order of the samples; counted now where nobody has yet.

    Of many processes that ask at once for the same folder, one counts and the others wait.
    Raises: ValueError when the tokenizer does not fit the template, the folder cannot be written, or its texts are damaged.
    """
    chat_template.check_tokenizer(load_tokenizer(tokenizer), template)
    column = column_of(load_tokenizer(tokenizer), template)

    def read() -> list[TextColumn | None]:
        return [read_column(dataset.path, receipt, column) for receipt in dataset.manifest.shards]

    if dataset.is_remote:
        _fetch_columns(dataset, column, tokenizer, template)
    found = read()
    if any(part is None for part in found):
        try:
            with locked(folder_below(dataset.path, f"lengths/{column}"), ".lock"):
                missing = [shard for shard, part in zip(dataset.manifest.shards, read(), strict=True) if part is None]
                _make_all(dataset.path, missing, tokenizer, template)
        except DamagedShardError as error:
            raise ValueError(f"{error}: {AGAIN}") from None
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise
            raise ValueError(
                f"{dataset.path} has no text lengths and places of images for --data.tokenizer {tokenizer} --data.template "
                f"{template}, and they cannot be written there ({os.strerror(error.errno)}): preprocess with --tokenizer "
                f"{tokenizer} --template {template}, or make the folder writable"
            ) from None
        found = read()
    return np.concatenate([np.zeros(0, np.uint32), *(part.lengths for part in found if part is not None)])


class ImagePlaces:
    """Where a dataset's images stand in its texts, once `text_lengths` has seen to the columns.

    A shard's column is read when one of its samples is first asked for. It can be sent to worker processes.
    """

    def __init__(self, dataset: ShardDataset, tokenizer: str, template: str) -> None:
        self._dataset, self._column = dataset, column_of(load_tokenizer(tokenizer), template)
        self._shards: OrderedDict[int, npt.NDArray[np.uint32]] = OrderedDict()

    def of(self, i: int) -> tuple[int, ...]:
        """For each image of sample i the tokens of its whole text that come before it; 0 in a text without a place.

        Raises: DamagedShardError when the column is gone or damaged.
        """
        num_images = self._dataset.num_images(i)
        if not num_images:
            return ()
        shard, first = self._dataset.image_place(i, 0)
        return tuple(self._of_shard(shard)[first : first + num_images].tolist())

    def _of_shard(self, shard: int) -> npt.NDArray[np.uint32]:
        if shard not in self._shards:
            receipt = self._dataset.manifest.shards[shard]
            try:
                places = _stored_column(self._dataset.path, receipt, self._column).image_places
            except (FileNotFoundError, ValueError) as error:
                what = error if isinstance(error, ValueError) else "the file is gone"
                path = self._dataset.path / shard_format.lengths_file(self._column, receipt.name)
                raise DamagedShardError(f"{path}: {what}: start the run again, it makes or fetches the column anew") from None
            if len(self._shards) >= MAX_OPEN_SHARDS:
                self._shards.popitem(last=False)
            self._shards[shard] = places
        return self._shards[shard]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_shards": OrderedDict()}


def _fetch_columns(dataset: ShardDataset, column: str, tokenizer: str, template: str) -> None:
    """Bring a remote dataset's columns here. Raises: ValueError for a missing one: counting it would fetch all shards."""
    for receipt in dataset.manifest.shards:
        if read_column(dataset.path, receipt, column) is not None:
            continue
        data = dataset.fetch(shard_format.lengths_file(column, receipt.name))
        try:
            if data is None:
                raise ValueError("there is no file")
            content = shard_format.decode_text_column(data, receipt)
        except ValueError as error:
            raise ValueError(
                f"{dataset.location} has no text lengths and places of images for --data.tokenizer {tokenizer} --data.template "
                f"{template} ({receipt.name}: {error}): preprocess with --tokenizer {tokenizer} --template {template}"
            ) from None
        _write(dataset.path, receipt, column, content)


def _make_all(folder: Path, receipts: Sequence[Receipt], tokenizer: str, template: str) -> None:
    num_samples = sum(receipt.num_samples for receipt in receipts)
    make = functools.partial(make_column, folder, tokenizer=tokenizer, template=template)
    if num_samples <= FEW_SAMPLES or len(receipts) == 1:
        for receipt in receipts:
            make(receipt)
        return
    log.info("counting the text tokens of %d samples in %s, once for this tokenizer and template", num_samples, folder)
    with ProcessPoolExecutor(os.cpu_count(), mp_context=multiprocessing.get_context("spawn")) as pool:
        for number, _ in enumerate(pool.map(make, receipts), 1):
            if number % 100 == 0:
                log.info("text tokens: %d of %d shards counted", number, len(receipts))


def _texts(folder: Path, receipt: Receipt) -> Iterator[tuple[bytes, str, int]]:
    """The texts of one shard, in order, each with its key and the number of its images; it needs no manifest."""
    with open_below(folder, shard_format.shard_files(receipt.name).tar) as file:
        for record in read_index(folder, receipt).samples:
            data = os.pread(file.fileno(), int(record["size"]), int(record["offset"]))
            key = f"{receipt.name}/{shard_format.sample_key(int(record['row']))}"
            if len(data) != record["size"] or zlib.crc32(data) != record["crc32"]:
                raise DamagedShardError(f"the text of {key} does not match its checksum")
            yield data, key, int(record["num_images"])


def _count(text: bytes, key: str, tokenizer: Tokenizer, template: str) -> tuple[int, list[int]]:
    """The tokens of a text, and of them those before each of its marks."""
    try:
        encoded = chat_template.encode(as_text(text, key), tokenizer, template, sys.maxsize)
    except (ValueError, BadSampleError):
        return UNUSABLE, []
    return len(encoded.ids), encoded.image_places.tolist()
