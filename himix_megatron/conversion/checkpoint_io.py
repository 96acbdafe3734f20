"""A checkpoint of ours read and written without a model, for conversions of models larger than memory.

Flows in: whole tensors by name, mapped from other files; out: a run folder as training leaves one (`config.json`, `towers/`,
`checkpoints/step-00000000/`), or the tensors of such a folder, a layer at a time. One process; the checkpoint loads at any
layout of ranks. Keys, offsets and shapes on disk are those that megatron-core's modules would give: the tests compare.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from torch import Tensor

from ..checkpoint.description import Position, check_architecture, write_description
from ..checkpoint.frozen_tower import read_tower, store_tower
from ..checkpoint.manifest import LATEST, sync_and_digest, write_manifest
from ..checkpoint.snapshot import describe_state, load_state, opened, own_files, write
from ..config import Config, to_json
from ..config import read_config as config_in
from ..data.loading.plan import START
from ..distributed.control_group import ControlGroup
from ..runtime.durable_files import publish, sync_folder
from .authors_layout import join, layout
from .safetensors_io import NamedTensors, empty_on_disk
from .sharding import TE_NAMES

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.*)")


def _layer_of(name: str) -> int | None:
    """The decoder layer that a tensor belongs to; None: to none."""
    layer = _LAYER.fullmatch(name)
    return None if layer is None else int(layer[1])


def _disk_key(name: str, config: Config) -> tuple[str, int | None]:
    """A tensor's key on disk, and its number along the layers' axis (None: it has no such axis). What all layers have is one
    tensor there; what only some have, as vision where not all inject, has its layer's number in its key."""
    layer, num_layers = _LAYER.fullmatch(name), config.model.num_layers
    if layer is None or ("vision_" in name and len(config.injection.injecting_layers(num_layers)) < num_layers):
        return name, None
    inner = layer[2]
    for on_disk, plain in TE_NAMES.items():
        if inner.startswith(plain):
            inner = inner.replace(plain, on_disk, 1)
    return f"decoder.layers.{inner}", int(layer[1])


def _describe(name: str, tensor: Tensor, config: Config, part: int = 0, num_parts: int = 1) -> ShardedTensor:
    """Megatron-core's description of a tensor of ours, or of its part number `part` of `num_parts` equal ones along the rows:
    which key it has on disk, and where in the tensor of that key it lies."""
    key, number = _disk_key(name, config)
    # The layers' axis is made part of the tensor: megatron-core cannot read a single layer where it is only declared.
    offsets = [] if number is None else [(0, number, config.model.num_layers)]
    if num_parts > 1:
        offsets.append((len(offsets), part, num_parts))
    return ShardedTensor.from_rank_offsets(key, tensor if number is None else tensor[None], *offsets)


# ---- writing -------------------------------------------------------------------------------------------------------


def write_run(
    out: Path, config: Config, weights: Mapping[str, Tensor], tower: Mapping[str, Tensor], progress: Callable[[str], None]
) -> Path:
    """Write a run folder of weights that nothing has trained yet. Returns: its checkpoint.

    Args:
        weights: by the authors' names; each is asked for once, and none is kept in memory.
        tower: by the names of `build_tower`'s module.
    """
    out.mkdir()
    (out / "config.json").write_text(to_json(config))
    checkpoint = out / "checkpoints" / "step-00000000"
    writing = checkpoint.with_name(f"{checkpoint.name}.writing")
    writing.mkdir(parents=True)
    state: dict[str, Any] = {}
    places = layout(config.model, config.injection)
    for number, (ours, parts) in enumerate(places.items()):
        if number % 80 == 0:
            progress(f"arranging tensor {number + 1} of {len(places)}")
        state |= _describe_parts(ours, [weights[name] for name, _ in parts], [heads for _, heads in parts], config, out)
    progress("writing the checkpoint")
    write(describe_state({"model0": state}, validate=True), writing, ControlGroup(config.checkpoint.timeout_seconds))
    # Nothing has trained: a run that would resume in this folder is refused, and must start a new one from it.
    write_description(writing, config, Position(step=0, place=START, data={}), (), store_tower(out, tower), None)
    write_manifest(writing, sync_and_digest(writing, own_files(writing, rank=0)))
    writing.rename(checkpoint)
    sync_folder(checkpoint.parent)
    publish(checkpoint.with_name(LATEST), f"{checkpoint.name}\n".encode())
    return checkpoint


