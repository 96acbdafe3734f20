"""config.json: the tree of settings as text, and settings that earlier versions wrote."""

from __future__ import annotations

import dataclasses
import json
import typing
from typing import Any

from .run import Config

VERSION = 1
"""Of config.json. Version 0, which has no number in it, is read through `RENAMED_FIELDS` and `_RENAMED_VALUES`."""

RENAMED_FIELDS = {
    "model.attention": "model.layer_spec",
    "model.text_only": "model.text_only_vision",
    "vision.placement": "vision.encoder_placement",
    "vision.encode_ahead": "vision.prefetch_features",
    "data.path": "data.datasets",
    "data.stream": "data.webdataset_urls",
    "data.too_long": "data.overlong",
    "data.pack_text_tokens": "data.pack_max_text_tokens",
    "data.pack_images": "data.pack_max_images",
    "train.parts": "train.trainable_parts",
    "checkpoint.initial": "checkpoint.init_from",
    "log.pictures_interval_steps": "log.predictions_interval_steps",
    "log.pictures_samples": "log.predictions_samples",
    "health.max_fruitless_starts": "health.max_starts_without_progress",
    "run.resume_after_stop": "run.ignore_stop_file",
    "run.faults": "run.fault_injection",
}
"""Fields as version 0 names them, and their names now."""
_RENAMED_VALUES = {
    # Transformer Engine no longer loads the state of delayed scaling.
    ("train.fp8", "hybrid"): "tensorwise",
    ("data.overlong", "cut"): "truncate",
}


def current_name(field_name: str) -> str:
    """A dotted field name of any version as it is now."""
    return RENAMED_FIELDS.get(field_name, field_name)


def current_fields(stored: dict[str, Any]) -> dict[str, Any]:
    """Values by dotted name, as any version wrote them, by the names and values of this version."""
    named = {current_name(name): value for name, value in stored.items()}
    return {
        name: _RENAMED_VALUES.get((name, value), value) if isinstance(value, str) else value for name, value in named.items()
    }


def to_json(config: Any) -> str:
    """The tree as JSON text, two-space indented, fields in order."""
    return json.dumps({"version": VERSION, **dataclasses.asdict(config)}, indent=2) + "\n"


def _build(cls: type, values: dict[str, Any], prefix: str = "") -> Any:
    hints = typing.get_type_hints(cls)
    built: dict[str, Any] = {}
    named = current_fields({prefix + name: value for name, value in values.items()})
    for dotted, value in named.items():
        name = dotted.removeprefix(prefix)
        if name not in hints:
            raise ValueError(f"{cls.__name__} has no field {name}: written by another version?")
        hint = hints[name]
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            built[name] = _build(hint, value, f"{dotted}.")
        elif isinstance(value, list):
            built[name] = tuple(value)
        else:
            built[name] = value
    return cls(**built)


def from_json(text: str) -> Config:
    """A Config from `to_json`'s text. Raises: ValueError for a version or a field that this version does not know."""
    tree = json.loads(text)
    version = tree.pop("version", 0)
    if version not in (0, VERSION):
        raise ValueError(f"config.json has version {version}: this program reads versions 0 and {VERSION}; use a newer program")
    config = _build(Config, tree)
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


def field_names(cls: type = Config, prefix: str = "") -> list[str]:
    """Every leaf field as the command line spells it, e.g. `train.global_batch_samples`."""
    names: list[str] = []
    for name, hint in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            names += field_names(hint, f"{prefix}{name}.")
        else:
            names.append(prefix + name)
    return names
