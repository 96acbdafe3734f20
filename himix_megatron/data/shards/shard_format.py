"""The shard contract: what a dataset folder holds, byte for byte. Writers and readers both import it; no torch, no ray.

    OUT/shards/NAME-000000.tar          USTAR with fixed metadata: plain WebDataset; members KEY.json, KEY.0.jpg, KEY.1.png ...
    OUT/shards/NAME-000000.idx          header, sample table, image table (little-endian; dtypes below)
    OUT/receipts/NAME-000000.json       a `Receipt`: the shard exists when this does
    OUT/quarantine/NAME-000000.jsonl    the rows left out, each with its reason; only where there are any
    OUT/lengths/COLUMN/NAME-000000.text a `TextColumn` for one tokenizer and template; can be added at any time
    OUT/manifest.json                   a `Manifest`, written last: the dataset exists when this does

KEY is the row's number in the source, so keys are unique whatever the ids are. KEY.json holds `id` and `conversations` in
LLaVA's layout. Every file is a pure function of (source, row range, config): no time, host, path or duration is in any.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, TypeVar, get_type_hints

import numpy as np
import numpy.typing as npt

from ...runtime import typed_json
from ...runtime.durable_files import FileDigest
from ...runtime.limits import ShardName, Size

SCHEMA_VERSION: Final = 1
MANIFEST = "manifest.json"

INDEX_MAGIC = b"HIMIXIDX"
INDEX_HEADER = np.dtype([("magic", "S8"), ("version", "<u4"), ("num_samples", "<u4"), ("num_images", "<u4"), ("crc32", "<u4")])
"""24 bytes; `crc32` is of everything after the header."""
SAMPLE_RECORD = np.dtype(
    [("offset", "<u8"), ("row", "<u8"), ("size", "<u4"), ("crc32", "<u4"), ("first_image", "<u4"), ("num_images", "<u4")]
)
"""32 bytes: where KEY.json's content lies in the tar, the source row, and which image records are its own."""
IMAGE_RECORD = np.dtype([("offset", "<u8"), ("size", "<u4"), ("crc32", "<u4"), ("width", "<u4"), ("height", "<u4")])
"""24 bytes: where the image's content lies in the tar, and its pixels as seen (after EXIF rotation)."""

LENGTHS_MAGIC = b"HIMIXLEN"
LENGTHS_VERSION = 2
"""Of this file alone. Version 1, without the places of images, is another file (NAME.len), which is not read."""
LENGTHS_HEADER = np.dtype(
    [("magic", "S8"), ("version", "<u4"), ("num_samples", "<u4"), ("num_images", "<u4"), ("crc32", "<u4"), ("shard", "V16")]
)
"""40 bytes, before a uint32 for each sample and then for each image; `crc32` is of those, `shard` the start of the tar's
SHA-256."""

BLOCK = 512
"""Bytes of a tar block: headers take one, contents are padded to a multiple."""

Records = npt.NDArray[np.void]
Record = TypeVar("Record")
"""A `Receipt` or a `Manifest`, or a feature cache's."""


@dataclass(frozen=True, slots=True)
class Receipt:
    """What one shard holds, and the hashes of its files."""

    schema_version: Literal[1]
    name: ShardName
    """NAME-000000, without a suffix."""
    config_hash: str
    source_hash: str
    first_row: Size
    end_row: Size
    """Source rows first_row <= row < end_row went into this shard or its quarantine."""
    num_samples: Size
    num_images: Size
    quarantined: dict[str, Size]
    """Rows left out, by reason."""
    tar: FileDigest
    index: FileDigest
    quarantine: FileDigest | None
    """None: no row was left out, and there is no file."""


