"""Safetensors larger than memory: checked, mapped, and written a shard at a time.

Flows in: folders as Hugging Face lays them out (`model.safetensors`, or shards and their index); out: tensors that live in
the page cache, whose pages the kernel may drop again. Everything that can be wrong with a folder is found in the headers,
before a weight is read. The library `safetensors` writes; it is not used to read, because its tensors share one map of the
whole file, which Megatron-core would copy.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from ..runtime import typed_json
from ..runtime.limits import Size
from ..runtime.untrusted_files import open_regular

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_SIZES |= {"U16": 2, "U32": 4, "U64": 8, "F8_E4M3": 1, "F8_E5M2": 1}
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""The dtypes that are read and written, by their name in a header."""
_MAX_HEADER_BYTES = 100_000_000
"""The format's own limit."""
_MAX_DIMENSIONS = 64  # torch's
_STATED: dict[str, Any] = {"dtype": str, "shape": tuple[Size, ...], "data_offsets": tuple[Size, Size]}


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a file."""

    file: Path
    dtype: str
    """As the header names it."""
    shape: tuple[int, ...]
    start: int
    """Byte of the file at which it begins."""


class NamedTensors(Mapping[str, Tensor]):
    """Tensors of which the names are known; each is made when it is asked for."""

    names: Collection[str]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


class MappedTensors(NamedTensors):
    """Tensors of a checked folder or file. Each look-up maps the file anew; writing to a tensor does not reach the file."""

    def __init__(self, entries: dict[str, Entry], metadata: Mapping[str, str]):
        self.names = self.entries = entries
        self.metadata = metadata

    def __getitem__(self, name: str) -> Tensor:
        entry = self.entries[name]
        num_bytes = _SIZES[entry.dtype] * math.prod(entry.shape)
        if not num_bytes:
            return torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
        # A map of its own, exactly as long as the tensor: megatron-core copies tensors that are a part of a larger storage.
        flat = torch.from_numpy(np.memmap(entry.file, np.uint8, "c", entry.start, (num_bytes,)))
        return flat.view(DTYPES[entry.dtype]).view(entry.shape)


def open_file(path: Path) -> MappedTensors:
    """One safetensors file. Raises: ValueError if it is not whole."""
    return MappedTensors(*_read_header(path))


def open_folder(folder: Path) -> MappedTensors:
    """All tensors of a folder. Raises: ValueError naming what is missing, damaged, doubled or not safe to read."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder")
    index, single = folder / INDEX, folder / SINGLE
    if index.is_file() and single.is_file():
        raise ValueError(f"{folder} holds both {SINGLE} and {INDEX}: which of the two is the model? Remove one")
    if index.is_file():
        return _open_shards(folder, index)
    if single.is_file():
        return open_file(single)
    others = sorted(folder.glob("*.safetensors"))
    if len(others) == 1:
        return open_file(others[0])
    if others:
        raise ValueError(f"{folder} holds {len(others)} safetensors files, but no {INDEX} that says what belongs together")
    pickled = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for file in folder.glob(pattern))
    if pickled:
        raise ValueError(
            f"{folder} holds pickled weights only ({pickled[0]}), and reading a pickle runs what is in it: save them as "
            "safetensors first (docs/conversion.md says how)"
        )
    raise ValueError(f"{folder} holds no {SINGLE} and no {INDEX}")


