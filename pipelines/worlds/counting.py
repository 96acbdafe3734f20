"""Nine coloured shapes on a 3x3 grid: how many are of a colour, how many of a shape, 0 to 9.

Both counts are uniform, and one tells nothing of the other: without looking, 1 in 10 answers is right. Held-out images have
nine things that never stand together in training. For a tower of 48 pixels, 8 to a patch. Kinds: colour, shape.
"""

from __future__ import annotations

import random
from collections.abc import Iterable

from pipelines.worlds.drawing import COLOURS, PLAIN_SHAPES, Arrangement, Question, Thing

GRID, NUM_THINGS = 3, 9
Look = tuple[str, str]
"""Colour and shape."""


def pictures(num: int, seed: str, heldout: bool) -> list[Arrangement]:
    """`num` arrangements. In training each is asked for a colour and for a shape; held-out ones for either in turn."""
    rng = random.Random(seed)
    return [_arrangement(rng, heldout, number) for number in range(num)]


def is_held_out(looks: list[Look]) -> bool:
    """Whether these things are of a held-out image, as a quarter are.

    By a sum over all of them: pairs of colour and shape that training lacks teach a model that they do not exist.
    """
    return sum(list(COLOURS).index(colour) + PLAIN_SHAPES.index(shape) for colour, shape in looks) % 4 == 0


def _arrangement(rng: random.Random, heldout: bool, number: int) -> Arrangement:
    counts = [rng.randint(0, NUM_THINGS) for _ in range(2)]
    while True:
        colour, shape = rng.choice(list(COLOURS)), rng.choice(PLAIN_SHAPES)
        # The two are dealt out independently, so that one count tells nothing of the other.
        dealt = [[index < count for index in rng.sample(range(NUM_THINGS), NUM_THINGS)] for count in counts]
        looks = [(_one_of(rng, COLOURS, colour, c), _one_of(rng, PLAIN_SHAPES, shape, s)) for c, s in zip(*dealt, strict=True)]
        if is_held_out(looks) == heldout:
            break
    plural = f"{shape}es" if shape == "plus" else f"{shape}s"
    questions = [
        Question(f"How many are {colour}?", str(counts[0]), "colour"),
        Question(f"How many {plural} are there?", str(counts[1]), "shape"),
    ]
    things = [Thing(*look, *divmod(cell, GRID), rng.uniform(0.12, 0.15)) for cell, look in enumerate(looks)]
    caption = f"{counts[0]} {colour}, {counts[1]} {plural}"
    return Arrangement(GRID, things, caption, questions[number % 2 : number % 2 + 1] if heldout else questions)


def _one_of(rng: random.Random, names: Iterable[str], name: str, wanted: bool) -> str:
    return name if wanted else rng.choice([other for other in names if other != name])
