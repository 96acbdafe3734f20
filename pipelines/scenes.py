"""A real image-text set that anybody can make in seconds: one coloured shape an image, at one of nine places.

Written as LLaVA data is: JPEG files, and JSON lists of conversations. `align.json` has captions, `instruct.json` questions
and answers (one or two turns), `heldout.json` one question each about images that training never saw. Colours, shapes and
places are balanced and independent, so that no answer can be guessed from the question or from another answer: without
looking, 1 in 8, 1 in 5 and 1 in 9 are right. Every byte is a function of the settings.

    python -m pipelines.scenes --out data/my-scenes
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import random
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from himix_megatron.config import Count, check_limits
from himix_megatron.data.shards.storage import locked
from himix_megatron.runtime import typed_json
from pipelines import preprocess
from pipelines.cli import parse_settings, run_main

log = logging.getLogger(__name__)

COLOURS = {
    "red": (225, 30, 30),
    "orange": (255, 140, 0),
    "yellow": (250, 235, 20),
    "green": (20, 165, 50),
    "cyan": (0, 220, 230),
    "blue": (35, 60, 230),
    "purple": (150, 30, 200),
    "white": (255, 255, 255),
}
SHAPES = ("circle", "square", "triangle", "plus", "ring")
PLACES = ("top left", "top", "top right", "left", "centre", "right", "bottom left", "bottom", "bottom right")
QUESTIONS = {"colour": "What colour is it?", "shape": "What shape is it?", "place": "Where is it?"}
CAPTION_PROMPT = "What is this?"

FORMAT = 1
"""Changes when the same settings give other bytes."""
IMAGE_SIZE = 64
"""Pixels on a side; the tiny tower resizes to 48."""
OVERSAMPLING = 4
"""Shapes are drawn this much larger and reduced, so that their edges are smooth."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SceneSettings:
    """Settings of a corpus of rendered scenes."""

    num_train: Count = 7200
    """Number of images in the training splits; align and instruct describe the same ones."""
    num_heldout: Count = 360
    """Number of images in the held-out split, one question each."""
    seed: int = 0
    """Seed of all random choices."""

    def __post_init__(self) -> None:
        check_limits(self, "scenes")


@dataclass(frozen=True, slots=True)
class Scene:
    """What is to be seen in one image."""

    colour: str
    shape: str
    place: str

    @property
    def caption(self) -> str:
        """E.g. `a red circle at the top left`; the middle is `in`, not `at`."""
        article = "an" if self.colour[0] in "aeiou" else "a"
        return f"{article} {self.colour} {self.shape} {'in' if self.place == 'centre' else 'at'} the {self.place}"


def scenes(num: int, seed: str) -> list[Scene]:
    """`num` scenes in random order; every combination as often as any other, up to one."""
    every = [Scene(colour, shape, place) for colour in COLOURS for shape in SHAPES for place in PLACES]
    rng = random.Random(seed)
    chosen: list[Scene] = []
    while len(chosen) < num:
        rng.shuffle(every)
        chosen += every[: num - len(chosen)]
    return chosen


def render(scene: Scene, seed: str) -> Image.Image:
    """The picture of a scene on a background of its own; size and position vary a little."""
    rng = random.Random(seed)
    canvas = _background(rng)
    size = IMAGE_SIZE * OVERSAMPLING
    row, column = divmod(PLACES.index(scene.place), 3)
    radius = size * rng.uniform(0.145, 0.165)
    # Two patches of the tiny tower (8 of 48 pixels) to a cell, so that a shape falls on the patch grid alike at every place:
    # with the outer places 4 % nearer to the middle, the tower distinguished only half of the shapes after 400 steps.
    x, y = (size * ((index + 0.5) / 3 + rng.uniform(-0.02, 0.02)) for index in (column, row))
    mask = Image.new("L", (size, size), 0)
    _draw(ImageDraw.Draw(mask), scene.shape, x, y, radius)
    shade = rng.uniform(0.88, 1.0)
    colour = tuple(round(channel * shade) for channel in COLOURS[scene.colour])
    canvas.paste(Image.new("RGB", canvas.size, colour), mask=mask.reduce(OVERSAMPLING))
    return canvas


def _background(rng: random.Random) -> Image.Image:
    """A dark, nearly grey gradient with noise: no colour of a shape."""
    noise = np.random.default_rng(rng.getrandbits(64))
    corners = noise.uniform(35, 115, size=(2, 2, 1)) + noise.uniform(-14, 14, size=(2, 2, 3))
    ramp = np.linspace(0, 1, IMAGE_SIZE)
    across = corners[:, :1] * (1 - ramp[None, :, None]) + corners[:, 1:] * ramp[None, :, None]
    image = across[:1] * (1 - ramp[:, None, None]) + across[1:] * ramp[:, None, None]
    image = image + noise.normal(0, 5, size=image.shape)
    return Image.fromarray(image.clip(0, 255).astype(np.uint8))


def _draw(draw: ImageDraw.ImageDraw, shape: str, x: float, y: float, radius: float) -> None:
    box = (x - radius, y - radius, x + radius, y + radius)
    if shape == "circle":
        draw.ellipse(box, fill=255)
    elif shape == "square":
        side = radius * 0.85
        draw.rectangle((x - side, y - side, x + side, y + side), fill=255)
    elif shape == "triangle":
        draw.polygon([(x, y - radius), (x - radius, y + 0.8 * radius), (x + radius, y + 0.8 * radius)], fill=255)
    elif shape == "plus":
        arm = radius * 0.34
        draw.rectangle((x - radius, y - arm, x + radius, y + arm), fill=255)
        draw.rectangle((x - arm, y - radius, x + arm, y + radius), fill=255)
    else:
        assert shape == "ring", shape
        draw.ellipse(box, outline=255, width=round(radius * 0.42))


