"""Features of a dataset's images, made once: what a cache folder holds, byte for byte, and how it is read.

    OUT/features/NAME-000000.safetensors   of all images of the dataset's shard NAME-000000, in the order of its index
    OUT/features/blank.safetensors         of one image: the all-zero one that stands for "no image"
    OUT/receipts/NAME-000000.json          a `FeatureReceipt`: the file exists when this does; blank.json likewise
    OUT/towers/HASH.safetensors            the tower that made them
    OUT/manifest.json                      a `FeatureManifest`, written last: the cache exists when this does

A feature file is plain safetensors. Version 1, where all images have the same number of tokens: `features` [K, n, V] in BF16,
or in F8_E4M3 with `scales` F32 [K, n] (a feature is value x scale), and `crc32` I64 [K] of each image's values and scales.
Version 2, where images differ: `features` [T, V], the images one after the other, `scales` F32 [T], `crc32` I64 [K], and
`lengths` I64 [K], the tokens of each image. An image that could not be decoded has zeros, and is named in the receipt.
ingest/feature_writer.py writes them. K images, n tokens of one image, T of all, V width.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import zlib
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...config import Config
from ...runtime import typed_json
from ...runtime.durable_files import FileDigest
from ...runtime.limits import Count, Size
from ...runtime.untrusted_files import descriptor_below, read_below
from ..errors import BadSampleError
from ..shards import shard_format
from ..shards.reader import DamagedShardError, ShardDataset
from ..shards.shard_format import MANIFEST
from ..shards.storage import check_sizes

FIXED_VERSION: Final = 1
FLAT_VERSION: Final = 2
"""Of caches in which all images have the same number of tokens, and of those in which they differ."""
BLANK = "blank"
"""Name of the file with the all-zero image's features."""
MAX_OPEN_FILES = 64
"""Per cache and process; the one opened first is closed."""
AGAIN = "run pipelines.encode again, it makes only what is missing or damaged"

Dtype = Literal["bf16", "fp8_token"]
Version = Literal[1, 2]

_VISION = (
    "tower", "image_size", "patch_size", "hidden_size", "num_layers", "num_attention_heads", "ffn_hidden_size", "feature_layer",
    "resize", "interpolation", "pixel_mean", "pixel_std",
)  # fmt: skip


def feature_key(config: Config, dataset: ShardDataset, tower: str | None = None) -> dict[str, Any]:
    """Everything that decides the features, by the names of the settings. `tower`: hash of its weights, where it is known."""
    key: dict[str, Any] = {"dataset": dataset.fingerprint}
    key |= {f"vision.{name}": getattr(config.vision, name) for name in _VISION}
    if levels := config.vision.feature_layers:
        key["vision.feature_layer"] = levels if len(levels) > 1 else levels[0]
    key |= {"data.decode": config.data.decode, "data.features_dtype": config.data.features_dtype}
    key["train.precision"] = config.train.precision  # the tower runs in it
    return json.loads(json.dumps(key | ({"tower": tower} if tower else {})))  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True)
class FeatureReceipt:
    """What one feature file holds, and what it came from."""

    features_version: Version
    name: str
    key_hash: str
    source: str
    """SHA-256 of the shard's tar; of nothing for the blank image."""
    num_images: Size
    damaged: tuple[int, ...]
    """Images, counted in the shard, that could not be decoded."""
    squared_error: float
    """Sum over all values of (stored - computed)^2."""
    squared: float
    """Sum over all values of computed^2."""
    file: FileDigest


@dataclass(frozen=True, slots=True)
class FeatureManifest:
    """A whole cache: its files, and everything that decided them."""

    features_version: Version
    key: dict[str, Any]
    tokens_per_image: Count | None
    """None: images differ."""
    width: Count
    num_images: Size
    relative_error: float
    """What storing lost: root of squared error over squares, over all images."""
    blank: FeatureReceipt
    shards: tuple[FeatureReceipt, ...]

    def __post_init__(self) -> None:
        typed_json.as_type(Dtype, self.key.get("data.features_dtype"), "key", "data.features_dtype")

    @property
    def fingerprint(self) -> str:
        """SHA-256 of everything else in the manifest."""
        return shard_format.hash_of(dataclasses.asdict(self))

    @property
    def dtype(self) -> Dtype:
        """How features are stored."""
        dtype: Dtype = self.key["data.features_dtype"]
        return dtype


