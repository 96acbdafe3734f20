"""Two to four coloured shapes of several sizes in the corners: what is left of, above, where, which is largest.

No two have the same colour, which names them. Left of means in the same row, above in the same column. Held-out images have
pairs of colour and shape that training never shows; of what is asked, the question names neither. Without looking, at most 1
in 7 colours and 2 in 7 shapes are right. For a tower of 48 pixels, 8 to a patch. Kinds: place, left, right, above, below,
largest.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from PIL import Image

from pipelines.worlds.drawing import COLOURS, OVERSAMPLING, Question, background, colour_shape_pairs, paint

IMAGE_SIZE = 64
PLACES = ("at the top left", "at the top right", "at the bottom left", "at the bottom right")
SIDES = {"left": "left of", "right": "right of", "above": "above", "below": "below"}


@dataclass(frozen=True, slots=True)
class Thing:
    """One shape; place: 0 to 3, row by row; radius: share of the image."""

    colour: str
    shape: str
    place: int
    radius: float


def beside(things: list[Thing], side: str, anchor: Thing) -> Thing | None:
    """What stands on a side of another thing, in its row or column."""
    place = anchor.place ^ (1 if side in ("left", "right") else 2)
    right_of_it = place > anchor.place
    return next((t for t in things if t.place == place and right_of_it == (side in ("right", "below"))), None)


@dataclass(frozen=True, slots=True)
class Arrangement:
    """Several shapes, and what is asked about them."""

    things: list[Thing]
    questions: list[Question]

    @property
    def caption(self) -> str:
        """Row by row, e.g. `red ring at the top left, white plus at the bottom left`."""
        return ", ".join(f"{thing.colour} {thing.shape} {PLACES[thing.place]}" for thing in self.things)

    def render(self, seed: str) -> Image.Image:
        """The picture on a background of its own; positions vary a little."""
        rng = random.Random(seed)
        canvas, size = background(rng, IMAGE_SIZE), IMAGE_SIZE * OVERSAMPLING
        for thing in self.things:
            row, column = divmod(thing.place, 2)
            x, y = (size * ((index + 0.5) / 2 + rng.uniform(-0.02, 0.02)) for index in (column, row))
            paint(canvas, rng, thing.shape, thing.colour, x, y, size * thing.radius)
        return canvas


def pictures(num: int, seed: str, heldout: bool) -> list[Arrangement]:
    """`num` arrangements. In training each has questions of several kinds; held-out ones have one, each kind in turn."""
    rng, kinds = random.Random(seed), ("place", *SIDES, "largest")
    made: list[Arrangement] = []
    while len(made) < num:
        things = _things(rng, heldout)
        asked = [kinds[len(made) % len(kinds)]] if heldout else ["place", "largest", *rng.sample(list(SIDES), len(SIDES))]
        questions = [question for kind in asked if (question := _question(rng, things, kind))]
        if questions and (heldout or len(questions) > 2):
            made.append(Arrangement(things, questions[:4]))
    return made


def _things(rng: random.Random, heldout: bool) -> list[Thing]:
    pairs, num = colour_shape_pairs(heldout), rng.randint(2, len(PLACES))
    largest = rng.uniform(0.17, 0.21)
    radii = [largest, *(largest * rng.uniform(0.6, 0.75) for _ in range(num - 1))]
    colours = rng.sample(list(COLOURS), num)
    shapes = [rng.choice([shape for own, shape in pairs if own == colour]) for colour in colours]
    places = sorted(rng.sample(range(len(PLACES)), num))
    return [Thing(*thing) for thing in zip(colours, shapes, places, rng.sample(radii, num), strict=True)]


def _question(rng: random.Random, things: list[Thing], kind: str) -> Question | None:
    """A question of that kind with one answer; None if these things allow none."""
    what = rng.choice(("colour", "shape"))
    if kind == "largest":
        return Question(f"What {what} is the largest one?", getattr(max(things, key=lambda t: t.radius), what), kind)
    if kind == "place":
        thing = rng.choice(things)
        return Question(f"What {what} is {PLACES[thing.place]}?", getattr(thing, what), kind)
    found = [(anchor, thing) for anchor in things if (thing := beside(things, kind, anchor))]
    if not found:
        return None
    anchor, thing = rng.choice(found)
    return Question(f"What {what} is {SIDES[kind]} the {anchor.colour} one?", getattr(thing, what), kind)
