"""Vision towers. Flows in: uint8 pixels; out: features that every decoder layer sees.

A tower is a module with one call, `tower(pixels_K3HW, blank_K) -> features_KNV`; normalisation is inside it, so that the
rest of the house carries bytes. Layers after the chosen feature layer are not built: they cost nothing, and a tower that
trains has no parameter without a gradient.

Shapes: K images, 3 channels, H = W = image_size, N tokens of one image, V width of the features (Vh).
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import VisionConfig
from .frozen_layers import run_layers

_SIZES = {
    "image_size": "image_size",
    "patch_size": "patch_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "ffn_hidden_size": "intermediate_size",
}
"""Our name of a size -> transformers'."""


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


class TransformersTower(nn.Module):
    """SigLIP or CLIP, from the modules of transformers, up to the chosen hidden state.

    Equal to the model's own `hidden_states[feature_layer]` without CLIP's class token. Frozen (`requires_grad_(False)`) it is
    faster: see frozen_layers.py.
    """

    def __init__(self, config: VisionConfig, model: nn.Module) -> None:
        super().__init__()
        # transformers 5.0 keeps the encoder under `vision_model`, later versions in the model itself.
        model = getattr(model, "vision_model", model)
        self.normalise = PixelNormalization(config)
        self.embeddings: Any = model.embeddings
        self.pre_norm: Any = getattr(model, "pre_layrnorm", nn.Identity())
        encoder: Any = model.encoder
        self.layers = nn.ModuleList(list(encoder.layers)[: _num_layers_run(config)])
        self.num_class_tokens = 1 if config.tower == "clip" else 0
        self.feature_shape = (config.tokens_per_image, config.hidden_size)

    def forward(self, pixels_K3HW: Tensor, blank_K: Tensor) -> Tensor:
        """uint8 [K, 3, H, W] and bool [K] -> [K, N, V] in the weights' dtype."""
        weight: Tensor = self.embeddings.patch_embedding.weight
        hidden_KNV = self.pre_norm(self.embeddings(self.normalise(pixels_K3HW, blank_K, weight.dtype)))
        if weight.requires_grad:
            for layer in self.layers:
                hidden_KNV = layer(hidden_KNV, attention_mask=None)
        else:
            hidden_KNV = run_layers(hidden_KNV, self.layers)
        features: Tensor = hidden_KNV[:, self.num_class_tokens :]
        return features


class TinyTower(nn.Module):
    """A small pre-norm ViT that can be trained from nothing: learned positions, GELU, no class token."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.normalise = PixelNormalization(config)
        self.patch = nn.Conv2d(3, config.hidden_size, kernel_size=config.patch_size, stride=config.patch_size)
        # Strong enough beside the positions: at torch's default, 3.5 times weaker, shapes take twice as long to learn.
        nn.init.normal_(self.patch.weight, std=2 / math.sqrt(3 * config.patch_size**2))
        # At a deviation of 0.02 the tower had not learned where things are after 600 steps; at 0.5 it has after 400.
        self.position = nn.Parameter(torch.randn(1, config.tokens_per_image, config.hidden_size) * 0.5)
        self.layers = nn.ModuleList(_TinyLayer(config) for _ in range(_num_layers_run(config)))
        self.feature_shape = (config.tokens_per_image, config.hidden_size)
        self.final_norm = nn.LayerNorm(config.hidden_size) if config.feature_layer == -1 else nn.Identity()

    def forward(self, pixels_K3HW: Tensor, blank_K: Tensor) -> Tensor:
        """uint8 [K, 3, H, W] and bool [K] -> [K, N, V] in the weights' dtype."""
        images_K3HW = self.normalise(pixels_K3HW, blank_K, self.patch.weight.dtype)
        hidden_KNV = self.patch(images_K3HW).flatten(2).transpose(1, 2) + self.position
        for layer in self.layers:
            hidden_KNV = layer(hidden_KNV)
        features: Tensor = self.final_norm(hidden_KNV)
        return features


class _TinyLayer(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, config.ffn_hidden_size)
        self.down = nn.Linear(config.ffn_hidden_size, width)

    def forward(self, hidden_KNV: Tensor) -> Tensor:
        qkv = self.qkv(self.attention_norm(hidden_KNV)).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each [K, heads, N, V / heads]
        mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        hidden_KNV = hidden_KNV + self.out(mixed)
        hidden_KNV = hidden_KNV + self.down(F.gelu(self.up(self.mlp_norm(hidden_KNV))))
        return hidden_KNV


Tower = TransformersTower | TinyTower
"""Any tower: called alike, with `feature_shape` = (N, V) of one image."""


def build_tower(config: VisionConfig, *, seed: int, dtype: torch.dtype) -> Tower:
    """The tower of a configuration on the CPU: from `config.path`, or with random weights that are a function of the seed.

    Every rank that calls this gets the same weights; no random generator of the caller moves.
    Raises: ValueError when the folder's sizes are not the configuration's, or its weights are incomplete.
    """
    if config.hidden_size % config.num_attention_heads:
        raise ValueError(
            f"vision.hidden_size ({config.hidden_size}) does not divide into vision.num_attention_heads "
            f"({config.num_attention_heads})"
        )
    if config.path is not None:
        if config.tower == "tiny":
            raise ValueError(f"vision.path is {config.path}, but the tiny tower has no published weights: leave it out")
        return _load(config, Path(config.path), dtype)
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed: that would move the accelerator's generators too.
        torch.default_generator.manual_seed(seed)
        return _random(config).to(dtype)


