"""One tensor holds the pixels or features of images of any size, and the ranks of a replica share the work of encoding them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from himix_megatron.config import VisionConfig
from himix_megatron.costs.flops import image_flops
from himix_megatron.data.loading.image_table import ImageTable, blank_pixels, divide_images, image_share, token_batches
from tests.support.data_fixtures import VISION

NATIVE = replace(VISION, tower="tiny_native", image_size=32)
LARGE = VisionConfig(
    tower="tiny_native", image_size=1024, patch_size=16, hidden_size=1152, num_layers=27, num_attention_heads=16,
    ffn_hidden_size=4304,
)  # fmt: skip
"""SigLIP-so400m's sizes, on up to 4,096 patches of an image in its own aspect."""


def drawn_sizes(count: int, seed: int) -> list[tuple[int, int]]:
    """Images of log-normal areas around 640 x 480 pixels, aspects log-uniform from 1:4 to 4:1, as LARGE gets them."""
    draw = np.random.default_rng(seed)
    sides, aspects = np.sqrt(640 * 480 * draw.lognormal(0, 1, count)), np.exp(draw.uniform(-1, 1, count) * np.log(4))
    pairs = zip((sides * np.sqrt(aspects)).tolist(), (sides / np.sqrt(aspects)).tolist(), strict=True)
    return [LARGE.input_size(max(1, round(width)), max(1, round(height))) for width, height in pairs]


@pytest.mark.parametrize("seed", range(10))
def test_four_ranks_share_64_images_of_drawn_sizes_to_five_percent(seed: int) -> None:
    images = ImageTable.of(LARGE, [drawn_sizes(64, seed)])
    assert max(images.tokens) > 8 * min(images.tokens)
    shares = divide_images(images, LARGE, 4)
    assert sorted(image for share in shares for image in share) == list(range(64))
    loads = [sum(image_flops(LARGE, LARGE.num_patches(images.sizes[image])) for image in share) for share in shares]
    assert max(loads) <= 1.05 * min(loads), loads


def test_every_rank_finds_the_same_shares_and_one_beyond_them_none() -> None:
    images = ImageTable.of(LARGE, [drawn_sizes(9, 0), [], drawn_sizes(4, 1)])
    shares = divide_images(images, LARGE, 3)
    assert [image_share(images, LARGE, rank, 3) for rank in range(4)] == [*shares, []]
    assert all(share == sorted(share) for share in shares)


def test_a_tensor_is_split_into_images_by_their_sizes() -> None:
    sizes = [[NATIVE.input_size(20, 20), NATIVE.input_size(100, 8)], [], [NATIVE.input_size(5, 30)]]
    images = ImageTable.of(NATIVE, sizes, [[0, 3], [], [2]])
    assert (images.per_sample, images.sizes) == ((2, 0, 1), ((16, 16), (96, 8), (8, 24)))
    assert (images.tokens, images.sample_tokens(), images.places) == ((4, 12, 3), [16, 0, 3], (0, 3, 2))
    pixels = blank_pixels(images, NATIVE)
    for number, place in enumerate(images.split(pixels), 1):
        place.copy_(torch.full_like(place, number))
    assert [tuple(place.shape) for place in images.split(pixels)] == [(3, 16, 16), (3, 8, 96), (3, 24, 8)]
    assert torch.bincount(pixels.long()).tolist() == [0, 3 * 256, 3 * 768, 3 * 192]
    features = torch.arange(19.0)[:, None]
    assert [part[0].item() for part in images.split(features)] == [0, 4, 16]
    own = images.images_of([0, 2])
    assert (own.sizes, own.tokens, own.places) == (((16, 16), (8, 24)), (4, 3), ())


def test_pixels_of_one_size_keep_their_four_dimensions() -> None:
    images = ImageTable.of(VISION, [[VISION.blank_size] * 2, [VISION.blank_size]])
    pixels = blank_pixels(images, VISION)
    assert (tuple(pixels.shape), images.rows(pixels), images.tokens) == ((3, 3, 16, 16), [1, 1, 1], (4, 4, 4))
    assert [tuple(place.shape) for place in images.split(pixels)] == [(3, 16, 16)] * 3


def test_neighbours_are_encoded_together_up_to_a_budget() -> None:
    assert token_batches([4, 4, 9, 1, 1, 1], 8) == [slice(0, 2), slice(2, 3), slice(3, 6)]
    assert token_batches([], 8) == []
