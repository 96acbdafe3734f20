"""Nine shapes on a 3x3 grid, of two colours and two shapes: how many are of a colour, how many of a shape, 0 to 9.

Both counts are uniform, and one tells nothing of the other: without looking, 1 in 10 answers is right. With only two, the most
frequent one is as often the other: of more, whoever counts it without reading the question is right from 4 on. Held-out
images have two colours and two shapes that never stand together in training. For a tower of 48 pixels, 8 to a patch. Kinds:
colour, shape.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from pipelines.worlds.drawing import COLOURS, PLAIN_SHAPES, Arrangement, Question, Thing

GRID, NUM_THINGS = 3, 9


def pictures(num: int, seed: str, heldout: bool) -> list[Arrangement]:
    """`num` arrangements. In training each is asked for a colour and for a shape; held-out ones for either in turn."""
    rng = random.Random(seed)
    return [_arrangement(rng, heldout, number) for number in range(num)]


def is_held_out(colours: Sequence[str], shapes: Sequence[str]) -> bool:
    """Whether two colours and two shapes stand together only in held-out images, as a quarter do."""
    return (sum(map(list(COLOURS).index, colours)) + sum(map(PLAIN_SHAPES.index, shapes))) % 4 == 0


def _arrangement(rng: random.Random, heldout: bool, number: int) -> Arrangement:
    while True:
        colours, shapes = rng.sample(list(COLOURS), 2), rng.sample(PLAIN_SHAPES, 2)
        if is_held_out(colours, shapes) == heldout:
            break
    # The two are dealt out independently, so that one count tells nothing of the other. The first of each is asked for.
    counts = [rng.randint(0, NUM_THINGS) for _ in range(2)]
    dealt = [[int(index >= count) for index in rng.sample(range(NUM_THINGS), NUM_THINGS)] for count in counts]
    things = [
        Thing(colours[colour], shapes[shape], *divmod(cell, GRID), rng.uniform(0.12, 0.15))
        for cell, (colour, shape) in enumerate(zip(*dealt, strict=True))
    ]
    plural = f"{shapes[0]}es" if shapes[0] == "plus" else f"{shapes[0]}s"
    questions = [
        Question(f"How many are {colours[0]}?", str(counts[0]), "colour"),
        Question(f"How many {plural} are there?", str(counts[1]), "shape"),
    ]
    caption = f"{counts[0]} {colours[0]}, {counts[1]} {plural}"
    return Arrangement(GRID, things, caption, questions[number % 2 : number % 2 + 1] if heldout else questions)
