"""Three or four coloured shapes of several sizes in the corners: what is left of, above, where, which is largest.

No two have the same colour, which names them. Left of means in the same row, above in the same column. Held-out images have
colours that never stand together in training. Without looking, 1 in 7 colours and 1 in 4 shapes are right. For a tower of 48
pixels, 8 to a patch. Kinds: place, left, right, above, below, largest.
"""

from __future__ import annotations

import functools
import itertools
import random

from pipelines.worlds.drawing import COLOURS, PLAIN_SHAPES, Arrangement, Question, Thing

SIDES = {"left": ("left of", 0, -1), "right": ("right of", 0, 1), "above": ("above", -1, 0), "below": ("below", 1, 0)}
"""In words, in rows, in columns."""


def pictures(num: int, seed: str, heldout: bool) -> list[Arrangement]:
    """`num` arrangements. In training each has questions of several kinds; held-out ones have one, each kind in turn."""
    rng, kinds = random.Random(seed), ("place", *SIDES, "largest")
    made: list[Arrangement] = []
    while len(made) < num:
        things = _things(rng, heldout)
        asked = [kinds[len(made) % len(kinds)]] if heldout else ["place", "largest", *rng.sample(list(SIDES), len(SIDES))]
        questions = [question for kind in asked if (question := _question(rng, things, kind))]
        if questions and (heldout or len(questions) > 2):
            caption = ", ".join(f"{_place(thing)} {thing.colour} {thing.shape}" for thing in things)
            made.append(Arrangement(2, things, caption, questions[:4]))
    return made


@functools.cache
def colour_sets(num: int, heldout: bool) -> list[tuple[str, ...]]:
    """Sets of `num` colours of a split, each in every order: a fifth of all are held out."""
    return [
        tuple(list(COLOURS)[index] for index in order)
        for order in itertools.permutations(range(len(COLOURS)), num)
        if (sum(order) % 5 == 0) == heldout
    ]


def _things(rng: random.Random, heldout: bool) -> list[Thing]:
    num = rng.randint(3, 4)
    largest = rng.uniform(0.17, 0.21)
    radii = [largest, *(largest * rng.uniform(0.6, 0.75) for _ in range(num - 1))]
    colours = rng.choice(colour_sets(num, heldout))
    shapes = rng.choices(PLAIN_SHAPES, k=num)
    cells = sorted(rng.sample(range(4), num))
    return [
        Thing(colour, shape, *divmod(cell, 2), radius)
        for colour, shape, cell, radius in zip(colours, shapes, cells, rng.sample(radii, num), strict=True)
    ]


def _place(thing: Thing) -> str:
    return f"{('top', 'bottom')[thing.row]} {('left', 'right')[thing.column]}"


def _question(rng: random.Random, things: list[Thing], kind: str) -> Question | None:
    """A question of that kind with one answer; None if these things allow none."""
    what = rng.choice(("colour", "shape"))
    if kind == "largest":
        return Question(f"What {what} is the largest one?", getattr(max(things, key=lambda t: t.radius), what), kind)
    if kind == "place":
        thing = rng.choice(things)
        return Question(f"What {what} is at the {_place(thing)}?", getattr(thing, what), kind)
    words, down, right = SIDES[kind]
    found = [(a, b) for a in things for b in things if (b.row, b.column) == (a.row + down, a.column + right)]
    if not found:
        return None
    anchor, thing = rng.choice(found)
    return Question(f"What {what} is {words} the {anchor.colour} one?", getattr(thing, what), kind)
