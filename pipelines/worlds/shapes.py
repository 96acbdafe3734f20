"""One coloured shape an image, at one of nine places.

Colours, shapes and places are balanced and independent, so that no answer can be guessed from the question or from another
answer: without looking, 1 in 8, 1 in 5 and 1 in 9 are right. For a tower of 48 pixels, 8 to a patch.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from PIL import Image

from pipelines.worlds.drawing import COLOURS, IMAGE_SIZE, OVERSAMPLING, Question, background, paint

SHAPES = ("circle", "square", "triangle", "plus", "ring")
PLACES = ("top left", "top", "top right", "left", "centre", "right", "bottom left", "bottom", "bottom right")
QUESTIONS = {"colour": "What colour is it?", "shape": "What shape is it?", "place": "Where is it?"}


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

    @property
    def questions(self) -> list[Question]:
        """Its colour, shape and place; without kinds, since the question says it."""
        return [Question(text, getattr(self, what)) for what, text in QUESTIONS.items()]

    def render(self, seed: str) -> Image.Image:
        """The picture on a background of its own; size and position vary a little."""
        rng = random.Random(seed)
        canvas = background(rng, IMAGE_SIZE)
        size = IMAGE_SIZE * OVERSAMPLING
        row, column = divmod(PLACES.index(self.place), 3)
        radius = size * rng.uniform(0.145, 0.165)
        # Two patches of the tiny tower (8 of 48 pixels) to a cell, so that a shape falls on the patch grid alike at every
        # place: with the outer places 4 % nearer to the middle, the tower distinguished only half of the shapes after 400
        # steps.
        x, y = (size * ((index + 0.5) / 3 + rng.uniform(-0.02, 0.02)) for index in (column, row))
        paint(canvas, rng, self.shape, self.colour, x, y, radius)
        return canvas


def pictures(num: int, seed: str, heldout: bool) -> list[Scene]:
    """`num` scenes in random order; every combination as often as any other, up to one. Held-out ones differ by the seed."""
    every = [Scene(colour, shape, place) for colour in COLOURS for shape in SHAPES for place in PLACES]
    rng = random.Random(seed)
    chosen: list[Scene] = []
    while len(chosen) < num:
        rng.shuffle(every)
        chosen += every[: num - len(chosen)]
    return chosen
