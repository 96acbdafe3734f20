"""The vision towers: what settings and costs know of each. A tower is a row of this table and a file, which the row names.

Pure data, without torch, because settings are checked against it and costs are counted from it. The files are those of
model/towers/ (docs/extending.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass


def patches(rows: int, columns: int) -> int:
    """A token for each patch."""
    return rows * columns


def own_aspect(width: int, height: int, image_size: int, patch_size: int) -> tuple[int, int]:
    """An image in its own aspect, never enlarged: whole patches, at least one, and at most as many as a square of `image_size`
    has."""
    budget = (image_size // patch_size) ** 2
    if width * height <= budget * patch_size**2:
        columns, rows = width // patch_size, height // patch_size
    else:
        columns, rows = math.isqrt(budget * width // height), math.isqrt(budget * height // width)
    # A narrow image's shorter side is rounded up to one patch, and its longer one then limited.
    columns, rows = (min(max(1, number), budget) for number in (columns, rows))
    return columns * patch_size, rows * patch_size


@dataclass(frozen=True, kw_only=True, slots=True)
class TowerKind:
    """One vision tower: a patch embedding, positions, and pre-norm layers of attention and an MLP."""

    build: str
    """`package.module:Class`, a subclass of model/towers/base.py's Tower."""
    transformers: str | None = None
    """Prefix of the classes of transformers (`Siglip` for SiglipVisionConfig and SiglipVisionModel), whose folders can be read;
    in lower case it is the `model_type` of their config.json. None: no published weights."""
    input_size: Callable[[int, int, int, int], tuple[int, int]] | None = None
    """(width, height) in pixels that the tower gets of an image, from its width and height, vision.image_size and
    vision.patch_size. None: a square of image_size of every image."""
    tokens_per_image: Callable[[int, int], int] = patches
    """Features of an image of so many rows and columns of patches."""
    class_tokens: int = 0
    """Tokens that go through the layers and are no features."""
    patch_bias: bool = True
    """Whether the patch embedding has a bias."""
    learned_positions: bool = True
    """Whether positions are parameters."""
    norm_before: bool = False
    """Whether there is a norm before the first layer."""
    norm_after: bool = False
    """Whether there is a norm after the last layer, where its output is taken."""
    whole_patches: bool = False
    """Whether the image's side must be a multiple of the patch's."""
    pixel_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """Of a published tower whose folder does not say it, per channel, on the 0..1 scale."""
    pixel_std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """The same for the deviation."""


_PUBLISHED = "himix_megatron.model.towers.transformers_tower:TransformersTower"

TOWERS: dict[str, TowerKind] = {
    "tiny": TowerKind(build="himix_megatron.model.towers.tiny:TinyTower", norm_after=True, whole_patches=True),
    "tiny_native": TowerKind(
        build="himix_megatron.model.towers.tiny_native:TinyNativeTower",
        input_size=own_aspect,
        learned_positions=False,
        norm_after=True,
        whole_patches=True,
    ),
    "siglip": TowerKind(build=_PUBLISHED, transformers="Siglip"),
    "clip": TowerKind(
        build=_PUBLISHED,
        transformers="CLIP",
        class_tokens=1,
        patch_bias=False,
        norm_before=True,
        pixel_mean=(0.48145466, 0.4578275, 0.40821073),
        pixel_std=(0.26862954, 0.26130258, 0.27577711),
    ),
}
