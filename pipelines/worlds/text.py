"""Documents in miniature: one to three lines of a word and a number, in letters of 14 or 7 pixels of height.

A small letter is in one patch, a large one in four. Words are a consonant, a vowel, a consonant; numbers have two digits.
Held-out images have words and numbers that training never shows. Without looking at most 1 in 9 answers is right, even for
who knows the held-out numbers. For a tower of 96 pixels, 8 to a patch (--vision.image-size 96). Kinds: place (what is at the
top), left, right, largest; each with the letters' height, e.g. `left-7`.
"""

from __future__ import annotations

import functools
import random
from dataclasses import dataclass

import numpy as np
from PIL import Image

from pipelines.worlds.drawing import Question, background, written

IMAGE_SIZE = 96
CONSONANTS, VOWELS = "BDKLMRST", "AEIO"
PLACES = ("top", "middle", "bottom")
DOT_PIXELS = (1, 2)
CELL = 8
"""Pixels: places are whole cells, so that letters lie on the patch grid alike (as in shapes)."""


@dataclass(frozen=True, slots=True)
class Line:
    """A word and a number, in the order in which they stand; place: 0 to 2, from the top."""

    items: tuple[str, str]
    place: int
    dot_pixels: int


@dataclass(frozen=True, slots=True)
class Document:
    """Lines of text, and what is asked about them."""

    lines: list[Line]
    questions: list[Question]

    @property
    def caption(self) -> str:
        """Line by line, e.g. `BAD 42, 17 SUN`."""
        return ", ".join(" ".join(line.items) for line in self.lines)

    def render(self, seed: str) -> Image.Image:
        """The picture on a background of its own; a line is somewhere in its third, an item in its half."""
        rng = random.Random(seed)
        canvas = np.array(background(rng, IMAGE_SIZE), dtype=np.float64)
        for line in self.lines:
            y = CELL * (line.place * 4 + rng.randint(0, 3 - line.dot_pixels))
            for column, item in enumerate(line.items):
                # Up to a pixel aside: the last column of dots of a letter's cell is empty.
                ink = np.roll(written(item, line.dot_pixels), rng.randint(0, 1), 1)
                x = CELL * (column * 6 + rng.randint(0, 6 - ink.shape[1] // CELL))
                canvas[y : y + ink.shape[0], x : x + ink.shape[1]][ink] = rng.uniform(225, 255)
        return Image.fromarray(canvas.round().astype(np.uint8))


@functools.cache
def vocabulary(heldout: bool) -> tuple[list[str], list[str]]:
    """Words and numbers of a split: an eighth and a fifth of all are held out, letters and digits alike."""
    words = [
        first + vowel + last
        for i, first in enumerate(CONSONANTS)
        for j, vowel in enumerate(VOWELS)
        for k, last in enumerate(CONSONANTS)
        if ((i + j + k) % 8 == 0) == heldout
    ]
    return words, [str(number) for number in range(10, 100) if (sum(divmod(number, 10)) % 5 == 0) == heldout]


def pictures(num: int, seed: str, heldout: bool) -> list[Document]:
    """`num` documents. In training each has questions of several kinds; held-out ones have one, each kind in turn."""
    rng, kinds = random.Random(seed), ("place", "left", "right", "largest")
    made: list[Document] = []
    for number in range(num):
        asked = [kinds[number % len(kinds)]] if heldout else list(kinds)
        # Two numbers are compared where they are held out: of three among so few, the greatest of all would be too often it.
        count = rng.randint(2, 2 if heldout else 3) if "largest" in asked else rng.randint(1, 3)
        words, numbers = (rng.sample(items, count) for items in vocabulary(heldout))
        places = sorted(rng.sample(range(len(PLACES)), count))
        dot_pixels = rng.choice(DOT_PIXELS)
        lines = [
            Line((word, item) if rng.random() < 0.5 else (item, word), place, dot_pixels)
            for word, item, place in zip(words, numbers, places, strict=True)
        ]
        questions = [_question(rng, lines, kind) for kind in asked]
        made.append(Document(lines, questions))
    return made


def _question(rng: random.Random, lines: list[Line], kind: str) -> Question:
    line = rng.choice(lines)
    left, right = line.items
    text, answer = {
        "left": (f"What is left of {right}?", left),
        "right": (f"What is right of {left}?", right),
        "largest": ("Which number is the largest?", max(item for each in lines for item in each.items if item.isdigit())),
        "place": rng.choice([
            (f"What {'number' if item.isdigit() else 'word'} is at the {PLACES[line.place]}?", item) for item in line.items
        ]),
    }[kind]  # fmt: skip
    return Question(text, answer, f"{kind}-{7 * line.dot_pixels}")
