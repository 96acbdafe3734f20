"""Writes the files of one shard from a part of a source. The layout is in shards/shard_format.py.

A shard is written beside its place, synced and renamed, and its receipt last, so what has a receipt is whole. On an object
store it is written on this machine and uploaded in the same order.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ...runtime import typed_json
from ...runtime.durable_files import FileDigest, bytes_digest, sync_file, write_synced
from ..errors import BadSampleError
from ..images import image_file
from ..loading import token_counts
from ..shards import shard_format
from ..shards.shard_format import Receipt, Record, shard_files
from ..shards.storage import Folder, LocalFolder
from ..text.tokenizer import load_tokenizer
from .sources.base import BadRow, Part, Sample

Check = Literal["decode", "header"]
IMAGE_REASONS = ("damaged_image", "missing_image", "not_an_image", "oversized_image")
"""Rows left out for one of these are looked at again by the next run: the image may have come, or been replaced."""
SYNC_BYTES = 8 << 20
"""Written bytes after which the disk is set to work; otherwise all waiting comes at a shard's end."""


@dataclass(frozen=True, slots=True)
class ShardJob:
    """Which shard to make, and where."""

    folder: Folder
    """The dataset."""
    attempt: Path | None
    """Where files are written before they are renamed; this attempt's own, so that a straggler of a killed one finds nothing
    left to rename. None (object store): a temporary folder of the task's machine."""
    name: str
    """NAME-000000."""
    config_hash: str
    source_hash: str
    check: Check = "decode"
    """How images are checked."""
    column: tuple[str, str] | None = None
    """Tokenizer and template whose text lengths are counted on the way."""


@dataclass(frozen=True, slots=True)
class Rejected:
    """A line of the quarantine: a row that was left out."""

    row: int
    id: str
    reason: str
    detail: str


def make_shard(job: ShardJob, part: Part) -> tuple[Receipt, bool]:
    """See that the shard of these source rows exists: verify it by its receipt, or write it.

    Returns: the receipt, and whether the shard was written. The bytes depend on rows, images and config only.
    """
    receipt = load_receipt(job.folder, Receipt, job.name)
    is_kept = receipt is not None and _is_of(receipt, job, part) and _is_whole(job.folder, receipt, part, job.check)
    if receipt is None or not is_kept:
        receipt = write_shard(job, part)
    if job.column:
        _count_tokens(job.folder, receipt, *job.column)
    return receipt, not is_kept


def _count_tokens(folder: Folder, receipt: Receipt, tokenizer: str, template: str) -> None:
    """See that the shard's text column is there; on an object store it is made here, of a copy."""
    if isinstance(folder, LocalFolder):
        token_counts.make_column(folder.path, receipt, tokenizer, template)
        return
    column = token_counts.column_of(load_tokenizer(tokenizer), template)
    name = shard_format.lengths_file(column, receipt.name)
    with contextlib.suppress(ValueError):
        shard_format.decode_text_column(folder.read(name) or b"", receipt)
        return
    with _temporary_folder() as here:
        names = shard_files(receipt.name)
        (here / names.tar).parent.mkdir()
        for part in (names.tar, names.index):
            (here / part).write_bytes(folder.read(part) or b"")
        token_counts.make_column(here, receipt, tokenizer, template)
        folder.put({name: here / name})


def load_receipt(folder: Folder, cls: type[Record], name: str) -> Record | None:
    """The receipt of a shard, or of its features; None where there is none that can be read (what it is of is made again)."""
    try:
        return shard_format.from_json(cls, folder.read(shard_files(name).receipt) or b"")
    except ValueError:
        return None


def verify_shard(folder: Folder, receipt: Receipt) -> list[str]:
    """Compare a shard's files with its receipt, byte for byte. Returns: what is wrong, one line each; empty: nothing."""
    names = shard_files(receipt.name)
    wrong = []
    for name, wanted in ((names.tar, receipt.tar), (names.index, receipt.index), (names.quarantine, receipt.quarantine)):
        is_whole = folder.is_whole(name, wanted or FileDigest(0, ""))
        if is_whole != (True if wanted else None):
            state = "unexpected" if wanted is None else "missing" if is_whole is None else "damaged"
            wrong.append(f"{Path(name).name} is {state} ({receipt.num_samples} samples at stake)")
    return wrong


def write_shard(job: ShardJob, part: Part) -> Receipt:
    """Write and publish one shard: tar, index, quarantine, then the receipt. Bad rows are left out and listed."""
    with contextlib.nullcontext(job.attempt) if job.attempt else _temporary_folder() as folder:
        names = shard_files(job.name)
        partial = {name: folder / Path(name).name for name in dataclasses.astuple(names)}
        samples: list[tuple[int, ...]] = []
        images: list[tuple[int, ...]] = []
        rejected: list[Rejected] = []
        with partial[names.tar].open("wb") as file:
            tar = _TarWriter(file)
            for number, outcome in part.rows():
                found = _members(outcome, number, job.check)
                if isinstance(found, Rejected):
                    rejected.append(found)
                    continue
                members, facts = found
                text, *pictures = [(tar.append(name, data), len(data), zlib.crc32(data)) for name, data in members]
                samples.append((text[0], number, *text[1:], len(images), len(pictures)))
                images += [(*picture, fact.width, fact.height) for picture, fact in zip(pictures, facts, strict=True)]
            tar.finish()
        index = shard_format.encode_index(
            np.array(samples, shard_format.SAMPLE_RECORD), np.array(images, shard_format.IMAGE_RECORD)
        )
        lines = "".join(json.dumps(dataclasses.asdict(row)) + "\n" for row in rejected).encode()
        receipt = Receipt(
            schema_version=shard_format.SCHEMA_VERSION,
            name=job.name,
            config_hash=job.config_hash,
            source_hash=job.source_hash,
            first_row=part.first_row,
            end_row=part.first_row + part.num_rows,
            num_samples=len(samples),
            num_images=len(images),
            quarantined=dict(sorted(Counter(row.reason for row in rejected).items())),
            tar=FileDigest(tar.offset, tar.digest.hexdigest()),
            index=_write(partial[names.index], index),
            quarantine=_write(partial[names.quarantine], lines) if lines else None,
        )
        _publish(partial, job.folder, receipt)
        write_record(job.folder, folder, names.receipt, receipt)
    return receipt


