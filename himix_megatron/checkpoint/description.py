"""himix.json, a checkpoint's description: where in the run it was taken, which model it is, what trained.

Flows in: Config and Position; out: the file, and what it says. `version` is 1; a file without one, version 0, has the same
fields.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..config import Config, Part, current_fields
from ..data.loading.plan import DataPosition
from ..runtime.durable_files import write_synced
from .manifest import DESCRIPTION, DESCRIPTION_VERSION, read_description

_MODEL_FIELDS = (
    "family", "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "vocab_size",
    "rope_theta", "rope_scaling_factor", "norm_eps", "tie_embeddings",
)  # fmt: skip
_VISION_FIELDS = (
    "tower", "hidden_size", "image_size", "patch_size", "num_layers", "num_attention_heads", "ffn_hidden_size", "feature_layer",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Position:
    """Where a run stands: it continues with the next step of the same plan."""

    step: int
    """Optimizer steps done."""
    place: DataPosition
    """Where the data continues."""
    data: dict[str, Any]
    """The settings that determine which sample is in which step (`SamplingPlan.fingerprint_fields`)."""


def position_of(description: Mapping[str, Any]) -> Position:
    """Where the run stood, from a checkpoint's description."""
    stored = description["position"]
    return Position(step=stored["step"], place=DataPosition(**stored["place"]), data=current_fields(stored["data"]))


def architecture(config: Config) -> dict[str, Any]:
    """What must be equal in a checkpoint and in the model that loads it."""
    found = {f"model.{name}": getattr(config.model, name) for name in _MODEL_FIELDS}
    found["model.head_dim"] = config.model.channels_per_head
    return found | {f"vision.{name}": getattr(config.vision, name) for name in _VISION_FIELDS}


def check_architecture(folder: Path, config: Config) -> dict[str, Any]:
    """The description of a checkpoint. Raises: ValueError if it is damaged, or naming the first field in which the
    architectures differ."""
    description = read_description(folder)
    stored, wanted = description["architecture"], architecture(config)
    for name in wanted:
        # A field that is newer than the checkpoint cannot differ.
        if stored.get(name, wanted[name]) != wanted[name]:
            raise ValueError(
                f"checkpoint {folder} is of another architecture: {name} is {stored[name]} there and {wanted[name]} here"
            )
    return description


def write_description(
    folder: Path, config: Config, position: Position, parts: Sequence[Part], tower: str | None, validation_loss: float | None
) -> None:
    """Write himix.json. `parts`: what trained, empty in a converted model; `tower`: file name of the frozen tower."""
    description = {
        "version": DESCRIPTION_VERSION,
        "position": asdict(position),
        "parts": parts,
        "architecture": architecture(config),
        "distributed_optimizer": config.parallel.distributed_optimizer,
        "tower": tower,
        "validation_loss": validation_loss,
    }
    write_synced(folder / DESCRIPTION, (json.dumps(description, indent=2) + "\n").encode())
