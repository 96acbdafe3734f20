"""A dataset folder in, samples out. The layout is schema.py's, the writer writing.py's.

Reading goes by index and `pread`, one call per member, each checked against its CRC-32.
"""

from __future__ import annotations

import json
import mmap
import os
import zlib
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

from himix_megatron.data import schema
from himix_megatron.data.schema import BadSampleError, Receipt, Records

MAX_OPEN_TARS = 128
"""Per process; the one used longest ago is closed. The usual limit of open files is 1,024."""


class DamagedShardError(RuntimeError):
    """A shard's index is damaged, so none of its samples can be placed."""


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
