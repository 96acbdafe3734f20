"""Small datasets for tests: pictures drawn here, rows in LLaVA's layout, shards made in this process."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from himix_megatron.config import DataConfig, TrainConfig, VisionConfig
from himix_megatron.data.shards.reader import ShardDataset
from pipelines.preprocess import Settings, preprocess
from tests.support import ROOT

EMOJI = ROOT / "tests" / "data" / "emoji"


def picture(seed: int = 0, size: tuple[int, int] = (40, 30), mode: str = "RGB") -> Image.Image:
    """A smooth random picture (noise would hide what a resize does)."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 4), dtype=np.uint8)
    image = Image.fromarray(coarse, "RGBA").resize(size, Image.Resampling.BICUBIC)
    return image.convert(mode)


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    """The file of a picture."""
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def row(i: int, image: str | list[str] | None, *turns: str, marks: int | None = None) -> dict[str, Any]:
    """A LLaVA row; `turns` are question, answer, question, answer ..."""
    number = marks if marks is not None else 0 if image is None else 1 if isinstance(image, str) else len(image)
    values = list(turns or (f"What is number {i}?", f"It is {i}."))
    values[0] = "<image>\n" * number + values[0]
    said = [{"from": ("human", "gpt")[n % 2], "value": value} for n, value in enumerate(values)]
    return {"id": f"row-{i}", **({} if image is None else {"image": image}), "conversations": said}


def mixed_source(folder: Path, num_rows: int = 24, sizes: Sequence[tuple[int, int]] = ((40, 30),)) -> tuple[Path, Path]:
    """JPEG and PNG pictures of `sizes` in turn; text-only rows and rows of two pictures among those of one.

    Returns: annotations, images.
    """
    images = folder / "images"
    images.mkdir(parents=True)
    rows = []
    for i in range(num_rows):
        form, suffix = (("JPEG", "jpg"), ("PNG", "png"))[i % 2]
        (images / f"{i}.{suffix}").write_bytes(encoded(picture(i, sizes[i % len(sizes)]), form))
        if i % 6 == 3:
            rows.append(row(i, None))
        elif i % 6 == 4:
            rows.append(row(i, [f"{i}.{suffix}", "0.jpg"]))
        else:
            rows.append(row(i, f"{i}.{suffix}"))
    annotations = folder / "rows.json"
    annotations.write_text(json.dumps(rows))
    return annotations, images


def make(folder: Path, annotations: Path, images: Path, **options: Any) -> ShardDataset:
    """Preprocess in this process."""
    options = {"engine": "local", "num_workers": 1, "samples_per_shard": 10, **options}
    preprocess(Settings(annotations=annotations, images=images, out=folder, **options))
    return ShardDataset(folder)


def mixed(folder: Path, num_rows: int = 24, **options: Any) -> ShardDataset:
    """`mixed_source`, preprocessed."""
    return make(folder / "shards", *mixed_source(folder, num_rows, **options))


VISION = VisionConfig(
    tower="tiny",
    image_size=16,
    patch_size=8,
    hidden_size=8,
    num_layers=1,
    num_attention_heads=1,
    ffn_hidden_size=8,
    feature_layer=-1,
)


def data_config(**changes: Any) -> DataConfig:
    """The tiny template on bytes."""
    return DataConfig(**{"template": "tiny", "max_text_tokens": 64, **changes})


def train_config(**changes: Any) -> TrainConfig:
    """Steps of 8 samples in micro-batches of 2."""
    values = {
        "trainable_parts": ("vision_kv",),
        "global_batch_samples": 8,
        "micro_batch_samples": 2,
        "precision": "fp32",
        **changes,
    }
    return TrainConfig(**values)
