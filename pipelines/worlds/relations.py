"""Three coloured shapes, one in each row and column: what is at the top left, just left or right of another, largest.

No two have the same colour, which names them. Just left of means in the next column, in whichever row. Held-out images have
colours that never stand together in training. Without looking, 1 in 7 colours and 1 in 4 shapes are right. For a tower of 48
pixels, 8 to a patch. Kinds: place, left, right, largest.
"""

from __future__ import annotations

import functools
import itertools
import operator
import random

from pipelines.worlds.drawing import COLOURS, PLAIN_SHAPES, Arrangement, Question, Thing

NUM_THINGS = 3
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "centre", "right")
SIDES = {"left": -1, "right": 1}
"""By how many columns."""


def pictures(num: int, seed: str, heldout: bool) -> list[Arrangement]:
    """`num` arrangements. In training each has questions of several kinds; held-out ones have one, each kind in turn."""
    rng, kinds = random.Random(seed), ("place", *SIDES, "largest")
    made: list[Arrangement] = []
    for number in range(num):
        things = _things(rng, heldout)
        asked = [kinds[number % len(kinds)]] if heldout else list(kinds)
        caption = ", ".join(f"{_place(each)} {each.colour} {each.shape}" for each in things)
        made.append(Arrangement(NUM_THINGS, things, caption, [_question(rng, things, kind) for kind in asked]))
    return made


@functools.cache
def colour_sets(heldout: bool) -> list[tuple[str, ...]]:
    """Sets of colours of a split, each in every order: a quarter of all are held out.

    By the exclusive or of their numbers, so that in either split each colour stands with nearly all others equally often: by
    their sum, one colour would tell more of the next.
    """
    return [
        tuple(list(COLOURS)[number] for number in order)
        for order in itertools.permutations(range(len(COLOURS)), NUM_THINGS)
        if (functools.reduce(operator.xor, order) in (0, 7)) == heldout
    ]


def _things(rng: random.Random, heldout: bool) -> list[Thing]:
    """From top to bottom."""
    largest = rng.uniform(0.16, 0.17)
    radii = [largest, *(largest * rng.uniform(0.83, 0.87) for _ in range(NUM_THINGS - 1))]
    columns = rng.sample(range(NUM_THINGS), NUM_THINGS)
    looks = zip(rng.choice(colour_sets(heldout)), rng.choices(PLAIN_SHAPES, k=NUM_THINGS), strict=True)
    return [
        Thing(colour, shape, row, column, radius)
        for row, ((colour, shape), column, radius) in enumerate(zip(looks, columns, rng.sample(radii, NUM_THINGS), strict=True))
    ]


def _place(thing: Thing) -> str:
    return f"{ROWS[thing.row]} {COLUMNS[thing.column]}"


def _question(rng: random.Random, things: list[Thing], kind: str) -> Question:
    what, thing = rng.choice(("colour", "shape")), rng.choice(things)
    if kind == "largest":
        thing = max(things, key=lambda each: each.radius)
        told = "the largest one"
    elif kind == "place":
        told = f"at the {_place(thing)}"
    else:
        step, by_column = SIDES[kind], {each.column: each for each in things}
        anchor = by_column[rng.choice([column for column in by_column if column + step in by_column])]
        thing = by_column[anchor.column + step]
        told = f"just {kind} of the {anchor.colour} one"
    return Question(f"What {what} is {told}?", getattr(thing, what), kind)
