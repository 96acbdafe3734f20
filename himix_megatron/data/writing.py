"""Rows in, a shard's files out. The layout is schema.py's.

A shard is written beside its place, synced and renamed, and its receipt last, so what has a receipt is whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from himix_megatron.data import image, schema
from himix_megatron.data.schema import BadSampleError, FileDigest, Manifest, Receipt
from himix_megatron.data.shards import load_receipt, verify_shard
from himix_megatron.data.sources import Sample

ReadRow = Callable[[Any, int], Sample]
"""(row, its number) -> the sample. Raises: BadSampleError."""


@dataclass(frozen=True, slots=True)
class ShardJob:
    """Which shard to make, and where."""

    folder: Path
    """The dataset."""
    attempt: Path
    """Where files are written before they are renamed; this attempt's own, so that a straggler of a killed one finds nothing
    left to rename."""
    name: str
    """NAME-000000."""
    first_row: int
    config_hash: str
    source_hash: str


def make_shard(job: ShardJob, rows: Sequence[Any], read: ReadRow) -> tuple[Receipt, bool]:
    """See that the shard of these source rows exists: verify it by its receipt, or write it.

    Returns: the receipt, and whether the shard was written. The bytes depend on rows, images and config only.
    """
    receipt = load_receipt(job.folder, job.name)
    if receipt and not verify_shard(job.folder, receipt):
        return receipt, False
    return write_shard(job, rows, read), True


def write_shard(job: ShardJob, rows: Sequence[Any], read: ReadRow) -> Receipt:
    """Write and publish one shard: tar, index, quarantine, then the receipt. Bad rows are left out and listed."""
    partial = schema.ShardPaths(*(job.attempt / f"{job.name}.{part}" for part in ("tar", "idx", "receipt", "quarantine")))
    samples: list[tuple[int, ...]] = []
    images: list[tuple[int, ...]] = []
    rejected: list[dict[str, Any]] = []
    with partial.tar.open("wb") as file:
        tar = _TarWriter(file)
        for number, row in enumerate(rows, job.first_row):
            try:
                members, facts = _members(read(row, number), number)
            except BadSampleError as error:
                rejected.append(_rejection(row, number, error))
                continue
            text, *pictures = [(tar.append(name, data), len(data), zlib.crc32(data)) for name, data in members]
            samples.append((text[0], number, *text[1:], len(images), len(pictures)))
            images += [(*picture, fact.width, fact.height) for picture, fact in zip(pictures, facts, strict=True)]
        tar.finish()
    index = schema.encode_index(np.array(samples, schema.SAMPLE_RECORD), np.array(images, schema.IMAGE_RECORD))
    lines = "".join(json.dumps(line) + "\n" for line in rejected).encode()
    receipt = Receipt(
        schema_version=schema.SCHEMA_VERSION,
        name=job.name,
        config_hash=job.config_hash,
        source_hash=job.source_hash,
        first_row=job.first_row,
        end_row=job.first_row + len(rows),
        num_samples=len(samples),
        num_images=len(images),
        quarantined=dict(sorted(Counter(line["reason"] for line in rejected).items())),
        tar=FileDigest(tar.offset, tar.digest.hexdigest()),
        index=write_synced(partial.index, index),
        quarantine=write_synced(partial.quarantine, lines) if lines else None,
    )
    write_synced(partial.receipt, schema.to_json(receipt).encode())
    _publish(partial, schema.shard_paths(job.folder, job.name), receipt)
    return receipt


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Publish a dataset: from now on it exists."""
    partial = folder / ".manifest.partial"
    write_synced(partial, schema.to_json(manifest).encode())
    os.replace(partial, schema.manifest_path(folder))
    sync_folder(folder)


class _TarWriter:
    """Appends members to a tar and hashes what it writes."""

    def __init__(self, file: Any) -> None:
        self._file, self.offset, self.digest = file, 0, hashlib.sha256()

    def append(self, member: str, data: bytes) -> int:
        """Returns: where the content begins."""
        start = self.offset + schema.BLOCK
        for part in (schema.tar_header(member, len(data)), data, schema.padding(len(data))):
            self._put(part)
        return start

    def finish(self) -> None:
        """End the tar and bring it to the disk."""
        self._put(schema.TAR_END)
        sync(self._file)

    def _put(self, data: bytes) -> None:
        self._file.write(data)
        self.digest.update(data)
        self.offset += len(data)


def _members(sample: Sample, number: int) -> tuple[list[tuple[str, bytes]], list[image.ImageFacts]]:
    """A sample's members (name, content) in order, and the facts of its images. Raises: BadSampleError."""
    key = schema.sample_key(number)
    try:
        text = json.dumps({"id": sample.id, "conversations": sample.conversations}, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise BadSampleError("bad_text", "half of a surrogate pair: no Unicode text") from None
    facts = [image.verify(data) for data in sample.images]
    pictures = [(f"{key}.{k}.{fact.suffix}", data) for k, (fact, data) in enumerate(zip(facts, sample.images, strict=True))]
    return [(f"{key}.json", text), *pictures], facts


def _rejection(row: Any, number: int, error: BadSampleError) -> dict[str, Any]:
    """A line of the quarantine."""
    name = row.get("id") if isinstance(row, dict) else None
    return {"row": number, "id": None if name is None else str(name)[:200], "reason": error.reason, "detail": error.detail}


def _publish(partial: schema.ShardPaths, final: schema.ShardPaths, receipt: Receipt) -> None:
    """Rename the synced files to their places, the receipt after the rest is on the disk."""
    os.replace(partial.tar, final.tar)
    os.replace(partial.index, final.index)
    if receipt.quarantine:
        os.replace(partial.quarantine, final.quarantine)
    else:
        final.quarantine.unlink(missing_ok=True)
    sync_folder(final.tar.parent)
    sync_folder(final.quarantine.parent)
    os.replace(partial.receipt, final.receipt)
    sync_folder(final.receipt.parent)


def write_synced(path: Path, data: bytes) -> FileDigest:
    """Write a file and bring it to the disk."""
    with path.open("wb") as file:
        file.write(data)
        sync(file)
    return FileDigest(len(data), hashlib.sha256(data).hexdigest())


def sync(file: Any) -> None:
    """Bring what was written to the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Bring renames to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