class TextColumn(NamedTuple):
    """The texts of one shard in tokens: how long each is, and where its images stand in it."""

    lengths: npt.NDArray[np.uint32]
    """uint32[num_samples]: of whole texts; 0: the template has no place for it."""
    image_places: npt.NDArray[np.uint32]
    """uint32[num_images], in the order of the image table: the tokens of its sample's whole text that come before it."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """A whole dataset: its shards in order, and what they came from."""

    schema_version: Literal[1]
    name: str
    config: dict[str, Any]
    """The settings that decide the bytes."""
    config_hash: str
    source_hash: str
    """SHA-256 of the annotation file."""
    num_rows: Size
    num_samples: Size
    num_images: Size
    quarantined: dict[str, Size]
    shards: tuple[Receipt, ...]

    def __post_init__(self) -> None:
        for field in ("num_samples", "num_images"):
            if getattr(self, field) != (total := sum(getattr(shard, field) for shard in self.shards)):
                raise ValueError(f"{field} is {getattr(self, field)}, but its shards have {total}")

    @property
    def fingerprint(self) -> str:
        """SHA-256 of everything else in the manifest: datasets with the same one hold the same samples in the same order."""
        return hash_of(dataclasses.asdict(self))


def hash_of(value: Any) -> str:
    """SHA-256 of a JSON value in its one canonical spelling."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def shard_name(name: str, number: int) -> str:
    """NAME-000000."""
    return f"{name}-{number:06d}"


def sample_key(row: int) -> str:
    """A sample's key in its tar: the source row. No dot may be in it, since WebDataset ends the key at the first one."""
    return f"{row:09d}"


@dataclass(frozen=True, slots=True)
class ShardFiles:
    """Where the files of one shard are in a dataset folder (or in a folder beside it, of the same layout), with slashes."""

    tar: str
    index: str
    receipt: str
    quarantine: str


def shard_files(name: str) -> ShardFiles:
    """The names of one shard's files."""
    return ShardFiles(f"shards/{name}.tar", f"shards/{name}.idx", f"receipts/{name}.json", f"quarantine/{name}.jsonl")


def manifest_path(folder: Path) -> Path:
    """Where the manifest is."""
    return folder / MANIFEST


# The fields of a USTAR header around name, size and checksum (POSIX.1-1988, section 10.1.1).
_MODE_AND_OWNER = b"0000644\0" + 2 * b"0000000\0"
_NO_TIME = b"00000000000\0"
_TYPE_AND_REST = (b"0" + bytes(100) + b"ustar\x0000").ljust(356, b"\0")
_CONSTANT_SUM = sum(_TYPE_AND_REST) + 8 * ord(" ")  # the checksum counts its own field as spaces


def tar_header(member: str, size: int) -> bytes:
    """One USTAR header block with fixed metadata: mtime 0, owner 0, mode 0644.

    The same bytes as tarfile's in a tenth of the time, which is a tenth of what a row costs when images are not decoded.
    """
    name = member.encode("ascii")
    assert len(name) <= 100, member
    assert 0 <= size < 8**11, size
    head = b"%b%b%011o\0%b" % (name.ljust(100, b"\0"), _MODE_AND_OWNER, size, _NO_TIME)
    checksum = sum(head) + _CONSTANT_SUM
    return b"%b%06o\0 %b" % (head, checksum, _TYPE_AND_REST)


def padding(size: int) -> bytes:
    """Zeros that fill a content of this size up to whole tar blocks."""
    return bytes(-size % BLOCK)


TAR_END = bytes(2 * BLOCK)
"""Two empty blocks end a tar."""


def encode_index(samples: Records, images: Records) -> bytes:
    """The index file's bytes."""
    tables = samples.tobytes() + images.tobytes()
    header = np.array((INDEX_MAGIC, SCHEMA_VERSION, len(samples), len(images), zlib.crc32(tables)), INDEX_HEADER)
    return header.tobytes() + tables


