"""What is known of a batch's images without their pixels: how large, how many vision tokens, and where in the text.

Flows in: image sizes by arithmetic from the index, places from the text column; out: an ImageTable, by which one tensor of all
pixels or features is divided into images, and the images over the ranks that encode them.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...config import Config, VisionConfig
from ...costs.flops import image_flops
from ..images import image_file

Size = tuple[int, int]
"""(width, height) in pixels."""


@dataclass(frozen=True, slots=True)
class ImageTable:
    """The images of n samples, by sample and by their order in it; K counts them all."""

    per_sample: tuple[int, ...]
    """n numbers: images of each sample."""
    sizes: tuple[Size, ...]
    """K pairs: pixels of each image as the tower gets it."""
    tokens: tuple[int, ...]
    """K numbers: vision tokens of each image."""
    places: tuple[int, ...] = ()
    """K numbers: text tokens of the image's sample that come before it. Empty: not known."""

    @staticmethod
    def of(vision: VisionConfig, sizes: Sequence[Sequence[Size]], places: Sequence[Sequence[int]] | None = None) -> ImageTable:
        """The table of samples with images of these sizes, as the tower gets them. `places`: None: not known."""
        flat = tuple(chain.from_iterable(sizes))
        return ImageTable(
            per_sample=tuple(map(len, sizes)),
            sizes=flat,
            tokens=tuple(map(vision.num_tokens, flat)),
            places=tuple(chain.from_iterable(places or ())),
        )

    @staticmethod
    def of_features(tokens: Sequence[Sequence[int]]) -> ImageTable:
        """The table of samples whose images' features have these numbers of tokens; sizes and places are not known."""
        flat = tuple(chain.from_iterable(tokens))
        return ImageTable(tuple(map(len, tokens)), ((0, 0),) * len(flat), flat)

    @staticmethod
    def joined(tables: Iterable[ImageTable]) -> ImageTable:
        """The tables' samples one after the other."""
        parts = [(table.per_sample, table.sizes, table.tokens, table.places) for table in tables]
        return ImageTable(*(tuple(chain.from_iterable(column)) for column in zip(*parts, strict=True)))

    def __len__(self) -> int:
        return len(self.tokens)

    def sample_tokens(self) -> list[int]:
        """n numbers: vision tokens of each sample."""
        tokens = iter(self.tokens)
        return [sum(next(tokens) for _ in range(count)) for count in self.per_sample]

    def images_of(self, numbers: Sequence[int]) -> ImageTable:
        """These images, as one sample's, of which no places are known."""
        return ImageTable((len(numbers),), tuple(self.sizes[k] for k in numbers), tuple(self.tokens[k] for k in numbers))

    def rows(self, images: Tensor) -> list[int]:
        """How many rows of a tensor of all K images are each image's: of features its tokens, of pixels 1 where all have one
        size, else its bytes."""
        if images.dtype != torch.uint8:
            return list(self.tokens)
        return [1] * len(self) if images.dim() == 4 else [3 * width * height for width, height in self.sizes]

    def split(self, images: Tensor) -> list[Tensor]:
        """Views of each image: features float[n, V] of float[T, V]; pixels uint8[3, height, width] of `blank_pixels`."""
        parts = torch.split(images, self.rows(images))
        if images.dtype != torch.uint8:
            return list(parts)
        if images.dim() == 4:
            return [part[0] for part in parts]
        return [part.view(h, w, 3).permute(2, 0, 1) for part, (w, h) in zip(parts, self.sizes, strict=True)]


def blank_pixels(images: ImageTable, vision: VisionConfig) -> Tensor:
    """Zeros to decode into: uint8[K, 3, image_size, image_size], or uint8[bytes], image by image, where sizes differ. In both
    each pixel's three channels lie side by side in memory."""
    if vision.has_fixed_size:
        return torch.from_numpy(image_file.blank_pixels(len(images), vision.blank_size))
    return torch.zeros(sum(3 * width * height for width, height in images.sizes), dtype=torch.uint8)


