"""The same preprocessing by Ray Data alone, for `tools/bench/data.py` to compare with: `map_batches`, then `write_webdataset`.

Flows in: LLaVA's rows and images; out: tars in a folder. Images are checked by the same functions as ours are, so that the
difference is the way of working; or by Pillow, as one would write it first. No part of the product: names and bytes differ at
every run, and a killed run leaves half tars under their final names.
"""

from __future__ import annotations

import functools
import io
import json
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from himix_megatron.data.images import image_file
from himix_megatron.data.shards import shard_format

Check = Literal["header", "header by Pillow", "decode", "decode by Pillow"]
OBJECT_STORE_BYTES = 2 << 30
"""For whole images, which our own preprocessing never puts there."""


def write_by_ray_data(annotations: Path, images: Path, out: Path, *, check: Check, samples_per_shard: int) -> None:
    """Write a WebDataset of a LLaVA source, with about this many samples in a tar."""
    import ray

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    rows = [{"row": number, "sample": json.dumps(row)} for number, row in enumerate(json.loads(annotations.read_text()))]
    dataset = ray.data.from_items(rows, override_num_blocks=-(-len(rows) // samples_per_shard))
    read = functools.partial(_read, images=str(images), check=check)
    dataset.map_batches(read, batch_size=128).write_webdataset(str(out), encoder=None)  # columns are files already


def _read(batch: dict[str, Any], images: str, check: Check) -> dict[str, list[Any]]:
    """Read and check the images of some rows. (All have one, and all are good: what bad ones would need is left out.)"""
    look = {"header": image_file.header, "header by Pillow": _open, "decode": image_file.verify, "decode by Pillow": _load}[
        check
    ]
    columns: dict[str, list[Any]] = {"__key__": [], "json": [], "jpg": []}
    for number, sample in zip(batch["row"], batch["sample"], strict=True):
        row = json.loads(sample)
        data = (Path(images) / row["image"]).read_bytes()
        look(data)
        columns["__key__"].append(shard_format.sample_key(int(number)))
        columns["json"].append(json.dumps({"id": row["id"], "conversations": row["conversations"]}).encode())
        columns["jpg"].append(data)
    return columns


def _open(data: bytes) -> None:
    Image.open(io.BytesIO(data))


def _load(data: bytes) -> None:
    Image.open(io.BytesIO(data)).load()
