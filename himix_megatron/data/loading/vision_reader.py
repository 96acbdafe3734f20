"""What a rank reads for an image: its pixels, for the tower; or its features, which a tower made before.

Both fill an image's part of one tensor (`ImageTable.split`), and know what stands there where an image is none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ...config import VisionConfig
from ..images.decode import decode
from ..shards.reader import ShardDataset
from .feature_cache import FeatureCache
from .image_table import ImageTable, blank_pixels


class PixelReader:
    """Decodes images: uint8[3, height, width] each."""

    def __init__(self, vision: VisionConfig, decode: Literal["fast", "exact"]) -> None:
        self.vision, self.decode = vision, decode

    def blanks(self, images: ImageTable) -> Tensor:
        """The pixels of these images, each blank: zeros."""
        return blank_pixels(images, self.vision)

    def read_into(self, place: Tensor, dataset: ShardDataset, i: int, k: int) -> None:
        """Image k of sample i. Raises: BadSampleError for a damaged one; OSError when the machine fails."""
        decode(dataset.image_bytes(i, k), self.vision, self.decode, out=place.numpy())


class FeatureReader:
    """Reads features: `dtype`[n, V] each. `caches`: one for each dataset that is read, made by one tower."""

    def __init__(self, caches: Sequence[FeatureCache], dtype: torch.dtype) -> None:
        self.caches, self.dtype = {cache.dataset.fingerprint: cache for cache in caches}, dtype
        self._blank = caches[0].blank().to(dtype)

    def blanks(self, images: ImageTable) -> Tensor:
        """The features of these images, each blank: the all-zero image's, or zeros for an image of another size."""
        tokens, width = self._blank.shape
        if set(images.tokens) <= {tokens}:
            return self._blank.repeat(len(images.tokens), 1)
        features = torch.zeros(sum(images.tokens), width, dtype=self.dtype)
        for place in images.split(features):
            if len(place) == tokens:
                place.copy_(self._blank)
        return features

    def read_into(self, place: Tensor, dataset: ShardDataset, i: int, k: int) -> None:
        """As PixelReader's. Raises: also ValueError for features of another number of tokens than the image has here."""
        cache = self.caches[dataset.fingerprint]
        features = cache.read(i, k)
        if features.shape != place.shape:
            raise ValueError(
                f"data.features: {cache.folder} has {len(features)} tokens of image {k} of {dataset.key(i)}, but here the "
                f"tower gives it {len(place)}: delete the folder and encode again with python -m pipelines.encode"
            )
        place.copy_(features)
