"""Nine shapes of one kind in two colours, on a 3x3 grid: how many are of a colour, 0 to 9.

Counts are uniform: without looking, 1 in 10 answers is right. With only two colours the most frequent one is as often the
other: of more, whoever counts it without reading the question is right from 4 on. Held-out images have two colours and a shape
that never stand together in training. For a tower of 48 pixels, 8 to a patch. Kind: colour.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from pipelines.worlds.drawing import COLOURS, PLAIN_SHAPES, Arrangement, Question, Thing

GRID, NUM_THINGS = 3, 9


def pictures(num: int, seed: str, heldout: bool) -> list[Arrangement]:
    """`num` arrangements, each with one question."""
    rng = random.Random(seed)
    return [_arrangement(rng, heldout) for _ in range(num)]


def _arrangement(rng: random.Random, heldout: bool) -> Arrangement:
    while True:
        colours, shape = rng.sample(list(COLOURS), 2), rng.choice(PLAIN_SHAPES)
        if _is_held_out(colours, shape) == heldout:
            break
    count = rng.randint(0, NUM_THINGS)
    dealt = rng.sample([colours[index >= count] for index in range(NUM_THINGS)], NUM_THINGS)
    things = [Thing(colour, shape, *divmod(cell, GRID), rng.uniform(0.12, 0.15)) for cell, colour in enumerate(dealt)]
    told, asked = f"{count} {colours[0]}, {NUM_THINGS - count} {colours[1]}", f"How many are {colours[0]}?"
    return Arrangement(GRID, things, told, [Question(asked, str(count), "colour")])


def _is_held_out(colours: Sequence[str], shape: str) -> bool:
    """Whether two colours stand together in this shape only in held-out images, as in a quarter of all ways."""
    return (sum(map(list(COLOURS).index, colours)) + PLAIN_SHAPES.index(shape)) % 4 == 0
