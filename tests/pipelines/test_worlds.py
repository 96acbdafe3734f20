"""Worlds are about what is in the image: true, balanced, with combinations that training never shows, and always the same."""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

from himix_megatron.data.text import chat_template
from himix_megatron.data.text.tokenizer import Piece, load_tokenizer
from pipelines.scenes import WORLDS
from pipelines.worlds import counting, relations, text
from pipelines.worlds.drawing import COLOURS, LETTERS, PLAIN_SHAPES, Picture, Question, written
from pipelines.worlds.tokenizer import VOCAB_SIZE, write_tokenizer

NAMES = [name for name in WORLDS if name != "shapes"]


def _asked(pictures: Iterable[Picture]) -> list[Question]:
    return [question for picture in pictures for question in picture.questions]


def _guessed(known: list[Question], asked: list[Question]) -> float:
    """Share answered right by whoever gives each question's most frequent answer."""
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for question in known:
        answers[question.text][question.answer] += 1
    return sum(q.text in answers and answers[q.text].most_common(1)[0][0] == q.answer for q in asked) / len(asked)


def _painted(pixels: np.ndarray, colour: str) -> np.ndarray:
    """Where a shade of a colour is: bool[height, width]."""
    full = np.array(COLOURS[colour], dtype=float)
    shade = (pixels @ full / (full @ full)).clip(0.88, 1)
    return np.asarray(np.abs(pixels - shade[..., None] * full).max(-1) < 3)


@pytest.mark.parametrize(
    ("name", "digest"), [("relations", "4999ddf52ac237fd"), ("counting", "b8625d988d99cdf2"), ("text", "4811a7ee77f61cf5")]
)
def test_a_world_is_the_same_everywhere(name: str, digest: str) -> None:
    found = hashlib.sha256()
    for heldout in (False, True):
        for number, picture in enumerate(WORLDS[name](6, "x", heldout)):
            found.update(repr((picture.caption, picture.questions)).encode())
            found.update(np.asarray(picture.render(f"{number}")).tobytes())
    assert found.hexdigest()[:16] == digest


@pytest.mark.parametrize("name", NAMES)
def test_nobody_can_guess_from_the_question(name: str) -> None:
    """Neither who knows the training set, nor who knows the held-out one; of each kind of answer apart."""
    chances = {"colour": 1 / 7, "shape": 2 / 7, "how": 1 / 10, "number": 1 / 9, "word": 1 / 9}
    train, heldout = WORLDS[name](3000, "train", False), WORLDS[name](3000, "heldout", True)
    for known, asked in ((train[:2000], train[2000:]), (train, heldout), (heldout[:1500], heldout[1500:])):
        by_kind = defaultdict(list)
        for question in _asked(asked):
            words = question.text.lower().split()
            kind = next((word for word in words[:2] if word in chances), "number" if question.answer.isdigit() else "word")
            by_kind[kind].append(question)
        for kind, questions in by_kind.items():
            margin = 4 * (chances[kind] / len(questions)) ** 0.5
            assert _guessed(_asked(known), questions) < chances[kind] + margin, (kind, len(questions))


@pytest.mark.parametrize("name", NAMES)
def test_held_out_questions_are_of_each_kind_alike(name: str) -> None:
    counts = Counter(question.kind.split("-")[0] for question in _asked(WORLDS[name](360, "x", True)))
    assert len(counts) == {"relations": 4, "counting": 1, "text": 4}[name]
    assert len(set(counts.values())) == 1


def test_training_counts_other_colours_and_shapes_together_than_the_held_out_images() -> None:
    seen, kept = (
        {
            (frozenset(thing.colour for thing in each.things), each.things[0].shape)
            for each in counting.pictures(3000, "x", heldout)
        }
        for heldout in (False, True)
    )
    pairs = {(colours, shape) for colours, shape in seen | kept if len(colours) == 2}
    assert not seen & kept & pairs
    assert len(pairs) == math.comb(8, 2) * 4
    assert {colour for colours, _ in kept for colour in colours} == set(COLOURS)
    assert {shape for _, shape in kept} == set(PLAIN_SHAPES)


def test_who_counts_the_most_frequent_without_reading_the_question_is_right_in_half() -> None:
    right = [
        picture.questions[0].answer == str(Counter(thing.colour for thing in picture.things).most_common(1)[0][1])
        for picture in counting.pictures(2000, "x", False)
    ]
    assert sum(right) / len(right) == pytest.approx(0.5, abs=0.05)


def test_training_shows_other_colours_together_than_the_held_out_images() -> None:
    seen, kept = (
        {frozenset(thing.colour for thing in picture.things) for picture in relations.pictures(2000, "x", heldout)}
        for heldout in (False, True)
    )
    assert not seen & kept
    assert len(seen | kept) == math.comb(8, 3)
    assert {colour for each in kept for colour in each} == set(COLOURS)


