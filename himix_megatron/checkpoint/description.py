"""himix.json, a checkpoint's description: where in the run it was taken, which model it is, what trained.

Flows in: Config and Position; out: the file, and what it says (manifest.Description). `version` is 1; a file without one,
version 0, has the same fields.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from ..config import Config, InjectionConfig, Part, current_fields
from ..costs.memory import model_parameters
from ..runtime.durable_files import write_synced
from .manifest import DESCRIPTION, DESCRIPTION_VERSION, read_description, read_manifest
from .manifest import Description as Description
from .manifest import Position as Position

_MODEL_FIELDS = (
    "family", "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "vocab_size",
    "rope_theta", "rope_scaling_factor", "norm_eps", "tie_embeddings",
)  # fmt: skip
_VISION_FIELDS = (
    "feature_layers",
    "tower", "hidden_size", "image_size", "patch_size", "num_layers", "num_attention_heads", "ffn_hidden_size", "feature_layer",
)  # fmt: skip


_OLDER = {f"injection.{item.name}": getattr(InjectionConfig(), item.name) for item in fields(InjectionConfig)} | {
    "vision.feature_layers": ()
}
"""What every checkpoint without these fields has."""


def position_of(description: Description) -> Position:
    """Where the run stood, with the settings by the names of this version."""
    return replace(description.position, data=current_fields(description.position.data))


def architecture(config: Config) -> dict[str, Any]:
    """What must be equal in a checkpoint and in the model that loads it."""
    found = {f"model.{name}": getattr(config.model, name) for name in _MODEL_FIELDS}
    found["model.head_dim"] = config.model.channels_per_head
    found |= {f"injection.{item.name}": getattr(config.injection, item.name) for item in fields(config.injection)}
    return found | {f"vision.{name}": getattr(config.vision, name) for name in _VISION_FIELDS}


def check_architecture(folder: Path, config: Config) -> Description:
    """The description of a checkpoint. Raises: ValueError if it is damaged, naming the first field in which the architectures
    differ, or for a model that is larger than its files, which nobody should begin to build."""
    description = read_description(folder)
    stored, wanted = description.architecture, architecture(config)
    for name in wanted:
        # A field that is newer than the checkpoint cannot differ, but for the choices that there were none of.
        found = stored.get(name, _OLDER.get(name, wanted[name]))
        if (tuple(found) if isinstance(found, list) else found) != wanted[name]:
            raise ValueError(f"checkpoint {folder} is of another architecture: {name} is {found} there and {wanted[name]} here")
    num_bytes = sum(digest.bytes for digest in read_manifest(folder).values())
    if (number := model_parameters(config).language) > num_bytes:
        raise ValueError(f"checkpoint {folder} has {num_bytes} bytes: too few for a model of {number:.3g} parameters")
    return description


def write_description(
    folder: Path, config: Config, position: Position, parts: Sequence[Part], tower: str | None, validation_loss: float | None
) -> None:
    """Write himix.json."""
    description = Description(
        version=DESCRIPTION_VERSION,
        position=position,
        parts=tuple(parts),
        architecture=architecture(config),
        distributed_optimizer=config.parallel.distributed_optimizer,
        tower=tower,
        validation_loss=validation_loss,
    )
    write_synced(folder / DESCRIPTION, (json.dumps(asdict(description), indent=2) + "\n").encode())
