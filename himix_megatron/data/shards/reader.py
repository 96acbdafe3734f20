"""Reads samples from a dataset folder. The layout is in shard_format.py, the writer in ingest/shard_writer.py.

Reading goes by index and `pread`, one call per member, each checked against its CRC-32. A dataset on S3 is read from whole
shards that remote_cache.py keeps on this machine.
"""

from __future__ import annotations

import hashlib
import os
import struct
import zlib
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ...runtime import typed_json
from ...runtime.durable_files import FileDigest
from ...runtime.untrusted_files import descriptor_below, read_below
from ..errors import BadSampleError
from ..text.chat_template import check_turns
from . import remote_cache, shard_format, storage
from .remote_cache import DamagedFileError, ShardCache
from .shard_format import Manifest, Receipt

Array = npt.NDArray[Any]

MAX_OPEN_SHARDS = 64
"""Per dataset and process; the one opened first is closed. A run may mix several datasets, and the usual limit of open files
is 1,024. As many indexes are held, some 64 KB each: neither grows with the dataset."""

AGAIN = "run the preprocessing again, it makes only what is missing or damaged"


class SampleRecord(NamedTuple):
    """shard_format.SAMPLE_RECORD as numbers."""

    offset: int
    row: int
    size: int
    crc32: int
    first_image: int
    num_images: int


class ImageRecord(NamedTuple):
    """shard_format.IMAGE_RECORD as numbers."""

    offset: int
    size: int
    crc32: int
    width: int
    height: int


# One record at a time, these are five times faster than numpy's.
SAMPLE_FIELDS = struct.Struct("<QQIIII")
IMAGE_FIELDS = struct.Struct("<QIIII")
assert (SampleRecord._fields, SAMPLE_FIELDS.size) == (shard_format.SAMPLE_RECORD.names, shard_format.SAMPLE_RECORD.itemsize)
assert (ImageRecord._fields, IMAGE_FIELDS.size) == (shard_format.IMAGE_RECORD.names, shard_format.IMAGE_RECORD.itemsize)


class DamagedShardError(ValueError):
    """A shard's index is damaged, so none of its samples can be placed."""