def grids(images: ImageTable, config: Config) -> list[tuple[int, int]]:
    """Rows and columns of patches of each of the K images; of one whose size is not known those of the tower's squares."""
    vision, side = config.vision, config.vision.patch_size
    sizes = (size if any(size) else vision.blank_size for size in images.sizes)
    return [(height // side, width // side) for width, height in sizes]


def reduced_tokens(images: ImageTable, config: Config) -> tuple[int, ...]:
    """K numbers: vision tokens of each image after `injection.reduce`."""
    if config.injection.reduce == "none":
        return images.tokens
    return tuple(rows * columns for rows, columns in (config.injection.reduced_grid(*grid) for grid in grids(images, config)))


def in_sequence(images: ImageTable, config: Config) -> ImageTable:
    """The same images with the tokens of each that stand in its sample's text: none, unless `injection.in_sequence`."""
    tokens = reduced_tokens(images, config) if config.injection.in_sequence else (0,) * len(images)
    return replace(images, tokens=tokens)


def rows_in_text(
    text_lengths: Sequence[int], images: ImageTable, width: int | None
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Where tokens lie when each image stands in its sample's text, before the token that it came before.

    Args:
        text_lengths: of each of the n samples; an image whose place is beyond its text's end stands there.
        width: of rows that hold a sample each; None: one row, a sample after the other.
    Returns: flat numbers of the text tokens, int64[sum(text_lengths)], and of the vision tokens, int64[T].
    """
    lengths, counts = np.asarray(text_lengths, np.int64), np.asarray(images.tokens, np.int64)
    sample = np.repeat(np.arange(len(lengths)), images.per_sample)
    # All samples' texts as one: an image at the end of one text comes before the first of the next.
    before = (np.cumsum(lengths) - lengths)[sample] + np.minimum(images.places or 0, lengths[sample])
    order = np.argsort(before, kind="stable")
    earlier = np.concatenate(([0], np.cumsum(counts[order])))
    text = np.arange(lengths.sum())
    text += earlier[np.searchsorted(before[order], text, side="right")]
    begins = np.empty_like(before)
    begins[order] = before[order] + earlier[:-1]
    vision = np.repeat(begins - (np.cumsum(counts) - counts), counts) + np.arange(counts.sum())
    if width is not None:
        whole = lengths + np.bincount(sample, counts, len(lengths)).astype(np.int64)
        shift = np.arange(len(lengths)) * width - (np.cumsum(whole) - whole)
        text += np.repeat(shift, lengths)
        vision += np.repeat(shift[sample], counts)
    return text, vision


def token_batches(tokens: Sequence[int], budget: int) -> list[slice]:
    """Images of so many tokens each, in batches of neighbours: together of at most `budget` tokens, or one image alone."""
    parts, first, taken = [], 0, 0
    for image, number in enumerate(tokens):
        if image > first and taken + number > budget:
            parts.append(slice(first, image))
            first, taken = image, 0
        taken += number
    return [*parts, slice(first, len(tokens))] if tokens else []


def divide_images(images: ImageTable, vision: VisionConfig, num_ranks: int) -> list[list[int]]:
    """Which images each of the ranks of a replica encodes, by number: about the same FLOPs for each.

    Where all cost alike: contiguous, ceil(K / R) each, the last ranks fewer or none. Else the most expensive image left goes to
    the rank with the least to do.
    """
    costs = [image_flops(vision, vision.num_patches(size)) for size in images.sizes]
    if len(set(costs)) <= 1:
        each = -(-len(costs) // num_ranks)
        return [list(range(len(costs)))[rank * each : (rank + 1) * each] for rank in range(num_ranks)]
    shares: list[list[int]] = [[] for _ in range(num_ranks)]
    loads = [(0.0, rank) for rank in range(num_ranks)]
    for image in sorted(range(len(costs)), key=lambda k: (-costs[k], k)):
        load, rank = loads[0]
        shares[rank].append(image)
        heapq.heapreplace(loads, (load + costs[image], rank))
    return [sorted(share) for share in shares]


def image_share(images: ImageTable, vision: VisionConfig, rank: int, num_ranks: int) -> list[int]:
    """One rank's part of `divide_images`; a rank beyond them has none."""
    return divide_images(images, vision, num_ranks)[rank] if rank < num_ranks else []
