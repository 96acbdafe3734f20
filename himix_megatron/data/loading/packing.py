"""Lengths in, packs out: which samples share one sequence, so that little of it is padding.

Packs have two budgets, text tokens and images: captions run out of images long before text, long chats the other way round,
and often both nearly bind. A pure function of the lengths, so every rank finds the same packs.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.int64]


def plan_packs(text_tokens: Numbers, images: Numbers, max_text_tokens: int, max_images: int) -> list[Numbers]:
    """Packs of samples, none over either budget; samples and packs in the order of their first sample.

    Filled one after the other: the longest text left, then whatever keeps text and images running out together, as far as
    what is left to pack allows. (Best fit, largest first, is as good where one budget binds alone, but loses 10 to 25 % where
    both nearly do: it puts long texts together, and leaves packs of short ones that lack only images.)

    Args: `text_tokens`, `images`: int[n], of each sample; none above its budget.
    Returns: for each pack the numbers of its samples, 0 .. n - 1.
    """
    text, image = np.asarray(text_tokens).tolist(), np.asarray(images).tolist()
    assert max(text, default=0) <= max_text_tokens, "a text is longer than a pack"
    assert max(image, default=0) <= max_images, "a sample has more images than a pack"
    buckets = LengthBuckets(text, image)
    packs = []
    while buckets.num_samples:
        packs.append(_fill(buckets, max_text_tokens, max_images))
    return sorted((np.array(sorted(pack), np.int64) for pack in packs), key=lambda pack: int(pack[0]))


class LengthBuckets:
    """The samples not packed yet: for each number of images, a bucket sorted by text length."""

    def __init__(self, text: list[int], image: list[int]) -> None:
        self.by_images: defaultdict[int, list[tuple[int, int]]] = defaultdict(list)
        for sample in np.argsort(text, kind="stable").tolist():
            self.by_images[image[sample]].append((text[sample], sample))
        self.num_samples, self.text, self.images = len(text), sum(text), sum(image)

    def take(self, count: int, index: int) -> tuple[int, int]:
        """Remove the sample at `index` of the bucket with `count` images. Returns: (text tokens, sample)."""
        text, sample = self.by_images[count].pop(index)
        if not self.by_images[count]:
            del self.by_images[count]
        self.num_samples, self.text, self.images = self.num_samples - 1, self.text - text, self.images - count
        return text, sample


def _length(item: tuple[int, int]) -> int:
    return item[0]


def _fill(buckets: LengthBuckets, room: int, max_images: int) -> list[int]:
    """One pack of at most `room` text tokens and `max_images` images."""
    pack: list[int] = []
    free_images = max_images
    # What is left needs so many packs; each of them can expect this many images.
    expected = buckets.images / max(buckets.text / room, buckets.images / max_images) if buckets.images else 0.0
    scale = (max_images, room)  # one image weighs as much as its share of the text budget
    while buckets.num_samples:
        best: tuple[int, int, int] | None = None
        for count, bucket in buckets.by_images.items():
            # The longest that leaves the images to come their part of the text.
            to_come = max(expected - (max_images - free_images), count, 1)
            wanted = min(room, room * max(count, 1) / to_come) if pack else room
            place = max(0, bisect_right(bucket, wanted, key=_length) - 1)
            length = bucket[place][0]
            if count <= free_images and length <= room:
                best = max(best or (-1, 0, 0), (max(length * scale[0], count * scale[1]), count, place))
        if best is None:
            break
        length, sample = buckets.take(*best[1:])
        pack.append(sample)
        room, free_images = room - length, free_images - best[1]
    return pack