def token_starts(num_images: int, tokens: int | None, lengths: npt.ArrayLike = ()) -> range | npt.NDArray[np.int64]:
    """`Layout.starts` of images that all have `tokens`; None: that have `lengths`."""
    if tokens is not None:
        return range(0, (num_images + 1) * tokens, tokens)
    return np.cumsum(np.append(0, np.asarray(lengths, np.int64)))


@dataclass(frozen=True)
class Layout:
    """Where everything is in a feature file of K images."""

    starts: range | npt.NDArray[np.int64]
    """K + 1 numbers: tokens before each image, then of all. A range, which takes no memory, where images do not differ."""
    width: int
    dtype: Dtype

    @property
    def version(self) -> Version:
        """Of the format."""
        return FIXED_VERSION if isinstance(self.starts, range) else FLAT_VERSION

    @property
    def num_images(self) -> int:
        """K."""
        return len(self.starts) - 1

    @property
    def num_tokens(self) -> int:
        """T."""
        return int(self.starts[-1])

    @property
    def token_bytes(self) -> tuple[int, int]:
        """Of one token's values, and of its scale."""
        return (2 * self.width, 0) if self.dtype == "bf16" else (self.width, 4)

    @functools.cached_property
    def header(self) -> bytes:
        """What a safetensors file begins with."""
        images, tokens = self.num_images, self.num_tokens
        shape = [images, self.starts.step] if isinstance(self.starts, range) else [tokens]
        of_values, of_scale = self.token_bytes
        tensors = [("features", "BF16" if self.dtype == "bf16" else "F8_E4M3", [*shape, self.width], of_values * tokens)]
        if of_scale:
            tensors.append(("scales", "F32", shape, of_scale * tokens))
        tensors.append(("crc32", "I64", [images], 8 * images))
        if self.version == FLAT_VERSION:
            tensors.append(("lengths", "I64", [images], 8 * images))
        entries, end = {}, 0
        for name, dtype, of_tensor, size in tensors:
            begin, end = end, end + size
            entries[name] = {"dtype": dtype, "shape": of_tensor, "data_offsets": [begin, end]}
        text = json.dumps(entries).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    def places(self, image: int) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
        """(offset, bytes) of one image's values, scales and checksum."""
        first, end = int(self.starts[image]), int(self.starts[image + 1])
        of_values, of_scale = self.token_bytes
        values = len(self.header)
        scales = values + of_values * self.num_tokens
        crc32 = scales + of_scale * self.num_tokens
        return (
            (values + of_values * first, of_values * (end - first)),
            (scales + of_scale * first, of_scale * (end - first)),
            (crc32 + 8 * image, 8),
        )

    def unpack(self, values: bytes, scales: bytes) -> Tensor:
        """One image's features: bf16[n, V], or float32[n, V] of fp8."""
        stored = torch.frombuffer(bytearray(values), dtype=torch.bfloat16 if self.dtype == "bf16" else torch.float8_e4m3fn)
        stored = stored.view(-1, self.width)
        return stored.float() * torch.frombuffer(bytearray(scales), dtype=torch.float32)[:, None] if scales else stored


def feature_file(name: str) -> str:
    """Where the features of a shard are, in the cache's folder."""
    return f"features/{name}.safetensors"


