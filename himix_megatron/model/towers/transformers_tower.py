"""SigLIP's and CLIP's towers, from the modules of transformers: built at random, or read from a Hugging Face folder.

Shape letters: K images, 3 channels, H = W = image_size, n tokens of one image, V width of the features.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ...config import VisionConfig
from ...config.towers import TOWERS
from ...runtime import typed_json
from ...runtime.untrusted_files import open_regular
from ..frozen_layers import run_layers
from .base import SIZES, PixelNormalization, Tower, num_layers_run, take_levels


class TransformersTower(Tower):
    """SigLIP or CLIP, from the modules of transformers, up to the chosen hidden state.

    Equal to the model's own `hidden_states[feature_layer]` without CLIP's class token. Frozen (`requires_grad_(False)`) it is
    faster: see model/frozen_layers.py.
    """

    def __init__(self, config: VisionConfig, model: nn.Module) -> None:
        super().__init__(config)
        # transformers 5.0 keeps the encoder under `vision_model`, later versions in the model itself.
        model = getattr(model, "vision_model", model)
        self.embeddings: Any = model.embeddings
        self.pre_norm: Any = getattr(model, "pre_layrnorm", nn.Identity())
        encoder: Any = model.encoder
        self.layers = nn.ModuleList(list(encoder.layers)[: num_layers_run(config)])
        self.num_class_tokens = TOWERS[config.tower].class_tokens

    def forward(self, pixels_K3HW: Tensor, blank_K: Tensor) -> Tensor:
        """uint8 [K, 3, H, W] and bool [K] -> [K, n, V] in the weights' dtype."""
        weight: Tensor = self.embeddings.patch_embedding.weight
        hidden_KnV = self.pre_norm(self.embeddings(self.normalise(pixels_K3HW, blank_K, weight.dtype)))
        features: Tensor = take_levels(
            self.config, hidden_KnV, self.layers, _with_gradient if weight.requires_grad else run_layers
        )
        return features[:, self.num_class_tokens :]

    @classmethod
    def with_random_weights(cls, config: VisionConfig) -> Tower:
        """The tower of transformers' model of the configuration's sizes."""
        config_class, model_class = _classes(config)
        return cls(config, model_class(config_class(**super().settings(config), attn_implementation="sdpa")))

    @classmethod
    def load(cls, config: VisionConfig, folder: Path, dtype: torch.dtype) -> Tower:
        """The tower in a Hugging Face folder (a vision model alone, or a whole SigLIP or CLIP model)."""
        settings = _read_settings(config, folder)
        settings._attn_implementation = "sdpa"
        with torch.device("meta"):
            tower = cls(config, _classes(config)[1](settings))
        wanted = {name: tuple(tensor.shape) for name, tensor in tower.state_dict().items()}
        tower.load_state_dict(_read_weights(folder, wanted, dtype), strict=True, assign=True)
        # What no file holds: the numbers of the positions, and the mean and deviation.
        tower.embeddings.position_ids = torch.arange(config.max_tokens_per_image + tower.num_class_tokens).expand((1, -1))
        tower.normalise = PixelNormalization(config)
        return tower

    @classmethod
    def settings(cls, config: VisionConfig) -> dict[str, Any]:
        """The sizes, and what else the tower's folder says."""
        made = _read_settings(config, Path(config.path)) if config.path else _classes(config)[0](**super().settings(config))
        settings: dict[str, Any] = made.to_dict()
        return settings


def _with_gradient(hidden_KnV: Tensor, layers: Sequence[Any]) -> Tensor:
    for layer in layers:
        hidden_KnV = layer(hidden_KnV, attention_mask=None)
    return hidden_KnV


def _classes(config: VisionConfig) -> tuple[Any, Any]:
    """transformers' configuration and model class of a tower (imported late: it takes seconds)."""
    import transformers

    prefix = TOWERS[config.tower].transformers
    return getattr(transformers, f"{prefix}VisionConfig"), getattr(transformers, f"{prefix}VisionModel")


def _read_settings(config: VisionConfig, folder: Path) -> Any:
    """transformers' settings of a folder. Raises: ValueError naming the first field in which our configuration differs."""
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"vision.path: no config.json in {folder}: give the folder of a Hugging Face {config.tower} model")
    kind = str(typed_json.read_object(file).get("model_type", "")).removesuffix("_vision_model")
    if kind != str(TOWERS[config.tower].transformers).lower():
        raise ValueError(f"vision.tower is {config.tower}, but {file} describes {kind or 'no model_type'}")
    # Through transformers, which knows the defaults of what a config.json leaves out.
    settings = _classes(config)[0].from_pretrained(str(folder), local_files_only=True)
    for ours, theirs in SIZES.items():
        _check_same(ours, getattr(config, ours), getattr(settings, theirs), file)
    processor = folder / "preprocessor_config.json"
    if processor.is_file():
        stored = typed_json.read_object(processor)
        for ours, theirs in (("pixel_mean", "image_mean"), ("pixel_std", "image_std")):
            found = stored.get(theirs, getattr(config, ours))
            _check_same(ours, getattr(config, ours), tuple(found) if isinstance(found, list) else found, processor)
    return settings


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
        open_regular(file).close()  # a FIFO would be waited for
        try:
            with safe_open(str(file), framework="pt") as tensors:
                for stored in list(tensors.keys()):
                    name = stored.removeprefix("vision_model.").removeprefix("encoder.").replace("pre_layrnorm.", "pre_norm.")
                    if name in wanted:
                        weights[name] = tensors.get_tensor(stored).to(dtype)
        except SafetensorError as error:
            raise ValueError(f"vision.path: {file} is damaged: {error}") from None
    missing = [name for name in wanted if name not in weights]
    if missing:
        raise ValueError(f"vision.path: {folder} lacks {len(missing)} of the tower's {len(wanted)} tensors, e.g. {missing[0]}")
    for name, shape in wanted.items():
        if tuple(weights[name].shape) != shape:
            raise ValueError(f"vision.path: {name} in {folder} has shape {tuple(weights[name].shape)}, wanted {shape}")
    return weights