def test_training_shows_other_lines_than_the_held_out_images_made_of_the_same_words_and_numbers() -> None:
    seen, kept = (
        {tuple(sorted(line.items)) for picture in text.pictures(3000, "x", heldout) for line in picture.lines}
        for heldout in (False, True)
    )
    assert not seen & kept
    for number, word in (zip(*seen, strict=True), zip(*kept, strict=True)):
        assert {*word} == {*text.WORDS}
        assert {*number} == {*text.NUMBERS}


def test_relations_hold_in_the_picture() -> None:
    """By the ink alone: things by their row, and by their column, are each other's neighbours in that order."""
    for number, picture in enumerate(relations.pictures(60, "x", False)):
        pixels = np.asarray(picture.render(f"{number}")).astype(float)
        where = {}
        for thing in picture.things:
            rows, columns = _painted(pixels, thing.colour).nonzero()
            where[thing.colour] = (columns.mean(), rows.mean())
        across, down = (sorted(where, key=lambda colour: where[colour][axis]) for axis in (0, 1))
        shapes = {thing.colour: thing.shape for thing in picture.things}
        for question in picture.questions:
            what, told = re.fullmatch(r"What (colour|shape) is (.*)\?", question.text).groups()  # type: ignore[union-attr]
            if question.kind == "largest":
                colour = max(picture.things, key=lambda thing: thing.radius).colour
            elif question.kind == "place":
                row, column = told.split()[-2:]
                colour = down[relations.ROWS.index(row)]
                assert colour == across[relations.COLUMNS.index(column)]
            else:
                colour = across[across.index(told.split()[-2]) + (1 if question.kind == "right" else -1)]
            assert question.answer == (colour if what == "colour" else shapes[colour])


def test_the_largest_is_clearly_larger_than_the_rest() -> None:
    for picture in relations.pictures(200, "x", False):
        second, largest = sorted(thing.radius for thing in picture.things)[-2:]
        assert second < 0.88 * largest


def test_counts_are_those_of_the_picture() -> None:
    for picture in counting.pictures(40, "x", False):
        (question,) = picture.questions
        painted = _painted(np.asarray(picture.render("x")).astype(float), question.text.split()[-1].rstrip("?"))
        cells = [part for band in np.array_split(painted, 3) for part in np.array_split(band, 3, axis=1)]
        assert sum(cell.sum() > 20 for cell in cells) == int(question.answer)


def test_documents_hold_what_is_asked_and_are_written_as_they_say() -> None:
    for number, picture in enumerate(text.pictures(30, "x", False)):
        pixels = np.asarray(picture.render(f"{number}")).astype(float).min(-1)
        for line in picture.lines:
            for column, item in enumerate(line.items):
                ink = written(item, line.dot_pixels)
                cell = pixels[line.place * 24 :, column * 32 : column * 32 + 32][:16] > 200
                views = np.lib.stride_tricks.sliding_window_view(np.pad(cell, [(0, 0), (0, 1)]), ink.shape)
                assert (views == ink).all((2, 3)).sum() == 1, item
                assert cell.sum() == ink.sum()
        for question in picture.questions:
            words, lines = question.text.rstrip("?").split(), [(text.PLACES[line.place], line.items) for line in picture.lines]
            expected = {
                "side": [items[words[-1] == "right"] for place, items in lines if place == words[-2]],
                "beside": [items[words[2] == "right"] for _, items in lines if items[words[2] == "left"] == words[-1]],
                "largest": [str(max(int(item) for _, items in lines for item in items if item.isdigit()))],
                "place": [
                    item
                    for place, items in lines
                    for item in items
                    if place == words[-1] and item.isdigit() == (words[1] == "number")
                ],
            }[question.kind.split("-")[0]]
            assert [question.answer] == expected


def test_the_tokenizer_has_a_token_for_each_word_and_letter(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    chat_template.check_tokenizer(tokenizer, "tiny")
    assert tokenizer.vocab_size <= VOCAB_SIZE
    for world in WORLDS.values():
        for picture in world(200, "x", False):
            for said in (picture.caption, *(part for each in picture.questions for part in (each.text, each.answer))):
                ids = tokenizer.encode([Piece(said)]).ids
                assert tokenizer.decode(ids) == said
                assert len(ids) == len(re.findall(r" ?[A-Z]?[a-z]+|[A-Z0-9]| |\W", said)), said


def test_letters_are_dots_of_five_by_seven_and_all_differ() -> None:
    drawn = ["".join(" #"[dot] for dot in row) for row in written("K7", 1).astype(int)]
    assert drawn == [
        " #   #   #####  ",
        " #  #        #  ",
        " # #        #   ",
        " ##        #    ",
        " # #      #     ",
        " #  #     #     ",
        " #   #    #     ",
        "                ",
    ]
    assert len({written(letter, 1).tobytes() for letter in LETTERS}) == 36
    assert (written("K7", 2)[::2, 1::2] == written("K7", 1)).all()
