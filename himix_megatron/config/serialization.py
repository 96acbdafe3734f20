"""config.json: the tree of settings as text, and settings that earlier versions wrote."""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Mapping
from typing import Any

from .model import VisionConfig
from .run import Config

VERSION = 2
"""Of config.json. Versions 0, which has no number in it, and 1 are read through `RENAMED_FIELDS`, `_RENAMED_VALUES` and
`in_vision_tokens`."""

RENAMED_FIELDS = {
    "model.attention": "model.layer_spec",
    "model.text_only": "model.text_only_vision",
    "vision.placement": "vision.encoder_placement",
    "vision.encode_ahead": "vision.prefetch_features",
    "data.path": "data.datasets",
    "data.stream": "data.webdataset_urls",
    "data.too_long": "data.overlong",
    "data.pack_text_tokens": "data.pack_max_text_tokens",
    "train.parts": "train.trainable_parts",
    "checkpoint.initial": "checkpoint.init_from",
    "log.pictures_interval_steps": "log.predictions_interval_steps",
    "log.pictures_samples": "log.predictions_samples",
    "health.max_fruitless_starts": "health.max_starts_without_progress",
    "run.resume_after_stop": "run.ignore_stop_file",
    "run.faults": "run.fault_injection",
}
"""Fields as version 0 names them, and their names now."""
COUNTED_IMAGES = ("data.pack_images", "data.pack_max_images")
"""Names in versions 0 and 1 of a pack's budget in images, now data.pack_max_vision_tokens."""
_RENAMED_VALUES = {
    # Transformer Engine no longer loads the state of delayed scaling.
    ("train.fp8", "hybrid"): "tensorwise",
    ("data.overlong", "cut"): "truncate",
}


def current_fields(stored: dict[str, Any]) -> dict[str, Any]:
    """Values by dotted name, as any version wrote them, by the names and values of this version."""
    named = {RENAMED_FIELDS.get(name, name): value for name, value in stored.items()}
    return {
        name: _RENAMED_VALUES.get((name, value), value) if isinstance(value, str) else value for name, value in named.items()
    }


def in_vision_tokens(fields: Mapping[str, Any], tokens_per_image: int) -> dict[str, Any]:
    """Values by dotted name, a pack's budget in vision tokens also where they have it in images."""
    found = dict(fields)
    for name in COUNTED_IMAGES:
        if name in found:
            images = found.pop(name)
            found["data.pack_max_vision_tokens"] = images and images * tokens_per_image
    return found


def _renew(tree: dict[str, Any]) -> dict[str, Any]:
    """A tree of version 0 or 1 as one of version 2."""
    if not isinstance(tree.get("data"), dict):
        return tree
    vision = _build(VisionConfig, tree.get("vision"), "vision.")
    named = {f"data.{name}": value for name, value in tree["data"].items()}
    renewed = in_vision_tokens(named, vision.max_tokens_per_image)
    return tree | {"data": {name.removeprefix("data."): value for name, value in renewed.items()}}


def to_json(config: Any) -> str:
    """The tree as JSON text, two-space indented, fields in order."""
    return json.dumps({"version": VERSION, **dataclasses.asdict(config)}, indent=2) + "\n"


def _build(cls: type, values: Any, prefix: str = "") -> Any:
    if not isinstance(values, dict):
        raise ValueError(f"config.json: {prefix.rstrip('.') or 'it'} is {values!r}, wanted an object with fields")
    hints = typing.get_type_hints(cls)
    built: dict[str, Any] = {}
    for dotted, value in current_fields({prefix + name: value for name, value in values.items()}).items():
        name = dotted.removeprefix(prefix)
        if name not in hints:
            raise ValueError(f"config.json has a field {dotted}, which this program does not know: use the one that wrote it")
        if dataclasses.is_dataclass(hints[name]):
            built[name] = _build(hints[name], value, f"{dotted}.")
        else:
            built[name] = tuple(value) if isinstance(value, list) else value
    try:
        return cls(**built)
    except TypeError as error:  # a field without a default is missing, or a number is no number
        raise ValueError(f"config.json: {prefix.rstrip('.') or 'it'} cannot be read: {error}") from error


def from_json(text: str) -> Config:
    """A Config from `to_json`'s text. Raises: ValueError (one line) for a version or a field that is not known."""
    try:
        tree = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"config.json is no JSON: {error}") from error
    version = tree.pop("version", 0) if isinstance(tree, dict) else 0
    if version not in range(VERSION + 1):
        raise ValueError(f"config.json has version {version}: this program reads versions 0 to {VERSION}; use a newer program")
    config = _build(Config, tree if version == VERSION or not isinstance(tree, dict) else _renew(tree))
    assert isinstance(config, Config)
    return config


def differences(old: Any, new: Any, prefix: str = "") -> list[tuple[str, Any, Any]]:
    """The fields in which two trees of one class differ, as (dotted name, old value, new value), in field order."""
    found: list[tuple[str, Any, Any]] = []
    for item in dataclasses.fields(old):
        a, b = getattr(old, item.name), getattr(new, item.name)
        if dataclasses.is_dataclass(a) and not isinstance(a, type):
            found += differences(a, b, f"{prefix}{item.name}.")
        elif a != b:
            found.append((prefix + item.name, a, b))
    return found
