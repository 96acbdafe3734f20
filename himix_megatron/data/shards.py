"""Rows in, a shard's files out; and a dataset folder in, samples out. The layout is schema.py's.

A shard is written beside its place, synced and renamed, and its receipt last, so what has a receipt is whole. Reading goes
by index and `pread`, one call per member, each checked against its CRC-32.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import zlib
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from himix_megatron.data import image, schema
from himix_megatron.data.schema import BadSampleError, FileDigest, Manifest, Receipt, Records
from himix_megatron.data.sources import Sample

ReadRow = Callable[[Any, int], Sample]
"""(row, its number) -> the sample. Raises: BadSampleError."""

MAX_OPEN_TARS = 128
"""Per process; the one used longest ago is closed. The usual limit of open files is 1,024."""


class DamagedShardError(RuntimeError):
    """A shard's index is damaged, so none of its samples can be placed."""


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
        index=_write(partial.index, index),
        quarantine=_write(partial.quarantine, lines) if lines else None,
    )
    _write(partial.receipt, schema.to_json(receipt).encode())
    _publish(partial, schema.shard_paths(job.folder, job.name), receipt)
    return receipt


def load_receipt(folder: Path, name: str) -> Receipt | None:
    """A shard's receipt; None where there is none that can be read (the shard is then made again)."""
    try:
        return schema.receipt_from_json(schema.shard_paths(folder, name).receipt.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def verify_shard(folder: Path, receipt: Receipt) -> list[str]:
    """Compare a shard's files with its receipt, byte for byte. Returns: what is wrong, one line each; empty: nothing."""
    paths = schema.shard_paths(folder, receipt.name)
    wrong = []
    for path, wanted in ((paths.tar, receipt.tar), (paths.index, receipt.index), (paths.quarantine, receipt.quarantine)):
        try:
            found = schema.file_digest(path)
        except FileNotFoundError:
            found = None
        if found != wanted:
            state = "missing" if found is None else "unexpected" if wanted is None else "damaged"
            wrong.append(f"{path.name} is {state} ({receipt.num_samples} samples at stake)")
    return wrong


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Publish a dataset: from now on it exists."""
    partial = folder / ".manifest.partial"
    _write(partial, schema.to_json(manifest).encode())
    os.replace(partial, schema.manifest_path(folder))
    _sync_folder(folder)


class ShardDataset:
    """A finished dataset, by sample number 0 .. len - 1 in source order. Reading is by position: it keeps no state.

    It can be sent to worker processes; each opens the files it needs.
    Raises: ValueError where there is no finished dataset, or where a shard is missing or has another size than the manifest
    says. (Contents are checked as they are read; `verify_shard` checks them all.)
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        file = schema.manifest_path(self.path)
        if not file.is_file():
            raise ValueError(
                f"{self.path} is not a shard dataset (no {file.name}): make one with python -m pipelines.preprocess "
                f"--source llava --annotations FILE.json --images DIR --out {self.path}"
            )
        try:
            self.manifest = schema.manifest_from_json(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None
        for shard in self.manifest.shards:
            paths = schema.shard_paths(self.path, shard.name)
            for part, wanted in ((paths.tar, shard.tar), (paths.index, shard.index)):
                if not part.is_file() or part.stat().st_size != wanted.bytes:
                    state = f"has {part.stat().st_size} bytes, not {wanted.bytes}" if part.is_file() else "is missing"
                    raise ValueError(f"{part} {state}: run the preprocessing again, it makes only what is missing or damaged")
        self.fingerprint = self.manifest.fingerprint
        self._ends = np.cumsum([shard.num_samples for shard in self.manifest.shards])
        self._indexes: dict[int, tuple[Records, Records]] = {}
        self._tars: OrderedDict[int, int] = OrderedDict()

    def __len__(self) -> int:
        return self.manifest.num_samples

    def num_images(self, i: int) -> int:
        """Images of sample i."""
        return int(self._sample(i)[1]["num_images"])

    def image_size(self, i: int, k: int) -> tuple[int, int]:
        """(width, height) of image k of sample i as seen."""
        record = self._image(i, k)[1]
        return int(record["width"]), int(record["height"])

    def key(self, i: int) -> str:
        """SHARD/KEY of sample i, for logs and errors."""
        shard, record = self._sample(i)
        return f"{self.manifest.shards[shard].name}/{schema.sample_key(int(record['row']))}"

    def text(self, i: int) -> dict[str, Any]:
        """Sample i without its images: `id` and `conversations`.

        Raises: BadSampleError when its bytes are not those that were written; OSError when the machine fails.
        """
        shard, record = self._sample(i)
        sample = json.loads(self._read(shard, record, i, "its text"))
        assert isinstance(sample, dict)
        return sample

    def image_bytes(self, i: int, k: int) -> bytes:
        """The file of image k of sample i. Raises: as `text`."""
        shard, record = self._image(i, k)
        return self._read(shard, record, i, f"image {k}")

    def _sample(self, i: int) -> tuple[int, np.void]:
        """Its shard's number, and its record."""
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}")
        shard = int(np.searchsorted(self._ends, i, side="right"))
        return shard, self._index(shard)[0][i - int(self._ends[shard]) + self.manifest.shards[shard].num_samples]

    def _image(self, i: int, k: int) -> tuple[int, np.void]:
        shard, sample = self._sample(i)
        if not 0 <= k < sample["num_images"]:
            raise IndexError(f"image {k} of {sample['num_images']} of {self.key(i)}")
        return shard, self._index(shard)[1][int(sample["first_image"]) + k]

    def _index(self, shard: int) -> tuple[Records, Records]:
        """The tables of one shard, mapped into memory: processes of one machine share the pages."""
        if shard not in self._indexes:
            receipt = self.manifest.shards[shard]
            path = schema.shard_paths(self.path, receipt.name).index
            with path.open("rb") as file:
                data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            try:
                self._indexes[shard] = schema.decode_index(memoryview(data))
            except ValueError as error:
                raise DamagedShardError(f"{path}: {error} ({receipt.num_samples} samples at stake)") from None
        return self._indexes[shard]

    def _read(self, shard: int, record: np.void, i: int, what: str) -> bytes:
        size = int(record["size"])
        try:
            data = os.pread(self._tar(shard), size, int(record["offset"]))
        except OSError as error:
            error.add_note(f"while reading {what} of {self.key(i)}")
            raise
        if len(data) != size or zlib.crc32(data) != record["crc32"]:
            raise BadSampleError("damaged_shard", f"{what} of {self.key(i)} does not match its checksum")
        return data

    def _tar(self, shard: int) -> int:
        """An open file descriptor."""
        if shard not in self._tars:
            if len(self._tars) >= MAX_OPEN_TARS:
                os.close(self._tars.popitem(last=False)[1])
            self._tars[shard] = os.open(schema.shard_paths(self.path, self.manifest.shards[shard].name).tar, os.O_RDONLY)
        self._tars.move_to_end(shard)
        return self._tars[shard]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_indexes": {}, "_tars": OrderedDict()}

    def __del__(self) -> None:
        for descriptor in getattr(self, "_tars", {}).values():
            os.close(descriptor)


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
        _sync(self._file)

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
    _sync_folder(final.tar.parent)
    _sync_folder(final.quarantine.parent)
    os.replace(partial.receipt, final.receipt)
    _sync_folder(final.receipt.parent)


def _write(path: Path, data: bytes) -> FileDigest:
    with path.open("wb") as file:
        file.write(data)
        _sync(file)
    return FileDigest(len(data), hashlib.sha256(data).hexdigest())


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Bring renames to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