class FeatureCache:
    """A finished cache of one dataset. It can be sent to worker processes; each opens the files it needs.

    Raises: ValueError where there is no finished cache, it is of another dataset, or a file is missing or has another size.
    """

    def __init__(self, folder: str | Path, dataset: ShardDataset) -> None:
        self.folder, self.dataset = Path(folder), dataset
        file = self.folder / MANIFEST
        try:
            text = read_below(self.folder, MANIFEST, typed_json.MAX_FILE_BYTES)
            self.manifest = shard_format.from_json(FeatureManifest, text, str(file))
        except (FileNotFoundError, NotADirectoryError):
            raise ValueError(
                f"data.features: {folder} holds no finished features (no {file.name}): make them with python -m "
                f"pipelines.encode RECIPE --data {dataset.location} --out {folder}"
            ) from None
        self.check({"dataset": dataset.fingerprint})
        wanted = [(BLANK, 1), *((shard.name, shard.num_images) for shard in dataset.manifest.shards)]
        receipts = (self.manifest.blank, *self.manifest.shards)
        if [(receipt.name, receipt.num_images) for receipt in receipts] != wanted:
            raise ValueError(f"{file}: its files are not those of the shards of {dataset.location}: run pipelines.encode again")
        check_sizes(self.folder, {feature_file(receipt.name): receipt.file for receipt in receipts}, AGAIN)
        self._files: OrderedDict[str, tuple[int, Layout]] = OrderedDict()

    def check(self, key: Mapping[str, Any]) -> None:
        """Compare with what is wanted now. Raises: ValueError naming the first part of the key that differs."""
        for name, wanted in key.items():
            found = self.manifest.key.get(name)
            if found == wanted:
                continue
            if "." not in name:
                what = {"dataset": "of another dataset", "tower": "by a tower with other weights"}[name]
                raise ValueError(
                    f"data.features: {self.folder} was made {what} ({name} {str(found)[:12]}, here {str(wanted)[:12]}): encode "
                    "this one with python -m pipelines.encode"
                )
            if name == "vision.feature_layer" and (isinstance(found, list) or isinstance(wanted, list)):
                name = "vision.feature_layers"  # takes one or several
            raise ValueError(
                f"data.features: {self.folder} was made with {name} {_said(found)}, but here it is {_said(wanted)}: use "
                f"--{name.replace('_', '-')} {_said(found)}, or encode again with python -m pipelines.encode"
            )

    def blank(self) -> Tensor:
        """The all-zero image's features, as `read`. Raises: ValueError when they are damaged."""
        try:
            return self._read(self.manifest.blank, 0, "the blank image")
        except BadSampleError as error:
            raise ValueError(f"data.features {self.folder}: {error.detail}: run pipelines.encode again") from None

    def read(self, i: int, k: int) -> Tensor:
        """Features of image k of sample i: bf16[n, V], or float32[n, V] of fp8.

        Raises: BadSampleError when the image could not be decoded, or its features are damaged; DamagedShardError when none of
            the file's can be placed; OSError when the machine fails.
        """
        shard, image = self.dataset.image_place(i, k)
        receipt = self.manifest.shards[shard]
        if image in receipt.damaged:
            raise BadSampleError("damaged_image", "it could not be decoded when it was encoded")
        return self._read(receipt, image, f"image {k} of {self.dataset.key(i)}")

    def _read(self, receipt: FeatureReceipt, image: int, what: str) -> Tensor:
        file, layout = self._file(receipt)
        values, scales, crc32 = (os.pread(file, size, offset) for offset, size in layout.places(image))
        if zlib.crc32(scales, zlib.crc32(values)).to_bytes(8, "little") != crc32:
            raise BadSampleError("damaged_features", f"the features of {what} do not match their checksum")
        return layout.unpack(values, scales)

    def _file(self, receipt: FeatureReceipt) -> tuple[int, Layout]:
        """An open file descriptor, and the file's layout."""
        if receipt.name not in self._files:
            if len(self._files) >= MAX_OPEN_FILES:
                os.close(self._files.popitem(last=False)[1][0])
            descriptor = descriptor_below(self.folder, feature_file(receipt.name))
            try:
                self._files[receipt.name] = descriptor, self._layout(descriptor, receipt)
            except BaseException:
                os.close(descriptor)
                raise
        return self._files[receipt.name]

    def _layout(self, descriptor: int, receipt: FeatureReceipt) -> Layout:
        tokens, images, lengths = self.manifest.tokens_per_image, receipt.num_images, np.zeros(0, np.int64)
        if tokens is None:
            lengths = np.frombuffer(os.pread(descriptor, 8 * images, max(0, receipt.file.bytes - 8 * images)), "<i8")
        layout = Layout(token_starts(images, tokens, lengths), self.manifest.width, self.manifest.dtype)
        # The header has the lengths' sum: one wrong length would move every image behind it.
        if (lengths < 0).any() or os.pread(descriptor, len(layout.header), 0) != layout.header:
            raise DamagedShardError(
                f"{self.folder / feature_file(receipt.name)} is damaged: its header is not that of {images} images with "
                f"{layout.num_tokens} tokens together: {AGAIN}"
            )
        return layout

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": OrderedDict()}

    def __del__(self) -> None:
        for descriptor, _ in getattr(self, "_files", {}).values():
            os.close(descriptor)


def _said(value: Any) -> str:
    """A setting's value as the command line takes it."""
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
