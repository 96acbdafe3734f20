"""The rules by which towers give images their sizes."""

from __future__ import annotations

import pytest

from himix_megatron.config.towers import own_aspect


@pytest.mark.parametrize(
    ("image", "wanted"),
    [
        ((24, 16), (24, 16)),
        ((27, 18), (24, 16)),  # whole patches, never enlarged
        ((5, 5), (8, 8)),
        ((1000, 1000), (32, 32)),
        ((400, 100), (64, 16)),
        ((8, 64), (8, 64)),
        ((8, 2000), (8, 128)),  # one column of as many patches as there may be
        ((2000, 1), (128, 8)),
    ],
)
def test_an_image_in_its_own_aspect_has_whole_patches_within_the_squares_number(
    image: tuple[int, int], wanted: tuple[int, int]
) -> None:
    assert own_aspect(*image, 32, 8) == wanted