class ShardDataset:
    """A finished dataset, by sample number 0 .. len - 1 in source order. Reading is by position: it keeps no state.

    `location` is a folder, file:// or s3://; what is remote goes through a cache in `cache_dir` (None: the user's) of at most
    `cache_bytes`, for all processes of the machine together. With `checksums` False members are handed out as they are read.
    It can be sent to worker processes; each opens the files it needs.
    Raises: ValueError where there is no finished dataset, where a shard is missing or has another size than the manifest says
    (contents are checked as they are read; `data.ingest.verify` checks them all), or where a shard does not fit into the cache.
    """

    def __init__(
        self,
        location: str | Path,
        cache_dir: Path | None = None,
        cache_bytes: int = remote_cache.DEFAULT_BYTES,
        *,
        checksums: bool = True,
    ) -> None:
        if not isinstance(location, Path):
            storage.check_scheme(location, "data.datasets")
        self.location, self.checksums = str(location).rstrip("/"), checksums
        self._cache = ShardCache(cache_dir, cache_bytes) if storage.is_remote(self.location) else None
        self.path = self._cache.folder if self._cache else storage.local_path(str(location))
        self.manifest = self._read_manifest()
        self.fingerprint = self.manifest.fingerprint
        names = [(shard, shard_format.shard_files(shard.name)) for shard in self.manifest.shards]
        tars, indexes = {files.tar: shard.tar for shard, files in names}, {files.index: shard.index for shard, files in names}
        if self._cache is None:
            storage.check_sizes(self.path, tars | indexes, AGAIN)
        else:
            self.path /= self.fingerprint[:32]
            self._keep_indexes(self._cache, tars, indexes)
        self._ends = list(accumulate(self.shard_sizes()))
        self._indexes: OrderedDict[int, ShardIndex] = OrderedDict()
        self._tars: OrderedDict[int, int] = OrderedDict()
        self._last_shard = -1

    @property
    def is_remote(self) -> bool:
        """Whether shards are fetched before they are read. `path` is then the dataset's part of the cache."""
        return self._cache is not None

    def __len__(self) -> int:
        return self.manifest.num_samples

    def shard_sizes(self) -> list[int]:
        """Samples of each shard, in order."""
        return [shard.num_samples for shard in self.manifest.shards]

    def image_counts(self) -> npt.NDArray[np.uint32]:
        """uint32[len]: images of every sample."""
        counts = [self._index(shard).samples["num_images"] for shard in range(len(self._ends))]
        return np.concatenate([np.zeros(0, np.uint32), *counts]).astype(np.uint32, copy=False)

    def sum_over_images(self, of_sizes: Callable[[Array, Array], Array]) -> npt.NDArray[np.int64]:
        """int64[len]: for every sample the sum over its images of a function of their widths and heights, uint32[...] each."""
        sums = [np.zeros(0, np.int64)]
        for shard in range(len(self._ends)):
            index = self._index(shard)
            till = np.cumsum(np.concatenate(([0], of_sizes(index.images["width"], index.images["height"]))))
            first = index.samples["first_image"].astype(np.int64)
            sums.append(till[first + index.samples["num_images"]] - till[first])
        return np.concatenate(sums)

    def num_images(self, i: int) -> int:
        """Images of sample i."""
        return self._sample(i)[1].num_images

    def image_size(self, i: int, k: int) -> tuple[int, int]:
        """(width, height) of image k of sample i as seen."""
        record = self._image(i, k)[1]
        return record.width, record.height

    def image_place(self, i: int, k: int) -> tuple[int, int]:
        """The shard of image k of sample i, and the image's number in it."""
        shard, sample = self._sample(i)
        assert k < sample.num_images, (i, k)
        return shard, sample.first_image + k

    def key(self, i: int) -> str:
        """SHARD/KEY of sample i, for logs and errors."""
        shard, record = self._sample(i)
        return f"{self.manifest.shards[shard].name}/{shard_format.sample_key(record.row)}"

    def text(self, i: int) -> dict[str, Any]:
        """Sample i without its images: `id` and `conversations`.

        Raises: BadSampleError when its bytes are not those that were written; OSError when the machine fails.
        """
        shard, record = self._sample(i)
        return as_text(self._read(self._tar(shard), record, i, None), self.key(i))

    def image_bytes(self, i: int, k: int) -> bytes:
        """The file of image k of sample i. Raises: as `text`."""
        shard, record = self._image(i, k)
        return self._read(self._tar(shard), record, i, k)

    def members(self, i: int) -> list[bytes]:
        """All of sample i as it is stored: its JSON text, then its images. Raises: as `text`."""
        shard, record = self._sample(i)
        index, tar = self._index(shard), self._tar(shard)
        members = [self._read(tar, record, i, None)]
        for k in range(record.num_images):
            members.append(self._read(tar, index.image(record.first_image + k), i, k))
        return members

    def sample(self, i: int) -> tuple[dict[str, Any], list[bytes]]:
        """`text` and every `image_bytes` of sample i, looked up once. Raises: as `text`."""
        text, *images = self.members(i)
        return as_text(text, self.key(i)), images

    def fetch(self, name: str) -> bytes | None:
        """A small file of a remote dataset as it is there now; None where there is none."""
        try:
            return remote_cache.fetch(f"{self.location}/{name}")
        except FileNotFoundError:
            return None

    # ---- opening ---------------------------------------------------------------------------------------------------

    def _read_manifest(self) -> Manifest:
        name = shard_format.MANIFEST
        try:
            if self.is_remote:
                text = remote_cache.fetch(f"{self.location}/{name}")
            else:
                text = read_below(self.path, name, typed_json.MAX_FILE_BYTES)
        except (FileNotFoundError, NotADirectoryError):
            raise ValueError(
                f"{self.location} is not a shard dataset (no {name}): make one with python -m pipelines.preprocess "
                f"--source llava --annotations FILE.json --images DIR --out {self.location}"
            ) from None
        return shard_format.from_json(Manifest, text, f"{self.location}/{name}")

    def _keep_indexes(self, kept: ShardCache, tars: Mapping[str, FileDigest], indexes: Mapping[str, FileDigest]) -> None:
        """See that a remote dataset's indexes are here, and that its shards can be."""
        for name, tar in tars.items():
            kept.check_fits(f"{self.location}/{name}", tar.bytes)
        try:
            kept.keep_small(self.location, self.path, indexes)
        except (DamagedFileError, FileNotFoundError) as error:
            raise ValueError(f"{error}: {AGAIN}") from None

    # ---- reading ---------------------------------------------------------------------------------------------------

    def _place(self, i: int) -> tuple[int, int]:
        """The shard of sample i, and its number there."""
        if not 0 <= i < self.manifest.num_samples:
            raise IndexError(f"sample {i} of {len(self)}")
        shard = bisect_right(self._ends, i)
        return shard, i - self._ends[shard] + self.manifest.shards[shard].num_samples

    def _sample(self, i: int) -> tuple[int, SampleRecord]:
        """The shard of sample i, and its record."""
        shard, place = self._place(i)
        return shard, self._index(shard).sample(place)

    def _image(self, i: int, k: int) -> tuple[int, ImageRecord]:
        """The shard of sample i, and the record of its image k."""
        shard, sample = self._sample(i)
        if not 0 <= k < sample.num_images:
            raise IndexError(f"image {k} of {sample.num_images} of {self.key(i)}")
        return shard, self._index(shard).image(sample.first_image + k)

    def _read(self, tar: int, record: SampleRecord | ImageRecord, i: int, k: int | None) -> bytes:
        """One member of sample i: its text, or image k."""
        try:
            data = os.pread(tar, record.size, record.offset)
        except OSError as error:
            error.add_note(f"while reading {_member(k)} of {self.key(i)}")
            raise
        if len(data) != record.size or (self.checksums and zlib.crc32(data) != record.crc32):
            raise BadSampleError("damaged_shard", f"{_member(k)} of {self.key(i)} does not match its checksum")
        return data

    def _index(self, shard: int) -> ShardIndex:
        """The tables of one shard."""
        index = self._indexes.get(shard)
        if index is None:
            receipt = self.manifest.shards[shard]
            index = read_index(self.path, receipt)
            if len(self._indexes) >= MAX_OPEN_SHARDS:
                self._indexes.popitem(last=False)
            self._indexes[shard] = index
        return index

    def _tar(self, shard: int) -> int:
        """An open file descriptor."""
        tar = self._tars.get(shard)
        if tar is None:
            if len(self._tars) >= MAX_OPEN_SHARDS:
                os.close(self._tars.popitem(last=False)[1])
            tar = self._open_tar(self.manifest.shards[shard])
            for other, descriptor in list(self._tars.items()) if self.is_remote else ():
                if os.fstat(descriptor).st_nlink == 0:  # deleted to make room: closing it gives its bytes back
                    os.close(self._tars.pop(other))
            self._tars[shard] = tar
        elif self.is_remote and shard != self._last_shard:
            remote_cache.mark_used(tar)
        self._last_shard = shard
        return tar

    def _open_tar(self, receipt: Receipt) -> int:
        name = shard_format.shard_files(receipt.name).tar
        try:
            if self._cache is None:
                return descriptor_below(self.path, name)
            return self._cache.open(self.location, self.path, name, receipt.tar)
        except (DamagedFileError, ValueError) as error:
            raise DamagedShardError(f"{error} ({receipt.num_samples} samples at stake)") from None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_indexes": OrderedDict(), "_tars": OrderedDict()}

    def __del__(self) -> None:
        for descriptor in getattr(self, "_tars", {}).values():
            os.close(descriptor)


