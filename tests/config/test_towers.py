"""The rules by which towers give images their sizes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from himix_megatron.config.towers import own_aspect
from tests.support.data_fixtures import VISION


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


@pytest.mark.parametrize(("side", "patch"), [(448, 14), (224, 16), (384, 14), (4096, 16)])
def test_every_larger_square_has_the_whole_number_of_patches(side: int, patch: int) -> None:
    whole = side // patch * patch
    assert {own_aspect(size, size, side, patch) for size in range(side, 5 * side, 7)} == {(whole, whole)}


def test_a_crop_of_an_image_in_its_own_aspect_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^vision\.resize is crop, but the tiny_native tower takes whole images"):
        replace(VISION, tower="tiny_native", resize="crop")
