"""Pictures and rows for tools/bench/data.py and tools/gpu_check: JPEGs as large, as wide and as hard to decode as photographs,
in LLaVA's layout.

Flows in: a folder and a number; out: FOLDER/rows.json and FOLDER/images/000000000.jpg ..., the same bytes on every run.
"""

from __future__ import annotations

import io
import json
import multiprocessing
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

WANTED_BYTES = 66_000
"""Bytes of a picture; with its text and tar headers some 68 KB per sample."""
MAX_PICTURES = 256
WORDS = (
    "a",
    "photograph",
    "of",
    "the",
    "man",
    "woman",
    "dog",
    "street",
    "table",
    "with",
    "red",
    "green",
    "two",
    "under",
    "old",
)


def photo(number: int) -> bytes:
    """A JPEG of about 640x480: clouds of several sizes, shapes with sharp edges, and fine noise, as a camera's.

    The quality is the one whose file comes nearest to WANTED_BYTES from below.
    """
    draw = np.random.default_rng(number)
    width, height = ((640, 480), (480, 640), (640, 427), (500, 375))[number % 4]
    canvas = np.zeros((height, width, 3), np.float32)
    for cells, strength in ((3, 70), (9, 45), (30, 25), (110, 18)):
        coarse = Image.fromarray(draw.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        canvas += strength / 128 * (np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.float32) - 128)
    image = Image.fromarray(np.clip(canvas + 128, 0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(image)
    for _ in range(12):
        left, top = int(draw.integers(width)), int(draw.integers(height))
        box = (left, top, left + int(draw.integers(20, 200)), top + int(draw.integers(20, 200)))
        colour = tuple(int(level) for level in draw.integers(0, 256, 3))
        (pen.ellipse if draw.integers(2) else pen.rectangle)(box, fill=colour)
    grain = draw.normal(0, 6, (height, width, 1)).astype(np.float32)
    image = Image.fromarray(np.clip(np.asarray(image, np.float32) + grain, 0, 255).astype(np.uint8))
    low, high, best = 20, 96, b""
    while low <= high:
        quality = (low + high) // 2
        file = io.BytesIO()
        image.save(file, "JPEG", quality=quality)
        if file.tell() <= WANTED_BYTES:
            best, low = file.getvalue(), quality + 1
        else:
            high = quality - 1
    return best


def row(number: int, words: tuple[int, int] = (40, 120)) -> dict[str, object]:
    """A LLaVA row about a picture: a question, and an answer of words[0] to words[1] - 1 words."""
    draw = np.random.default_rng(number)
    answer = " ".join(draw.choice(WORDS, int(draw.integers(*words))))
    turns = [{"from": "human", "value": "<image>\nWhat is in the picture?"}, {"from": "gpt", "value": answer}]
    return {"id": f"photo-{number}", "image": f"{number:09d}.jpg", "conversations": turns}


def write_source(folder: Path, num_samples: int, words: tuple[int, int] = (40, 120)) -> tuple[Path, Path]:
    """The source of a benchmark. `words`: as for `row`. Returns: the annotation file, the folder of images."""
    images, annotations = folder / "images", folder / "rows.json"
    images.mkdir(parents=True, exist_ok=True)
    # A few pictures are enough: readers do not know that they come again.
    with multiprocessing.get_context("spawn").Pool() as pool:
        photos = pool.map(photo, range(min(1 + num_samples // 8, MAX_PICTURES)), chunksize=4)
    for number in range(num_samples):
        (images / f"{number:09d}.jpg").write_bytes(photos[number % len(photos)])
    annotations.write_text(json.dumps([row(number, words) for number in range(num_samples)]))
    return annotations, images