def decode_index(data: bytes | memoryview) -> tuple[Records, Records]:
    """The sample and the image table.

    Raises: ValueError saying what is wrong with the bytes.
    """
    if len(data) < INDEX_HEADER.itemsize:
        raise ValueError(f"{len(data)} bytes are too few for an index")
    header = np.frombuffer(data, INDEX_HEADER, count=1)[0]
    if header["magic"] != INDEX_MAGIC or header["version"] != SCHEMA_VERSION:
        raise ValueError(f"not an index of schema version {SCHEMA_VERSION}")
    num_samples, num_images = int(header["num_samples"]), int(header["num_images"])
    start = INDEX_HEADER.itemsize
    middle = start + num_samples * SAMPLE_RECORD.itemsize
    if len(data) != middle + num_images * IMAGE_RECORD.itemsize:
        raise ValueError(f"{len(data)} bytes do not hold {num_samples} samples and {num_images} images")
    if zlib.crc32(memoryview(data)[start:]) != header["crc32"]:
        raise ValueError("its checksum does not match its content")
    return (
        np.frombuffer(data, SAMPLE_RECORD, count=num_samples, offset=start),
        np.frombuffer(data, IMAGE_RECORD, count=num_images, offset=middle),
    )


def lengths_file(column: str, name: str) -> str:
    """Where the `TextColumn` of one shard is in a dataset folder. `column`: see loading/token_counts.py."""
    return f"lengths/{column}/{name}.text"


def encode_text_column(column: TextColumn, receipt: Receipt) -> bytes:
    """The file's bytes for the shard with this receipt."""
    table = b"".join(part.astype("<u4").tobytes() for part in column)
    start = np.void(bytes.fromhex(receipt.tar.sha256)[:16])
    fields = (LENGTHS_MAGIC, LENGTHS_VERSION, *map(len, column), zlib.crc32(table), start)
    return np.array(fields, LENGTHS_HEADER).tobytes() + table


def decode_text_column(data: bytes, receipt: Receipt) -> TextColumn:
    """The column of this receipt's shard.

    Raises: ValueError when the bytes are of another version or damaged, or belong to another shard.
    """
    header = np.frombuffer(data, LENGTHS_HEADER, count=1)[0] if len(data) >= LENGTHS_HEADER.itemsize else None
    if header is None or header["magic"] != LENGTHS_MAGIC or header["version"] != LENGTHS_VERSION:
        raise ValueError(f"not a text column of version {LENGTHS_VERSION}")
    counts = (receipt.num_samples, receipt.num_images)
    start = bytes.fromhex(receipt.tar.sha256)[:16]
    if bytes(header["shard"]) != start or (header["num_samples"], header["num_images"]) != counts:
        raise ValueError("it was made from another shard")
    table = memoryview(data)[LENGTHS_HEADER.itemsize :]
    if len(table) != 4 * sum(counts) or zlib.crc32(table) != header["crc32"]:
        raise ValueError("its checksum does not match its content")
    return TextColumn(*np.split(np.frombuffer(table, "<u4"), [receipt.num_samples]))


def to_json(record: Any) -> bytes:
    """JSON text of a receipt or a manifest (which carries its fingerprint), fields in order; a feature cache's alike."""
    values = dataclasses.asdict(record)
    if fingerprint := getattr(record, "fingerprint", None):
        values["fingerprint"] = fingerprint
    return (json.dumps(values, indent=1) + "\n").encode()


def from_json(cls: type[Record], data: bytes, where: str = MANIFEST) -> Record:
    """What `to_json` made of a record of this class. The versions that are read stand in the type of its first field.

    Raises: ValueError (`where` is the file's name in it) for text that is none of these versions, or whose fingerprint is not
    its own.
    """
    values = typed_json.parse_object(data, where)
    version, hint = next(iter(get_type_hints(cls).items()))
    typed_json.as_type(hint, values.get(version), where, version)  # first: another version has other fields
    fingerprint = values.pop("fingerprint", None)
    record = typed_json.build(cls, values, where)
    if getattr(record, "fingerprint", None) != fingerprint:
        raise ValueError(f"{where}: its fingerprint does not match its content: it was changed by hand or damaged")
    return record
