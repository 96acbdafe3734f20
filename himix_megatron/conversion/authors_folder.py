"""The authors' layout as a folder: their names, in safetensors, with a `config.json` in the terms of their transformers.

Flows in: our checkpoint's tensors, or such a folder (or one safetensors file, the settings in its metadata); out: the other.
The decoder's names are those of the published implementation (`authors_layout.py`). The tower's could not be checked against a
published checkpoint: here it lies under `model.vision_tower.`, by Hugging Face's names (a tiny tower by ours).
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections import ChainMap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..config import ModelConfig, VisionConfig
from ..config.families import FAMILIES
from ..config.towers import TOWERS
from ..model.towers import build_tower
from ..runtime import typed_json
from .authors_layout import shapes
from .huggingface import check_settings, check_shapes, check_weights, language_config, language_settings, rope_scaling
from .safetensors_io import MappedTensors, open_file, open_folder, read_json, write_folder

_TOWER = "model.vision_tower."
_IN_ONE_FILE = "weight."
"""Prefix of the weights in a file that also holds inputs and gradients, as the files in tests/data/reference do."""
_NORM = "model.layers.0.input_layernorm_img.weight"


@dataclass(frozen=True)
class AuthorsModel:
    """What a folder or file in the authors' layout holds."""

    model: ModelConfig
    vision_width: int
    weights: MappedTensors
    """The decoder's, by the authors' names, checked against the sizes."""
    vision: VisionConfig | None
    """None: it holds no tower."""
    tower: dict[str, Tensor]
    """By the names of `build_tower`'s module; empty without a tower."""


def read_authors(path: Path) -> AuthorsModel:
    """Raises: ValueError naming what is missing, left over, of another shape or not safe to read."""
    if path.is_file():
        opened, where = open_file(path), path
        settings = _settings_of_file(opened, path)
        entries = {n.removeprefix(_IN_ONE_FILE): e for n, e in opened.entries.items() if n.startswith(_IN_ONE_FILE)}
        opened = MappedTensors(entries or opened.entries, opened.metadata)
    else:
        opened, where = open_folder(path), path / "config.json"
        settings = read_json(where)
    check_settings(settings, tuple(FAMILIES), opened, where)
    model = language_config(settings, where)
    if _NORM not in opened:
        raise ValueError(f"{path} lacks {_NORM}: it is no HiMix model")
    vision_width = opened.entries[_NORM].shape[0]
    parts = {inside: {n: e for n, e in opened.entries.items() if n.startswith(_TOWER) is inside} for inside in (True, False)}
    weights = MappedTensors(parts[False], opened.metadata)
    check_weights(weights, shapes(model, vision_width), path)
    if not parts[True]:
        return AuthorsModel(model, vision_width, weights, None, {})
    vision, tower = _vision(settings, where), MappedTensors(parts[True], {})
    if vision.hidden_size != vision_width:
        raise ValueError(f"{where}: the tower's width is {vision.hidden_size}, but {_NORM} has {vision_width}")
    named = {_our_tower_name(name.removeprefix(_TOWER)): tower[name] for name in tower}
    check_tower_weights(named, vision, path)
    return AuthorsModel(model, vision_width, weights, vision, named)


def write_authors(
    folder: Path, model: ModelConfig, vision: VisionConfig, weights: Mapping[str, Tensor], tower: Mapping[str, Tensor]
) -> None:
    """Write a folder in the authors' layout; `weights` by their names, `tower` by ours."""
    (folder / "config.json").write_text(json.dumps(_settings(model, vision), indent=2) + "\n")
    theirs = {_TOWER + _their_tower_name(name, vision): tensor for name, tensor in tower.items()}
    write_folder(folder, ChainMap(theirs, weights))  # type: ignore[arg-type]


def check_tower_weights(tower: Mapping[str, Tensor], vision: VisionConfig, where: Path) -> None:
    """Raises: ValueError naming a tensor that the tower of these sizes lacks, has more, or has in another shape."""
    wanted = build_tower(dataclasses.replace(vision, path=None), seed=0, dtype=next(iter(tower.values())).dtype).state_dict()
    check_shapes({n: tuple(t.shape) for n, t in tower.items()}, {n: tuple(t.shape) for n, t in wanted.items()}, where)


def _settings_of_file(opened: MappedTensors, path: Path) -> dict[str, Any]:
    try:
        sizes = typed_json.parse_object(opened.metadata["config"], "config")
        return sizes | {"model_type": sizes.get("model_type", sizes.get("family"))}
    except (KeyError, ValueError):
        raise ValueError(
            f"{path} has no model's sizes in its metadata (entry config): give a folder with a config.json"
        ) from None


def _settings(model: ModelConfig, vision: VisionConfig) -> dict[str, Any]:
    return language_settings(model) | {
        "model_type": model.family,
        "rope_theta": model.rope_theta,
        "rope_scaling": rope_scaling(model),
        "vision_hidden_size": vision.hidden_size,
        "vision": dataclasses.asdict(dataclasses.replace(vision, path=None)),
    }


def _vision(settings: Mapping[str, Any], where: Path) -> VisionConfig:
    try:
        return typed_json.build(VisionConfig, settings.get("vision"), str(where), field="vision")
    except ValueError as error:
        raise ValueError(f"{where} does not describe the tower that the weights hold (entry vision): {error}") from None


def _their_tower_name(name: str, vision: VisionConfig) -> str:
    if TOWERS[vision.tower].transformers is None:
        return name
    return "vision_model." + re.sub(r"^layers\.", "encoder.layers.", name).replace("pre_norm.", "pre_layrnorm.")


def _our_tower_name(name: str) -> str:
    return name.removeprefix("vision_model.").removeprefix("encoder.").replace("pre_layrnorm.", "pre_norm.")