def _write(path: Path, data: bytes) -> FileDigest:
    write_synced(path, data)
    return bytes_digest(data)


def write_record(folder: Folder, attempt: Path, name: str, record: Any) -> None:
    """Publish a receipt or a manifest: from now on what it tells of exists. `attempt`: where it is written first."""
    partial = attempt / Path(name).name
    write_synced(partial, shard_format.to_json(record))
    folder.put({name: partial})


def _is_of(receipt: Receipt, job: ShardJob, part: Part) -> bool:
    """Whether a receipt is this job's: a file that was swapped or damaged can be another's, and as well formed."""
    job_says = (job.name, job.config_hash, job.source_hash, part.first_row, part.first_row + part.num_rows)
    return job_says == (receipt.name, receipt.config_hash, receipt.source_hash, receipt.first_row, receipt.end_row)


def _is_whole(folder: Folder, receipt: Receipt, part: Part, check: Check) -> bool:
    """Compare a shard's files with its receipt, byte for byte, and then the receipt, which has no hash, with them.

    Rows that were left out for their images must still be so: only these are read again.
    """
    if verify_shard(folder, receipt):
        return False
    names = shard_files(receipt.name)
    try:
        samples, images = shard_format.decode_index(folder.read(names.index) or b"")
        lines = (folder.read(names.quarantine) or b"").decode().splitlines()
        rejected = [typed_json.build(Rejected, typed_json.parse(line, names.quarantine), names.quarantine) for line in lines]
    except ValueError:
        return False
    counts = (len(samples), len(images), dict(sorted(Counter(row.reason for row in rejected).items())))
    by_image = {row.row: row for row in rejected if row.reason in IMAGE_REASONS}
    return (
        counts == (receipt.num_samples, receipt.num_images, receipt.quarantined)
        and folder.read(names.receipt) == shard_format.to_json(receipt)
        and all(receipt.first_row <= row < receipt.end_row for row in by_image)
        and all(_members(outcome, number, check) == by_image[number] for number, outcome in part.retry(by_image))
    )


def _publish(partial: dict[str, Path], folder: Folder, receipt: Receipt) -> None:
    """Bring the synced files to their places: they are there for good when this returns, and the receipt may follow."""
    names = shard_files(receipt.name)
    first = (names.tar, names.index, names.quarantine) if receipt.quarantine else (names.tar, names.index)
    folder.put({name: partial[name] for name in first})  # a straggler of a killed run fails here: it has changed nothing yet
    if not receipt.quarantine:
        folder.remove(names.quarantine)


@contextlib.contextmanager
def _temporary_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="himix-preprocess-") as folder:
        yield Path(folder)


class _TarWriter:
    """Appends members to a tar and hashes what it writes; a thread brings it to the disk meanwhile."""

    def __init__(self, file: Any) -> None:
        self._file, self.offset, self.digest = file, 0, hashlib.sha256()
        self._thread = ThreadPoolExecutor(1)
        self._synced, self._syncing = 0, self._thread.submit(lambda: None)

    def append(self, member: str, data: bytes) -> int:
        """Returns: where the content begins."""
        start = self.offset + shard_format.BLOCK
        for part in (shard_format.tar_header(member, len(data)), data, shard_format.padding(len(data))):
            self._put(part)
        if self.offset - self._synced >= SYNC_BYTES and self._syncing.done():
            self._syncing.result()  # the kernel tells of a failed write once
            self._file.flush()
            self._synced, self._syncing = self.offset, self._thread.submit(os.fdatasync, self._file.fileno())
        return start

    def finish(self) -> None:
        """End the tar and bring it to the disk."""
        self._put(shard_format.TAR_END)
        self._syncing.result()
        self._thread.shutdown()
        sync_file(self._file)

    def _put(self, data: bytes) -> None:
        self._file.write(data)
        self.digest.update(data)
        self.offset += len(data)


def _members(
    outcome: Sample | BadRow, number: int, check: Check
) -> tuple[list[tuple[str, bytes]], list[image_file.ImageFacts]] | Rejected:
    """A sample's members (name, content) in order, and the facts of its images; or why it is left out."""
    key = shard_format.sample_key(number)
    try:
        if isinstance(outcome, BadRow):
            raise outcome.error
        text = json.dumps({"id": outcome.id, "conversations": outcome.conversations}, ensure_ascii=False).encode()
        look = image_file.verify if check == "decode" else image_file.header
        facts = [look(data) for data in outcome.images]
    except UnicodeEncodeError:
        return Rejected(number, str(outcome.id)[:200], "bad_text", "half of a surrogate pair: no Unicode text")
    except BadSampleError as error:
        return Rejected(number, str(outcome.id)[:200], error.reason, error.detail)
    pictures = [(f"{key}.{k}.{fact.suffix}", data) for k, (fact, data) in enumerate(zip(facts, outcome.images, strict=True))]
    return [(f"{key}.json", text), *pictures], facts
