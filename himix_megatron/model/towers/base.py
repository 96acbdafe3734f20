"""What every vision tower is: uint8 pixels to features, with the normalisation inside.

Shape letters: K images, 3 channels, H and W pixels of one, n tokens of one, T of all, V width of the features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...config import VisionConfig

SIZES = {
    "image_size": "image_size",
    "patch_size": "patch_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "ffn_hidden_size": "intermediate_size",
}
"""Our name of a size -> transformers'."""


class Tower(nn.Module):
    """`features(pixels, blank_K, sizes)`: the features of K images one after the other, float[T, V] in the weights' dtype; of
    several hidden states float[T, L * V].

    A tower of fixed squares has `tower(pixels_K3HW, blank_K)`, uint8[K, 3, H, W] and bool[K] to float[K, n, V]. One whose
    images differ in size replaces `features`, and its row of config/towers.py has the rule of the sizes.

    A tower has no buffer that a checkpoint would have to hold, and no parameter without a gradient: layers after
    `vision.feature_layer` are not built.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.normalise = PixelNormalization(config)

    def features(self, pixels: Tensor, blank_K: Tensor, sizes: Sequence[tuple[int, int]]) -> Tensor:
        """float[T, V]: of each image as many tokens as `config.num_tokens` says, the images one after the other.

        Args:
            pixels: as `data.loading.image_table.blank_pixels` lays them out.
            blank_K: bool[K], images that are all zero after the normalisation.
            sizes: (width, height) in pixels of each image.
        """
        features_KnV: Tensor = self(pixels, blank_K)
        return features_KnV.flatten(0, 1)

    @classmethod
    def with_random_weights(cls, config: VisionConfig) -> Tower:
        """A tower of the configuration's sizes; torch's generator decides the weights."""
        return cls(config)

    @classmethod
    def load(cls, config: VisionConfig, folder: Path, dtype: torch.dtype) -> Tower:
        """The tower with the weights of a folder. Raises: ValueError naming what does not fit."""
        raise ValueError(f"vision.path is {folder}, but the {config.tower} tower has no published weights: leave it out")

    @classmethod
    def settings(cls, config: VisionConfig) -> dict[str, Any]:
        """All settings of the tower under transformers' names. Raises: ValueError, as `load`."""
        return {theirs: getattr(config, ours) for ours, theirs in SIZES.items()}


class PixelNormalization(nn.Module):
    """uint8 pixels to the tower's input: `(x / 255 - mean) / std` in float32, blank images all zero after it.

    No buffers: a tower cast to bfloat16 must not round its mean and deviation with its weights.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self._mean_std = torch.tensor([config.pixel_mean, config.pixel_std], dtype=torch.float32).view(2, 1, 3, 1, 1)

    def forward(self, pixels_K3HW: Tensor, blank_K: Tensor, dtype: torch.dtype) -> Tensor:
        if self._mean_std.device != pixels_K3HW.device:
            self._mean_std = self._mean_std.to(pixels_K3HW.device)
        mean, std = self._mean_std
        images_K3HW: Tensor = (pixels_K3HW.float() / 255 - mean) / std
        images_K3HW = images_K3HW.masked_fill(blank_K.view(-1, 1, 1, 1), 0.0)
        return images_K3HW.to(dtype)


def num_layers_run(config: VisionConfig) -> int:
    """Layers whose output `feature_layer`, or the deepest of `feature_layers`, needs: all of them for -1, one less for -2."""
    return config.num_layers + 1 + max(config.levels)


def take_levels(
    config: VisionConfig,
    hidden: Tensor,
    layers: nn.ModuleList,
    run: Callable[[Tensor, Any], Tensor],
    final_norm: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """The hidden states that are taken, float[..., L * V], their channels one after the other.

    Args: run: hidden states through some of the layers; it may write over what it is given. final_norm: of the last layer's.
    """
    found, done = {}, 0
    for level in sorted(config.levels):
        number = config.num_layers + 1 + level
        hidden, done = run(hidden, layers[done:number]), number
        last = level == max(config.levels)
        found[level] = final_norm(hidden) if final_norm is not None and level == -1 else hidden if last else hidden.clone()
    return found[config.levels[0]] if len(found) == 1 else torch.cat([found[level] for level in config.levels], dim=-1)
