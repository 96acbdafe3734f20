"""What a rank reads for an image: its pixels, for the tower; or its features, which a tower made before.

Both readers give the loader one tensor an image, and stand in for an image that is none.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from himix_megatron.config import VisionConfig
from himix_megatron.data import image
from himix_megatron.data.features import FeatureCache
from himix_megatron.data.shards import ShardDataset


class PixelReader:
    """Decodes images: uint8[3, H, W]."""

    def __init__(self, vision: VisionConfig) -> None:
        self.vision = vision

    def blanks(self, number: int) -> Tensor:
        """So many images, each blank: zeros."""
        return torch.zeros(number, 3, self.vision.image_size, self.vision.image_size, dtype=torch.uint8)

    def read(self, dataset: ShardDataset, i: int, k: int) -> Tensor:
        """Image k of sample i. Raises: BadSampleError for a damaged one; OSError when the machine fails."""
        return torch.from_numpy(image.decode(dataset.image_bytes(i, k), self.vision))


class FeatureReader:
    """Reads features: `dtype`[N, V]. `caches`: one for each dataset that is read, made by one tower."""

    def __init__(self, caches: Sequence[FeatureCache], dtype: torch.dtype) -> None:
        self.caches, self.dtype = {cache.dataset.fingerprint: cache for cache in caches}, dtype
        self._blank = caches[0].blank().to(dtype)

    def blanks(self, number: int) -> Tensor:
        """So many images, each blank: the all-zero image's features."""
        return self._blank.repeat(number, 1, 1)

    def read(self, dataset: ShardDataset, i: int, k: int) -> Tensor:
        """As PixelReader's."""
        return self.caches[dataset.fingerprint].read(i, k).to(self.dtype)