def _open_shards(folder: Path, index: Path) -> MappedTensors:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} has no weight_map")
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file or "\\" in file or not file.endswith(".safetensors"):
            raise ValueError(f"{index} looks for {name} in {file!r}: wanted the name of a safetensors file in the same folder")
    entries: dict[str, Entry] = {}
    for file in sorted(set(weight_map.values())):
        if not (folder / file).is_file():
            raise ValueError(f"{folder} lacks the shard {file}, which {INDEX} names")
        for name, entry in _read_header(folder / file)[0].items():
            if name in entries:
                raise ValueError(f"{name} is in two shards of {folder}: {entries[name].file.name} and {file}")
            if name not in weight_map:
                raise ValueError(f"{folder / file} holds {name}, which {INDEX} does not list")
            entries[name] = entry
    for name, file in weight_map.items():
        if name not in entries or entries[name].file.name != file:
            raise ValueError(f"{folder / file} lacks {name}, which {INDEX} says is in it")
    return MappedTensors(entries, {})


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object. Raises: ValueError naming the file."""
    if not file.is_file():
        raise ValueError(f"{file.parent} has no {file.name}")
    stored: dict[str, Any] = typed_json.as_type(dict[str, Any], typed_json.read(file), str(file))
    return stored


def _read_header(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """Entries and metadata of one file, checked against its size. Source: the safetensors format's description."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little") if size >= 8 else 0
        if not 2 <= length <= min(_MAX_HEADER_BYTES, size - 8):
            raise ValueError(f"{path} is no safetensors file, or cut short: its header does not fit into its {size} bytes")
        raw = file.read(length)
    try:
        header = typed_json.parse_object(raw, "header")
        metadata = typed_json.as_type(dict[str, str], header.pop("__metadata__", None) or {}, "header", "__metadata__")
        entries = {name: _entry(path, 8 + length, name, stated) for name, stated in header.items()}
    except ValueError as error:
        raise ValueError(f"{path} is damaged: its header is not one of safetensors ({error})") from None
    end = 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: item[1].start):
        stated_end = 8 + length + header[name]["data_offsets"][1]
        if entry.start != end or stated_end - entry.start != _SIZES[entry.dtype] * math.prod(entry.shape):
            raise ValueError(f"{path} is damaged: {name} does not fill the bytes that its header gives it")
        end = stated_end
    if end != size:
        raise ValueError(f"{path} is {'cut short' if size < end else 'damaged'}: {size} bytes, its header wants {end}")
    return entries, metadata


def _entry(path: Path, first: int, name: str, values: Any) -> Entry:
    stated = typed_json.as_type(dict[str, Any], values, "header", name)
    dtype, shape, place = (typed_json.as_type(hint, stated.get(n), "header", f"{name}.{n}") for n, hint in _STATED.items())
    if dtype not in _SIZES or len(shape) > _MAX_DIMENSIONS:
        raise ValueError(f"{name}: dtype {dtype}, {len(shape)} dimensions")
    return Entry(path, dtype, shape, first + place[0])


def empty_on_disk(folder: Path, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor whose memory is a file without a name in the folder, which is gone when nobody holds it."""
    num_bytes = dtype.itemsize * math.prod(shape)
    with tempfile.TemporaryFile(dir=folder) as file:
        file.truncate(num_bytes)
        flat = torch.from_numpy(np.memmap(file, np.uint8, "r+", 0, (num_bytes,)))
    return flat.view(dtype).view(shape)


def write_folder(folder: Path, tensors: Mapping[str, Tensor], *, max_shard_bytes: int = 2_000_000_000) -> None:
    """Write safetensors as Hugging Face lays them out; the tensors of one shard are in memory at a time.

    One file, or shards of at most `max_shard_bytes` (a larger tensor has one of its own) and their index.
    """
    shards: list[tuple[Path, list[str]]] = []
    held: dict[str, Tensor] = {}
    total = held_bytes = 0

    def write_shard() -> None:
        path = folder / f"shard-{len(shards)}.writing"
        save_file(held, path, metadata={"format": "pt"})
        shards.append((path, list(held)))
        held.clear()

    for name in tensors:
        tensor = tensors[name].detach().cpu().contiguous()
        if held and held_bytes + tensor.nbytes > max_shard_bytes:
            write_shard()
            held_bytes = 0
        held[name] = tensor
        held_bytes, total = held_bytes + tensor.nbytes, total + tensor.nbytes
    write_shard()
    if len(shards) == 1:
        shards[0][0].rename(folder / SINGLE)
        return
    weight_map: dict[str, str] = {}
    for number, (path, written) in enumerate(shards, 1):
        file = path.rename(folder / f"model-{number:05d}-of-{len(shards):05d}.safetensors")
        weight_map |= dict.fromkeys(written, file.name)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