def write_corpus(folder: Path, settings: SceneSettings) -> None:
    """Write `images/*.jpg`, `align.json`, `instruct.json` and `heldout.json` into a folder."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    train = _write_images(folder, "train", settings.num_train, settings.seed)
    heldout = _write_images(folder, "heldout", settings.num_heldout, settings.seed)
    rng = random.Random(f"{settings.seed}/questions")
    rows = {
        "align": [_row(name, [(CAPTION_PROMPT, scene.caption)], image_last=rng.random() < 0.5) for name, scene in train],
        "instruct": [_row(name, _turns(scene, rng.sample(list(QUESTIONS), rng.randint(1, 2)))) for name, scene in train],
        # Colour, shape and place in turn: balanced to one.
        "heldout": [
            _row(name, _turns(scene, [list(QUESTIONS)[number % len(QUESTIONS)]]))
            for number, (name, scene) in enumerate(heldout)
        ],
    }
    for split, conversations in rows.items():
        (folder / f"{split}.json").write_text(json.dumps(conversations, indent=1) + "\n")


def _write_images(folder: Path, split: str, num: int, seed: int) -> list[tuple[str, Scene]]:
    """The scenes of a split by image name; chroma is kept at full resolution, since colour is what is asked for."""
    named = [(f"{split}-{number:05d}.jpg", scene) for number, scene in enumerate(scenes(num, f"{seed}/{split}"))]
    for name, scene in named:
        render(scene, f"{seed}/{name}").save(folder / "images" / name, quality=92, subsampling=0)
    return named


def _turns(scene: Scene, asked: list[str]) -> list[tuple[str, str]]:
    return [(QUESTIONS[what], getattr(scene, what)) for what in asked]


def _row(image: str, turns: list[tuple[str, str]], image_last: bool = False) -> dict[str, Any]:
    """One LLaVA conversation; the image mark is at the start or the end of the first question."""
    conversation = []
    for number, (question, answer) in enumerate(turns):
        if number == 0:
            question = f"{question}\n<image>" if image_last else f"<image>\n{question}"
        conversation += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": image.removesuffix(".jpg"), "image": image, "conversations": conversation}


def ensure_scene_data(folder: Path = Path("data/scenes"), settings: SceneSettings | None = None) -> Path:
    """Shard datasets of rendered scenes in `folder`, made on the first call: `align`, `instruct`, `heldout`, and `corpus`.
    Returns: the folder, absolute.

    Any number of processes may call it at once: one renders, the others wait; a killed one leaves nothing that is used.
    Raises: ValueError when the folder holds something else, or scenes of other settings.
    """
    settings = settings or SceneSettings()
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    if not _is_complete(folder, settings):
        with locked(folder.parent, f".{folder.name}.lock"):
            if not _is_complete(folder, settings):  # another process may have made it while we waited
                _make_datasets(folder, settings)
    return folder


def _description(settings: SceneSettings) -> dict[str, int]:
    return {"format": FORMAT, **dataclasses.asdict(settings)}


def _is_complete(folder: Path, settings: SceneSettings) -> bool:
    """Whether the datasets are there. Raises: ValueError when something else is."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    marker = folder / "scenes.json"
    if not marker.is_file():
        raise ValueError(f"{folder} is no folder of rendered scenes (no scenes.json): give another, or delete it")
    found, wanted = typed_json.read(marker), _description(settings)
    if found != wanted:
        raise ValueError(f"{folder} holds scenes made with {found}, wanted {wanted}: give another folder, or delete it")
    return True


def _make_datasets(folder: Path, settings: SceneSettings) -> None:
    """Render and preprocess beside the folder, then rename: what bears the final name is whole."""
    log.info("rendering %d scenes into %s", settings.num_train + settings.num_heldout, folder)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    corpus = partial / "corpus"
    write_corpus(corpus, settings)
    for split in ("align", "instruct", "heldout"):
        # In this process: a few seconds' work, and this may be a rank of a training run that must start no Ray.
        preprocess.preprocess(
            preprocess.Settings(
                annotations=corpus / f"{split}.json",
                images=corpus / "images",
                out=partial / split,
                engine="local",
                num_workers=1,
                max_bad_fraction=0.0,
            )
        )
    (partial / "scenes.json").write_text(json.dumps(_description(settings)) + "\n")
    os.rename(partial, folder)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Command:
    """Write a corpus of rendered scenes: JPEG files and LLaVA JSON."""

    out: Path
    """Folder to write; it must be empty or missing."""
    scenes: SceneSettings = dataclasses.field(default_factory=SceneSettings)


def main() -> None:
    """The command line."""
    command = parse_settings(_Command, sys.argv[1:], "python -m pipelines.scenes", __doc__)
    if command.out.exists() and (not command.out.is_dir() or any(command.out.iterdir())):
        raise ValueError(f"--out {command.out} is there and not empty: choose another folder")
    write_corpus(command.out, command.scenes)
    print(f"{command.out}: {command.scenes.num_train} training and {command.scenes.num_heldout} held-out images")


if __name__ == "__main__":
    run_main(main)
