"""Small real datasets for tests, made by the project's own preprocessing."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

COLOURS = {"red": (220, 30, 30), "green": (30, 170, 60), "blue": (40, 60, 220), "white": (240, 240, 240), "black": (10, 10, 10)}


SHAPES = ((20, 20), (16, 40), (9, 8), (48, 16), (70, 11), (32, 32), (5, 30))
"""(width, height) of images of different numbers of tokens."""


def make_mixed_dataset(folder: Path, num_samples: int = 40, sizes: Sequence[tuple[int, int]] = ((20, 20),)) -> Path:
    """Samples of one plain-coloured image, of two, and of none, in turn; the answers name the colours.

    `sizes`: (width, height) of the images, in turn.
    """
    from pipelines.preprocess import Settings, preprocess

    draw = random.Random(7)
    images = folder / "images"
    images.mkdir(parents=True)
    rows, size = [], itertools.cycle(sizes)
    for number in range(num_samples):
        names = draw.sample(sorted(COLOURS), (1, 1, 2, 0)[number % 4])
        files = []
        for k, name in enumerate(names):
            files.append(f"{number}-{k}.png")
            Image.new("RGB", next(size), COLOURS[name]).save(images / files[-1])
        question = "<image>\n" * len(names) + ("Which colour?" if names else f"Say {number}.")
        answer = " and ".join(names) or str(number)
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        rows.append(
            {"id": str(number), "image": files, "conversations": turns}
            if files
            else {"id": str(number), "conversations": turns}
        )
    (folder / "mixed.json").write_text(json.dumps(rows))
    preprocess(
        Settings(
            annotations=folder / "mixed.json",
            images=images,
            out=folder / "shards",
            engine="local",
            samples_per_shard=16,
            num_workers=1,
        )
    )
    return folder / "shards"