def _describe_parts(name: str, parts: list[Tensor], heads: list[int], config: Config, scratch: Path) -> dict[str, Any]:
    """A tensor of ours out of the authors' parts of it, described for the writer.

    Args: heads: as `layout` gives them; scratch: a folder on whose disk a tensor whose parts interleave is put together.
    """
    if not any(heads):
        # Parts that follow each other are written from where they are.
        return {f"{name}.{i}": _describe(name, part, config, i, len(parts)) for i, part in enumerate(parts)}
    rows = sum(part.shape[0] for part in parts)
    fused = join(parts, heads, config.model, out=empty_on_disk(scratch, (rows, *parts[0].shape[1:]), parts[0].dtype))
    return {name: _describe(name, fused, config)}


# ---- reading -------------------------------------------------------------------------------------------------------


class StoredWeights(NamedTensors):
    """The whole tensors of a checkpoint by our names, at the published size of the vocabulary; one layer is kept in memory."""

    def __init__(self, checkpoint: Path, config: Config):
        """Raises: ValueError if a tensor of the model is not in it."""
        self.checkpoint, self.config = checkpoint, config
        self.names = list(layout(config.model, config.injection))
        with opened(checkpoint):
            self._stored = dist_checkpointing.load_tensors_metadata(str(checkpoint))
        missing = [name for name in self.names if _disk_key(name, config)[0] not in self._stored]
        if missing:
            raise ValueError(f"checkpoint {checkpoint} lacks {', '.join(missing[:4])}")
        self._held: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        layer = _layer_of(name)
        if name not in self._held:
            self._held = {}  # before the next is read: two layers are never in memory
            self._held = self._read([name] if layer is None else [n for n in self.names if _layer_of(n) == layer])
        tensor = self._held[name]
        return tensor[: self.config.model.vocab_size] if name.startswith(("embedding.", "output_layer.")) else tensor

    def tower(self, config: Config) -> dict[str, Tensor]:
        """The run's tower by the names of `build_tower`'s module, whether it trained and is therefore in the checkpoint or not.

        Raises: ValueError for another architecture than the configuration's, or a tower that is gone or damaged.
        """
        file = check_architecture(self.checkpoint, config).tower
        if file is not None:
            return read_tower(self.checkpoint, file)
        prefix = "tower."
        keys = [key for key in self._stored if key.startswith(prefix) and not key.endswith("_extra_state")]
        state = {key: ShardedTensor.from_rank_offsets(key, self._empty(key)) for key in keys}
        loaded = self._load(state)
        return {key.removeprefix(prefix): loaded[key] for key in keys}

    def _empty(self, key: str, *, one_layer: bool = False) -> Tensor:
        """Memory for what a key holds, or for one layer of it."""
        return torch.empty(self._stored[key].global_shape[int(one_layer) :], dtype=self._stored[key].dtype)

    def _read(self, names: list[str]) -> dict[str, Tensor]:
        """These tensors: memory is described as if it was to be written, and loading fills it."""
        keys = {name: _disk_key(name, self.config) for name in names}
        empty = {name: self._empty(key, one_layer=number is not None) for name, (key, number) in keys.items()}
        self._load({name: _describe(name, tensor, self.config) for name, tensor in empty.items()})
        return empty

    def _load(self, state: dict[str, Any]) -> dict[str, Tensor]:
        # Megatron-core's check that every part of a tensor is asked for would refuse a single layer.
        loaded: dict[str, Tensor] = load_state(state, self.checkpoint, validate_access_integrity=False)
        return loaded


def read_config(checkpoint: Path) -> Config:
    """The settings of the run that a checkpoint belongs to. Raises: ValueError if its run folder has none."""
    path = checkpoint.parent.parent / "config.json"
    if not path.is_file():
        raise ValueError(f"checkpoint {checkpoint} lies in no run folder: {path} is missing")
    return config_in(path)
