"""How many tokens each sample's text has, for one tokenizer and template: a column beside the index, four bytes a sample.

Packs are planned from it, and pipeline stages that read no text know its shape. Flows in: a dataset folder; out: a file a
shard under OUT/lengths/COLUMN/, and all of them as one array. Preprocessing writes it while it has the texts at hand;
otherwise the first run that needs it does. Lengths are of whole texts: what a run cuts is its own business.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import functools
import json
import logging
import multiprocessing
import os
import sys
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ...runtime.durable_files import publish
from ..shards import shard_format
from ..shards.reader import DamagedShardError, ShardDataset
from ..shards.shard_format import Receipt
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
    form = dataclasses.asdict(chat_template.template_of(template, tokenizer))
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
    _write(folder, receipt, column, np.array([_count(text, spelled, template) for text in _texts(folder, receipt)], np.uint32))
    return True


def _write(folder: Path, receipt: Receipt, column: str, lengths: Lengths) -> None:
    path = shard_format.lengths_path(folder, column, receipt.name)
    # The process's own partial file: without file locks several processes may count the same shard.
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    publish(path, shard_format.encode_lengths(lengths, receipt.tar), partial=partial)


def read_column(folder: Path, receipt: Receipt, column: str) -> Lengths | None:
    """uint32[num_samples] of one shard; None where there is none, or one that cannot be trusted (it is then made again)."""
    try:
        data = shard_format.lengths_path(folder, column, receipt.name).read_bytes()
        return shard_format.decode_lengths(data, receipt.tar, receipt.num_samples)
    except (FileNotFoundError, ValueError):
        return None


def text_lengths(dataset: ShardDataset, tokenizer: str, template: str) -> Lengths:
    """uint32[len(dataset)], in the order of the samples; counted now where nobody has yet.

    Of many processes that ask at once for the same folder, one counts and the others wait.
    Raises: ValueError when the tokenizer does not fit the template, the folder cannot be written, or its texts are damaged.
    """
    chat_template.check_tokenizer(load_tokenizer(tokenizer), template)
    column = column_of(load_tokenizer(tokenizer), template)

    def read() -> list[Lengths | None]:
        return [read_column(dataset.path, receipt, column) for receipt in dataset.manifest.shards]

    if dataset.is_remote:
        _fetch_columns(dataset, column, tokenizer, template)
    found = read()
    if any(lengths is None for lengths in found):
        try:
            with _one_at_a_time(dataset.path, column):
                missing = [shard for shard, lengths in zip(dataset.manifest.shards, read(), strict=True) if lengths is None]
                _make_all(dataset.path, missing, tokenizer, template)
        except DamagedShardError as error:
            raise ValueError(f"{error}: run the preprocessing again, it makes only what is missing or damaged") from None
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise
            raise ValueError(
                f"{dataset.path} has no text lengths for --data.tokenizer {tokenizer} --data.template {template}, and they "
                f"cannot be written there ({os.strerror(error.errno)}): preprocess with --tokenizer {tokenizer} --template "
                f"{template}, or make the folder writable"
            ) from None
        found = read()
    return np.concatenate([np.zeros(0, np.uint32), *(lengths for lengths in found if lengths is not None)])


def _fetch_columns(dataset: ShardDataset, column: str, tokenizer: str, template: str) -> None:
    """Bring a remote dataset's columns here. Raises: ValueError for a missing one: counting it would fetch all shards."""
    for receipt in dataset.manifest.shards:
        if read_column(dataset.path, receipt, column) is not None:
            continue
        data = dataset.fetch(str(shard_format.lengths_path(Path(), column, receipt.name)))
        if data is None:
            raise ValueError(
                f"{dataset.location} has no text lengths for --data.tokenizer {tokenizer} --data.template {template}: "
                f"preprocess with --tokenizer {tokenizer} --template {template}"
            )
        try:
            _write(dataset.path, receipt, column, shard_format.decode_lengths(data, receipt.tar, receipt.num_samples))
        except ValueError as error:
            raise ValueError(f"{dataset.location}: text lengths of {receipt.name}: {error}: preprocess again") from None


@contextlib.contextmanager
def _one_at_a_time(folder: Path, column: str) -> Iterator[None]:
    """Hold the column's lock. Where a file system has no locks two may count: the files come out the same."""
    place = folder / "lengths" / column
    place.mkdir(parents=True, exist_ok=True)
    with (place / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


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


def _texts(folder: Path, receipt: Receipt) -> Iterator[dict[str, Any]]:
    """The texts of one shard, in order; it needs no manifest."""
    paths = shard_format.shard_paths(folder, receipt.name)
    try:
        samples, _ = shard_format.decode_index(paths.index.read_bytes())
    except ValueError as error:
        raise DamagedShardError(f"{paths.index}: {error} ({receipt.num_samples} samples at stake)") from None
    with paths.tar.open("rb") as file:
        for record in samples:
            data = os.pread(file.fileno(), int(record["size"]), int(record["offset"]))
            if len(data) != record["size"] or zlib.crc32(data) != record["crc32"]:
                key = shard_format.sample_key(int(record["row"]))
                raise DamagedShardError(f"the text of {receipt.name}/{key} does not match its checksum")
            yield json.loads(data)


def _count(text: dict[str, Any], tokenizer: Tokenizer, template: str) -> int:
    try:
        return len(chat_template.encode(text, tokenizer, template, sys.maxsize).ids)
    except ValueError:
        return UNUSABLE
