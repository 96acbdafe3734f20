"""Ten to sixteen coloured shapes on a 4x4 grid: how many are of a colour, how many of a shape, 0 to 9.

Both counts are uniform, whatever is asked and however many there are: without looking, 1 in 10 answers is right. Held-out
images have pairs of colour and shape that training never shows. For a tower of 64 pixels, 8 to a patch
(--vision.image-size 64). Kinds: colour, shape.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from PIL import Image

from pipelines.worlds.drawing import COLOURS, OVERSAMPLING, PLAIN_SHAPES, Question, background, colour_shape_pairs, paint

IMAGE_SIZE = 64
CELLS, MAX_COUNT = 16, 9


@dataclass(frozen=True, slots=True)
class Crowd:
    """Pairs of colour and shape by cell, and what is told and asked about them."""

    things: dict[int, tuple[str, str]]
    caption: str
    questions: list[Question]

    def render(self, seed: str) -> Image.Image:
        """The picture on a background of its own; sizes and positions vary a little."""
        rng = random.Random(seed)
        canvas, size = background(rng, IMAGE_SIZE), IMAGE_SIZE * OVERSAMPLING
        for cell, (colour, shape) in self.things.items():
            row, column = divmod(cell, 4)
            x, y = (size * ((index + 0.5) / 4 + rng.uniform(-0.01, 0.01)) for index in (column, row))
            paint(canvas, rng, shape, colour, x, y, size * rng.uniform(0.095, 0.11))
        return canvas


def pictures(num: int, seed: str, heldout: bool) -> list[Crowd]:
    """`num` crowds. In training each has a question about a colour and one about a shape; held-out ones have either in turn."""
    rng = random.Random(seed)
    return [_crowd(rng, heldout, number) for number in range(num)]


def _crowd(rng: random.Random, heldout: bool, number: int) -> Crowd:
    pairs = colour_shape_pairs(heldout)
    shape = rng.choice(PLAIN_SHAPES)
    colour = rng.choice([own for own, other in pairs if other == shape] if not heldout else list(COLOURS))
    total = rng.randint(MAX_COUNT + 1, CELLS)
    counts = [rng.randint(0, MAX_COUNT) for _ in range(2)]
    # The two are dealt out independently, so that one count tells nothing of the other. A held-out pair's colour decides its
    # shape: there one is dealt out, and the other question is not asked.
    dealt = [[index < count for index in rng.sample(range(total), total)] for count in counts]
    things = []
    for has_colour, has_shape in zip(*dealt, strict=True):
        fits = [(c, s) for c, s in pairs if (c == colour) == has_colour and (s == shape) == has_shape]
        if heldout:
            wanted = (colour, has_colour) if number % 2 == 0 else (shape, has_shape)
            fits = [pair for pair in pairs if (wanted[0] in pair) == wanted[1]]
        things.append(rng.choice(fits))
    plural = f"{shape}es" if shape == "plus" else f"{shape}s"
    num_coloured, num_shaped = (sum(what in thing for thing in things) for what in (colour, shape))
    questions = [
        Question(f"How many are {colour}?", str(num_coloured), "colour"),
        Question(f"How many {plural} are there?", str(num_shaped), "shape"),
    ]
    cells = sorted(rng.sample(range(CELLS), total))
    caption = f"{num_coloured} {colour}, {num_shaped} {plural}"
    return Crowd(
        dict(zip(cells, things, strict=True)), caption, questions[number % 2 : number % 2 + 1] if heldout else questions
    )
