"""Nine coloured shapes on a 3x3 grid: how many are of a colour, how many of a shape, 0 to 9.

Both counts are uniform, and one tells nothing of the other: without looking, 1 in 10 answers is right. Held-out images have
pairs of colour and shape that training never shows. For a tower of 48 pixels, 8 to a patch. Kinds: colour, shape.
"""

from __future__ import annotations

import random

from pipelines.worlds.drawing import COLOURS, PLAIN_SHAPES, Arrangement, Question, Thing, colour_shape_pairs

GRID, NUM_THINGS = 3, 9


def pictures(num: int, seed: str, heldout: bool) -> list[Arrangement]:
    """`num` arrangements. In training each is asked for a colour and for a shape; held-out ones for either in turn."""
    rng = random.Random(seed)
    return [_arrangement(rng, heldout, number) for number in range(num)]


def _arrangement(rng: random.Random, heldout: bool, number: int) -> Arrangement:
    pairs = colour_shape_pairs(heldout)
    shape = rng.choice(PLAIN_SHAPES)
    colour = rng.choice([own for own, other in pairs if other == shape] if not heldout else list(COLOURS))
    counts = [rng.randint(0, NUM_THINGS) for _ in range(2)]
    # The two are dealt out independently, so that one count tells nothing of the other. A held-out pair's colour decides its
    # shape: there one is dealt out, and the other question is not asked.
    dealt = [[index < count for index in rng.sample(range(NUM_THINGS), NUM_THINGS)] for count in counts]
    looks = []
    for has_colour, has_shape in zip(*dealt, strict=True):
        fits = [(c, s) for c, s in pairs if (c == colour) == has_colour and (s == shape) == has_shape]
        if heldout:
            wanted = (colour, has_colour) if number % 2 == 0 else (shape, has_shape)
            fits = [pair for pair in pairs if (wanted[0] in pair) == wanted[1]]
        looks.append(rng.choice(fits))
    plural = f"{shape}es" if shape == "plus" else f"{shape}s"
    num_coloured, num_shaped = (sum(what in look for look in looks) for what in (colour, shape))
    questions = [
        Question(f"How many are {colour}?", str(num_coloured), "colour"),
        Question(f"How many {plural} are there?", str(num_shaped), "shape"),
    ]
    things = [Thing(*look, *divmod(cell, GRID), rng.uniform(0.12, 0.15)) for cell, look in enumerate(looks)]
    caption = f"{num_coloured} {colour}, {num_shaped} {plural}"
    return Arrangement(GRID, things, caption, questions[number % 2 : number % 2 + 1] if heldout else questions)