def read_index(folder: Path, receipt: Receipt) -> ShardIndex:
    """The tables of one shard of a dataset folder. Raises: DamagedShardError; FileNotFoundError."""
    name = shard_format.shard_files(receipt.name).index
    try:
        return ShardIndex(read_below(folder, name, receipt.index.bytes), receipt)
    except ValueError as error:
        raise DamagedShardError(f"{folder / name}: {error} ({receipt.num_samples} samples at stake)") from None


class ShardIndex:
    """The tables of one shard. They tell of this shard only, so that their numbers need no check where they are used.

    Raises: ValueError saying what is wrong with the bytes.
    """

    def __init__(self, data: bytes, receipt: Receipt) -> None:
        self._data = data
        self.samples, self.images = shard_format.decode_index(data)
        if hashlib.sha256(data).hexdigest() != receipt.index.sha256:
            raise ValueError("it is another index than the manifest's")  # another shard's, maybe, of the same size
        if (len(self.samples), len(self.images)) != (receipt.num_samples, receipt.num_images):
            raise ValueError(f"it has {len(self.samples)} samples and {len(self.images)} images, not those of its receipt")
        for table in (self.samples, self.images):
            # A sum of unsigned numbers may wrap, so sizes are compared with what is left behind the offset.
            offsets, end = table["offset"], np.uint64(receipt.tar.bytes)
            if (offsets < shard_format.BLOCK).any() or (offsets > end).any() or (table["size"] > end - offsets).any():
                raise ValueError("a record points out of the tar")
        ends = self.samples["first_image"].astype(np.uint64) + self.samples["num_images"]
        if (ends > len(self.images)).any() or not (self.images["width"].all() and self.images["height"].all()):
            raise ValueError("a record points out of the table of images, or an image has no pixels")
        self._first_image = shard_format.INDEX_HEADER.itemsize + self.samples.nbytes

    def sample(self, place: int) -> SampleRecord:
        """Of the sample at this place of the shard."""
        return SampleRecord._make(
            SAMPLE_FIELDS.unpack_from(self._data, shard_format.INDEX_HEADER.itemsize + SAMPLE_FIELDS.size * place)
        )

    def image(self, place: int) -> ImageRecord:
        """Of the image at this place of the shard."""
        return ImageRecord._make(IMAGE_FIELDS.unpack_from(self._data, self._first_image + IMAGE_FIELDS.size * place))


def _member(k: int | None) -> str:
    return "its text" if k is None else f"image {k}"


def as_text(data: bytes, key: str) -> dict[str, Any]:
    """A sample's KEY.json. Raises: BadSampleError when it is no object with turns, which we never write."""
    try:
        sample = typed_json.parse_object(data, key)
    except ValueError as error:
        raise BadSampleError("malformed", str(error)) from None
    check_turns(sample.get("conversations"))
    return sample
