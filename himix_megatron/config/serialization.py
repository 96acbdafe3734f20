"""config.json: the tree of settings as text, and settings that earlier versions wrote."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..runtime import typed_json
from ..runtime.untrusted_files import read_regular
from .model import VisionConfig
from .run import Config

VERSION = 3
"""Of config.json. Version 2 has no section `injection`. Versions 0, which has no number in it, and 1 are read through
`RENAMED_FIELDS`, `_RENAMED_VALUES` and `in_vision_tokens`."""

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
            found["data.pack_max_vision_tokens"] = images * tokens_per_image if isinstance(images, int) else images
    return found


def _current(tree: dict[str, Any]) -> dict[str, Any]:
    """A tree of any version by the names and values of this version, but for a budget in images."""
    found = tree.copy()
    for section, values in tree.items():
        if isinstance(values, dict):
            fields = current_fields({f"{section}.{name}": value for name, value in values.items()})
            found[section] = {dotted.removeprefix(f"{section}."): value for dotted, value in fields.items()}
    return found


def _renew(tree: dict[str, Any], where: str) -> dict[str, Any]:
    """A tree of version 0 or 1 as one of version 2."""
    if not isinstance(tree.get("data"), dict):
        return tree
    vision = typed_json.build(VisionConfig, tree.get("vision"), where, field="vision")
    named = {f"data.{name}": value for name, value in tree["data"].items()}
    renewed = in_vision_tokens(named, vision.max_tokens_per_image)
    return tree | {"data": {name.removeprefix("data."): value for name, value in renewed.items()}}


def to_json(config: Any) -> str:
    """The tree as JSON text, two-space indented, fields in order."""
    return json.dumps({"version": VERSION, **dataclasses.asdict(config)}, indent=2) + "\n"


def from_json(text: str | bytes, where: str = "config.json") -> Config:
    """A Config from `to_json`'s text. `where`: the file, for errors.

    Raises: ValueError (one line) for a version or a field that is not known, or a value of another type.
    """
    tree = typed_json.parse_object(text, where)
    version = tree.pop("version", 0)
    if version not in range(VERSION + 1):
        raise ValueError(f"{where} has version {version}: this program reads versions 0 to {VERSION}; use a newer program")
    tree = _current(tree)
    return typed_json.build(Config, tree if version >= 2 else _renew(tree, where), where)


def read_config(path: Path) -> Config:
    """The Config in a file. Raises: FileNotFoundError; ValueError as `from_json`."""
    return from_json(read_regular(path, typed_json.MAX_FILE_BYTES), str(path))


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
