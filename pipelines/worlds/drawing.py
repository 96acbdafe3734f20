"""What all worlds draw with: a background, coloured shapes, letters and digits of a bitmap font of their own.

Nothing depends on the machine's fonts, and only shapes (ellipses, polygons) on how Pillow fills them.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from PIL import Image, ImageDraw

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
IMAGE_SIZE = 64
"""Pixels on a side of an image with shapes; the tiny tower resizes to 48."""
OVERSAMPLING = 4
"""Shapes are drawn this much larger and reduced, so that their edges are smooth."""
PLAIN_SHAPES = ("square", "triangle", "plus", "ring")
"""Those that stay apart when drawn small."""
LETTERS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"
FONT = (
    "EHJLPHE4C4444EEH1248VV2421HE26AIV22VGU11HE68GUHHEV124888EHHEHHEEHHF12CEHHVHHHUHHUHHUEHGGGHEUHHHHHUVGGUGGVVGGUGGG"
    "EHGNHHFHHHVHHHE44444E72222ICHIKOKIHGGGGGGVHRLLHHHHHPLJHHEHHHHHEUHHUGGGEHHHLIDUHHUKIHFGGE11UV444444HHHHHHEHHHHHA4"
    "HHHLLLAHHA4AHHHHHA444V1248GV"
)
"""5x7 dots for each of LETTERS, row by row: a row is a digit in base 32, its highest bit at the left."""


@dataclass(frozen=True, slots=True)
class Question:
    """What may be asked about a picture."""

    text: str
    answer: str
    kind: str = ""
    """What a report may group by; a part of the row's id."""


class Picture(Protocol):
    """What is to be seen in one image: all of it in a caption, and what can be asked."""

    @property
    def caption(self) -> str: ...
    @property
    def questions(self) -> list[Question]: ...

    def render(self, seed: str) -> Image.Image:
        """The image; the seed varies what no question is about."""


def background(rng: random.Random, size: int) -> Image.Image:
    """A dark, nearly grey gradient with noise: no colour of a shape."""
    noise = np.random.default_rng(rng.getrandbits(64))
    corners = noise.uniform(35, 115, size=(2, 2, 1)) + noise.uniform(-14, 14, size=(2, 2, 3))
    ramp = np.linspace(0, 1, size)
    across = corners[:, :1] * (1 - ramp[None, :, None]) + corners[:, 1:] * ramp[None, :, None]
    image = across[:1] * (1 - ramp[:, None, None]) + across[1:] * ramp[:, None, None]
    image = image + noise.normal(0, 5, size=image.shape)
    return Image.fromarray(image.clip(0, 255).astype(np.uint8))


@dataclass(frozen=True, slots=True)
class Thing:
    """A coloured shape in a cell of a grid; radius: share of the image."""

    colour: str
    shape: str
    row: int
    column: int
    radius: float


@dataclass(frozen=True, slots=True)
class Arrangement:
    """Several shapes on a square grid, and what is told and asked about them."""

    grid: int
    things: list[Thing]
    caption: str
    questions: list[Question]

    def render(self, seed: str) -> Image.Image:
        """The picture on a background of its own; positions vary a little."""
        rng = random.Random(seed)
        canvas, size = background(rng, IMAGE_SIZE), IMAGE_SIZE * OVERSAMPLING
        for thing in self.things:
            x, y = (size * (index + 0.5 + rng.uniform(-0.04, 0.04)) / self.grid for index in (thing.column, thing.row))
            paint(canvas, rng, thing.shape, thing.colour, x, y, size * thing.radius)
        return canvas


def paint(canvas: Image.Image, rng: random.Random, shape: str, colour: str, x: float, y: float, radius: float) -> None:
    """One shape in a shade of its colour. x, y, radius: in 1/OVERSAMPLING pixels."""
    # On a mask of the whole image: on a part of it, Pillow rounds some ellipses otherwise, and shapes would change.
    mask = Image.new("L", (canvas.width * OVERSAMPLING, canvas.height * OVERSAMPLING), 0)
    _draw(ImageDraw.Draw(mask), shape, x, y, radius)
    shade = rng.uniform(0.88, 1.0)
    shaded = tuple(round(channel * shade) for channel in COLOURS[colour])
    canvas.paste(Image.new("RGB", canvas.size, shaded), mask=mask.reduce(OVERSAMPLING))


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


def written(text: str, dot_pixels: int) -> np.ndarray:
    """Capital letters and digits as ink, bool[8 * dot_pixels, 8 * dot_pixels * letters]: one cell of 8x8 dots for each."""
    glyphs = [[int(row, 32) for row in FONT[7 * i : 7 * i + 7]] for i in map(LETTERS.index, text)]
    dots = np.array([[glyph[y] >> (4 - x) & 1 for glyph in glyphs for x in range(5)] for y in range(7)], dtype=bool)
    cells = np.pad(dots.reshape(7, len(text), 5), [(0, 1), (0, 0), (1, 2)]).reshape(8, -1)
    return np.kron(cells, np.ones((dot_pixels, dot_pixels), dtype=bool))
