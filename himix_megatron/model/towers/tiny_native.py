"""A small vision tower for images in their own aspect: each has as many tokens as it has patches.

Shape letters: K images, T tokens of all of them, X = 3 * patch_size^2 numbers of a patch, V width of the features.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...config import VisionConfig
from .base import Tower, num_layers_run, take_levels
from .tiny import TinyLayer


class TinyNativeTower(Tower):
    """TinyTower's layers over the patches of images of any shape; a patch's position is its row and column."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__(config)
        self.patch = nn.Linear(3 * config.patch_size**2, config.hidden_size)
        nn.init.normal_(self.patch.weight, std=2 / math.sqrt(3 * config.patch_size**2))  # as TinyTower's
        self.layers = nn.ModuleList(_Layer(config) for _ in range(num_layers_run(config)))
        self.final_norm = nn.LayerNorm(config.hidden_size) if -1 in config.levels else nn.Identity()

    def features(self, pixels: Tensor, blank_K: Tensor, sizes: Sequence[tuple[int, int]]) -> Tensor:
        """uint8 bytes of all images to float[T, V] (see `Tower.features`)."""
        side, weight = self.config.patch_size, self.patch.weight
        grids = [(height // side, width // side) for width, height in sizes]
        lengths = [rows * columns for rows, columns in grids]
        images = torch.split(pixels, [length * 3 * side**2 for length in lengths])
        patches = [
            image.view(rows, side, columns, side, 3).permute(0, 2, 4, 1, 3).flatten(0, 1)
            for image, (rows, columns) in zip(images, grids, strict=True)
        ]
        blanks = [blank.expand(length) for blank, length in zip(blank_K.unbind(), lengths, strict=True)]
        positions = [_positions(*grid, self.config.hidden_size, pixels.device) for grid in grids]
        # Begun with nothing, for a micro-batch without images.
        patches_T3PP = torch.cat([pixels.new_empty(0, 3, side, side), *patches])
        blank_T = torch.cat([blank_K[:0], *blanks])
        positions_TV = torch.cat([weight.new_empty(0, self.config.hidden_size), *positions])
        hidden_TV = self.patch(self.normalise(patches_T3PP, blank_T, weight.dtype).flatten(1)) + positions_TV.to(weight.dtype)

        def in_turn(hidden_TV: Tensor, layers: Sequence[nn.Module]) -> Tensor:
            for layer in layers:
                hidden_TV = layer(hidden_TV, lengths)
            return hidden_TV

        return take_levels(self.config, hidden_TV, self.layers, in_turn, self.final_norm)


class _Layer(TinyLayer):
    def forward(self, hidden_TV: Tensor, lengths: Sequence[int]) -> Tensor:  # type: ignore[override]
        self._lengths = list(lengths)
        return super().forward(hidden_TV)

    def mix(self, qkv_TX: Tensor) -> Tensor:
        parts = [super(_Layer, self).mix(own[None])[0] for own in torch.split(qkv_TX, self._lengths)]
        return torch.cat(parts) if parts else qkv_TX[:, : qkv_TX.shape[1] // 3]


def _positions(rows: int, columns: int, width: int, device: torch.device) -> Tensor:
    """float[rows * columns, width]: sines and cosines of the row, then of the column; zeros in what 4 leaves over."""
    quarter = width // 4
    frequencies = 100.0 ** -(torch.arange(quarter, device=device) / quarter)
    angles = [torch.arange(number, device=device)[:, None] * frequencies for number in (rows, columns)]
    of_row, of_column = (torch.cat((angle.sin(), angle.cos()), dim=1) for angle in angles)
    whole = torch.zeros(rows, columns, width, device=device)
    whole[:, :, : 2 * quarter] = of_row[:, None]
    whole[:, :, 2 * quarter : 4 * quarter] = of_column
    return whole.flatten(0, 1)
