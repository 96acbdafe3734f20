"""What a rank reads for an image: its pixels, for the tower; or its features, which a tower made before.

Both fill one place of a tensor for each image, and know what stands there where an image is none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ...config import VisionConfig
from ..images import image_file
from ..images.decode import decode
from ..shards.reader import ShardDataset
from .feature_cache import FeatureCache


class PixelReader:
    """Decodes images: uint8[3, H, W]."""

    def __init__(self, vision: VisionConfig, decode: Literal["fast", "exact"]) -> None:
        self.vision, self.decode = vision, decode

    def blanks(self, number: int) -> Tensor:
        """So many images, each blank: zeros."""
        return torch.from_numpy(image_file.blank_pixels(number, self.vision))

    def read_into(self, place: Tensor, dataset: ShardDataset, i: int, k: int) -> None:
        """Image k of sample i. Raises: BadSampleError for a damaged one; OSError when the machine fails."""
        decode(dataset.image_bytes(i, k), self.vision, self.decode, out=place.numpy())


class FeatureReader:
    """Reads features: `dtype`[N, V]. `caches`: one for each dataset that is read, made by one tower."""

    def __init__(self, caches: Sequence[FeatureCache], dtype: torch.dtype) -> None:
        self.caches, self.dtype = {cache.dataset.fingerprint: cache for cache in caches}, dtype
        self._blank = caches[0].blank().to(dtype)

    def blanks(self, number: int) -> Tensor:
        """So many images, each blank: the all-zero image's features."""
        return self._blank.repeat(number, 1, 1)

    def read_into(self, place: Tensor, dataset: ShardDataset, i: int, k: int) -> None:
        """As PixelReader's."""
        place.copy_(self.caches[dataset.fingerprint].read(i, k))
