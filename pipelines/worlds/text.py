"""Documents in miniature: two lines of a word and a number, in letters of 14 or 7 pixels of height.

A small letter is in one patch, a large one in four. Words are a consonant and a vowel in either order; numbers have two digits.
Held-out images have lines, a word beside a number, that training never shows. Without looking, at most 1 in 9 answers is
right. For a tower of 64 pixels, 8 to a patch (--vision.image-size 64). Kinds: place (at the top), side (at the top left),
beside (left of another), largest; each with the letters' height, e.g. `side-7`.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass

import numpy as np
from PIL import Image

from pipelines.worlds.drawing import IMAGE_SIZE, Question, background, written

CONSONANTS, VOWELS = "BDKLMRST", "AEIO"
PLACES = ("top", "middle", "bottom")
NUM_LINES = 2
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
        """Line by line, e.g. `top BA 42, bottom 17 OS`."""
        return ", ".join(" ".join((PLACES[line.place], *line.items)) for line in self.lines)

    def render(self, seed: str) -> Image.Image:
        """The picture on a background of its own; small items begin in the first or second cell of their half."""
        rng = random.Random(seed)
        canvas = np.array(background(rng, IMAGE_SIZE), dtype=np.float64)
        for line in self.lines:
            y = CELL * line.place * 3
            for column, item in enumerate(line.items):
                # Up to a pixel aside: the last column of dots of a letter's cell is empty.
                ink = np.roll(written(item, line.dot_pixels), rng.randint(0, 1), 1)
                x = CELL * (column * 4 + rng.randint(0, 2 - line.dot_pixels))
                canvas[y : y + ink.shape[0], x : x + ink.shape[1]][ink] = rng.uniform(225, 255)
        return Image.fromarray(canvas.round().astype(np.uint8))


WORDS = [word for pair in itertools.product(CONSONANTS, VOWELS) for word in ("".join(pair), "".join(reversed(pair)))]
NUMBERS = [str(number) for number in range(10, 100)]


def is_heldout(word: str, number: str) -> bool:
    """Whether training never shows the two in one line; so are a fifth of all pairs."""
    return (WORDS.index(word) + NUMBERS.index(number)) % 5 == 0


def pictures(num: int, seed: str, heldout: bool) -> list[Document]:
    """`num` documents. In training each has questions of several kinds; held-out ones have one, each kind in turn."""
    rng, kinds = random.Random(seed), ("place", "side", "beside", "largest")
    made: list[Document] = []
    for number in range(num):
        asked = [kinds[number % len(kinds)]] if heldout else list(kinds)
        words, numbers = _items(rng, heldout)
        places = sorted(rng.sample(range(len(PLACES)), NUM_LINES))
        dot_pixels = rng.choice(DOT_PIXELS)
        lines = [
            Line((word, item) if rng.random() < 0.5 else (item, word), place, dot_pixels)
            for word, item, place in zip(words, numbers, places, strict=True)
        ]
        questions = [_question(rng, lines, kind) for kind in asked]
        made.append(Document(lines, questions))
    return made


def _items(rng: random.Random, heldout: bool) -> tuple[list[str], list[str]]:
    """Words and numbers of the lines; no letter or digit is in two of them, so that each one tells lines apart."""
    while True:
        words, numbers = rng.sample(WORDS, NUM_LINES), rng.sample(NUMBERS, NUM_LINES)
        apart = all(len(set("".join(items))) == sum(len(set(item)) for item in items) for items in (words, numbers))
        if apart and all(is_heldout(*pair) == heldout for pair in zip(words, numbers, strict=True)):
            return words, numbers


def _question(rng: random.Random, lines: list[Line], kind: str) -> Question:
    line, side = rng.choice(lines), rng.choice(("left", "right"))
    item, other = line.items if side == "left" else line.items[::-1]
    text, answer = {
        "side": (f"What is at the {PLACES[line.place]} {side}?", item),
        "beside": (f"What is {side} of {other}?", item),
        "largest": ("Which number is the largest?", max(each for line in lines for each in line.items if each.isdigit())),
        "place": (f"What {'number' if item.isdigit() else 'word'} is at the {PLACES[line.place]}?", item),
    }[kind]  # fmt: skip
    return Question(text, answer, f"{kind}-{7 * line.dot_pixels}")
