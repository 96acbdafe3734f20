"""A tower that does not train is stored once, in RUN/towers/HASH.safetensors, and checkpoints refer to it by that name.

Flows in: a tower's weights; out: the file, whose name is the SHA-256 of its content, and the weights again.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from ..runtime.durable_files import bytes_digest, file_digest, publish
from .manifest import tower_path


def tower_hash(weights: Mapping[str, Tensor]) -> str:
    """The name, without suffix, under which these weights are stored in their precision."""
    return bytes_digest(_tower_bytes(weights)).sha256


def store_tower(run_dir: Path, weights: Mapping[str, Tensor]) -> str:
    """Store a frozen tower in a run folder, unless it is there. Returns: its file name."""
    data = _tower_bytes(weights)
    path = run_dir / "towers" / f"{bytes_digest(data).sha256}.safetensors"
    if not path.is_file():
        publish(path, data)
    return path.name


def _tower_bytes(weights: Mapping[str, Tensor]) -> bytes:
    return save_tensors({name: tensor.contiguous().cpu() for name, tensor in weights.items()})


def read_tower(folder: Path, file: str) -> dict[str, Tensor]:
    """The frozen tower of a checkpoint. Raises: ValueError if it is missing, or its content does not have the hash in its
    name."""
    path = tower_path(folder, file)
    if not path.is_file():
        raise ValueError(f"checkpoint {folder} refers to the tower {path}, which is missing: keep a run folder together")
    if file_digest(path).sha256 != path.stem:
        raise ValueError(f"tower {path} is damaged: its content does not have the hash that is its name")
    try:
        return load_file(path)  # memory-mapped: a tower of 1.7 GB is not in memory twice
    except SafetensorError as error:
        raise ValueError(f"tower {path} cannot be read: {error}") from None


def tower_state(tower: nn.Module) -> dict[str, Any]:
    """A frozen tower's sharded state, as of a checkpoint in which it trained: complete on every rank, rank 0's is saved."""
    tensors = {name: tensor.contiguous() for name, tensor in tower.state_dict().items()}
    state: dict[str, Any] = make_sharded_tensors_for_checkpoint(tensors, "tower.")
    for tensor in state.values():
        tensor.replica_id = torch.distributed.get_rank()
    return state