def _num_layers_run(config: VisionConfig) -> int:
    """Layers whose output the chosen hidden state needs: all of them for -1, one less for -2."""
    return config.num_layers + 1 + config.feature_layer


def _transformers_classes(config: VisionConfig) -> tuple[Any, Any]:
    """transformers' configuration and model class of a tower kind (imported late: it takes seconds, and tiny needs none)."""
    from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

    return {"siglip": (SiglipVisionConfig, SiglipVisionModel), "clip": (CLIPVisionConfig, CLIPVisionModel)}[config.tower]


def tower_settings(config: VisionConfig) -> dict[str, Any]:
    """All settings of a tower under transformers' names: the sizes, and for SigLIP and CLIP what else their folder says.

    Raises: ValueError, as `build_tower`.
    """
    sizes = {theirs: getattr(config, ours) for ours, theirs in _SIZES.items()}
    if config.tower == "tiny":
        return sizes
    made = _transformers_classes(config)[0](**sizes) if config.path is None else _read_settings(config, Path(config.path))
    settings: dict[str, Any] = made.to_dict()
    return settings


def _random(config: VisionConfig) -> Tower:
    """A tower of the configuration's sizes with fresh weights."""
    if config.tower == "tiny":
        return TinyTower(config)
    config_class, model_class = _transformers_classes(config)
    sizes = {theirs: getattr(config, ours) for ours, theirs in _SIZES.items()}
    return TransformersTower(config, model_class(config_class(**sizes, attn_implementation="sdpa")))


def _load(config: VisionConfig, folder: Path, dtype: torch.dtype) -> Tower:
    """The tower in a Hugging Face folder (a vision model alone, or a whole SigLIP or CLIP model)."""
    settings = _read_settings(config, folder)
    settings._attn_implementation = "sdpa"
    with torch.device("meta"):
        tower = TransformersTower(config, _transformers_classes(config)[1](settings))
    wanted = {name: tuple(tensor.shape) for name, tensor in tower.state_dict().items()}
    tower.load_state_dict(_read_weights(folder, wanted, dtype), strict=True, assign=True)
    # What no file holds: the numbers of the positions, and the mean and deviation.
    tower.embeddings.position_ids = torch.arange(config.tokens_per_image + tower.num_class_tokens).expand((1, -1))
    tower.normalise = PixelNormalization(config)
    return tower


def _read_settings(config: VisionConfig, folder: Path) -> Any:
    """transformers' settings of a folder. Raises: ValueError naming the first field in which our configuration differs."""
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"vision.path: no config.json in {folder}: give the folder of a Hugging Face {config.tower} model")
    kind = str(_read_json(file).get("model_type", "")).split("_")[0]
    if kind != config.tower:
        raise ValueError(f"vision.tower is {config.tower}, but {file} describes {kind or 'no model_type'}")
    # Through transformers, which knows the defaults of what a config.json leaves out.
    settings = _transformers_classes(config)[0].from_pretrained(str(folder), local_files_only=True)
    for ours, theirs in _SIZES.items():
        _check_same(ours, getattr(config, ours), getattr(settings, theirs), file)
    processor = folder / "preprocessor_config.json"
    if processor.is_file():
        stored = _read_json(processor)
        for ours, theirs in (("pixel_mean", "image_mean"), ("pixel_std", "image_std")):
            _check_same(ours, getattr(config, ours), tuple(stored.get(theirs, getattr(config, ours))), processor)
    return settings


def _read_json(file: Path) -> dict[str, Any]:
    try:
        stored = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"vision.path: {file} is not JSON ({error})") from None
    if not isinstance(stored, dict):
        raise ValueError(f"vision.path: {file} holds a {type(stored).__name__}, wanted an object")
    return stored


def _check_same(field: str, got: Any, found: Any, file: Path) -> None:
    if got != found:
        value = " ".join(map(str, found)) if isinstance(found, tuple) else found
        flag = f"--vision.{field.replace('_', '-')} {value}"
        raise ValueError(f"vision.{field} is {got}, but {file} says {found}: use {flag}, or another vision.path")


def _read_weights(folder: Path, wanted: dict[str, tuple[int, ...]], dtype: torch.dtype) -> dict[str, Tensor]:
    """The wanted tensors from the folder's safetensors files, under our names; the rest of the folder is not read.

    Raises: ValueError naming a tensor that is missing or has another shape.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"vision.path: no *.safetensors in {folder}; other formats are not read, see docs/data.md")
    weights: dict[str, Tensor] = {}
    for file in files:
        with safe_open(str(file), framework="pt") as tensors:
            for stored in list(tensors.keys()):
                name = stored.removeprefix("vision_model.").removeprefix("encoder.").replace("pre_layrnorm.", "pre_norm.")
                if name in wanted:
                    weights[name] = tensors.get_tensor(stored).to(dtype)
    missing = [name for name in wanted if name not in weights]
    if missing:
        raise ValueError(f"vision.path: {folder} lacks {len(missing)} of the tower's {len(wanted)} tensors, e.g. {missing[0]}")
    for name, shape in wanted.items():
        if tuple(weights[name].shape) != shape:
            raise ValueError(f"vision.path: {name} in {folder} has shape {tuple(weights[name].shape)}, wanted {shape}")
    return weights
