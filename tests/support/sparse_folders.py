"""Model folders of any size that take no room: safetensors whose data is a hole in the file."""

from __future__ import annotations

import json
import math
from pathlib import Path

from himix_megatron.conversion.safetensors_io import INDEX


def sparse_file(path: Path, shapes: dict[str, tuple[int, ...]], dtype: str = "BF16") -> None:
    """One file of zeros that are not on disk."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * {"BF16": 2, "F32": 4}[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def sparse_folder(folder: Path, shapes: dict[str, tuple[int, ...]], num_shards: int) -> None:
    """Shards of zeros, and their index."""
    names, weight_map = list(shapes), {}
    for number in range(num_shards):
        own = names[number * len(names) // num_shards : (number + 1) * len(names) // num_shards]
        file = f"model-{number + 1:05d}-of-{num_shards:05d}.safetensors"
        sparse_file(folder / file, {name: shapes[name] for name in own})
        weight_map |= dict.fromkeys(own, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
