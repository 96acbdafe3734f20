"""Samples with their pictures and texts, and histograms, on one picture: what `python -m tools.inspect_shards --sheet` draws.

Fonts are those of the machine, and Pillow's own where there are none. Each line of text takes the font that lacks the fewest of
its characters; what none has appears as a box.
"""

from __future__ import annotations

import functools
from bisect import bisect_right
from dataclasses import dataclass
from math import ceil
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from himix_megatron.data.errors import BadSampleError
from himix_megatron.data.images import image_file
from himix_megatron.data.shards.reader import ShardDataset
from tools.inspect_shards.histogram import Bar

COLUMNS = 4
CARD, GAP, PAD = 320, 20, 14
"""Width of a card, between cards, and inside of one; pixels."""
PICTURE_HEIGHT = 220
TEXT_SIZE, SMALL_SIZE, TITLE_SIZE = 14, 12, 24
LINE = 19
MOST_LINES = 14
"""Most lines of text on a card."""
PAPER, WHITE, INK, FAINT, RULE = "#f3f4f6", "#ffffff", "#1f2937", "#6b7280", "#e5e7eb"
HUMAN, ANSWER, DAMAGE, BAR = "#1d4ed8", "#047857", "#b91c1c", "#60a5fa"

# Of Linux, macOS and Windows; the later ones for writing systems that the first lack.
FONTS = (
    *("DejaVuSans.ttf", "NotoSans-Regular.ttf", "LiberationSans-Regular.ttf", "Arial.ttf", "Helvetica.ttc"),
    *("NotoSansCJK-Regular.ttc", "wqy-zenhei.ttc", "DroidSansFallbackFull.ttf", "Arial Unicode.ttf", "msyh.ttc"),
    *("NotoSansArabic-Regular.ttf", "NotoSansDevanagari-Regular.ttf", "NotoEmoji-Regular.ttf", "Symbola.ttf"),
)
Font = ImageFont.FreeTypeFont


@dataclass(frozen=True, slots=True)
class Chart:
    """One histogram of the sheet."""

    title: str
    note: str
    bars: list[Bar]


def sheet(dataset: ShardDataset, samples: list[int], title: str, note: str, charts: list[Chart]) -> Image.Image:
    """The whole picture, RGB: title, cards of these samples in rows, histograms below. Damaged samples say so."""
    cards = [_card(dataset, i) for i in samples]
    rows = [cards[start : start + COLUMNS] for start in range(0, len(cards), COLUMNS)]
    rows += [[_chart(chart) for chart in charts[start : start + COLUMNS]] for start in range(0, len(charts), COLUMNS)]
    heights = [max(card.height for card in row) for row in rows]
    top = GAP + TITLE_SIZE + SMALL_SIZE + 26
    whole = Image.new("RGB", (GAP + COLUMNS * (CARD + GAP), top + sum(height + GAP for height in heights)), PAPER)
    draw = ImageDraw.Draw(whole)
    _write(draw, GAP, GAP, title, INK, TITLE_SIZE)
    _write(draw, GAP, GAP + TITLE_SIZE + 10, note, FAINT, SMALL_SIZE)
    for row, height in zip(rows, heights, strict=True):
        for column, card in enumerate(row):
            left = GAP + column * (CARD + GAP)
            draw.rounded_rectangle((left, top, left + CARD - 1, top + height - 1), 8, WHITE, RULE)
            whole.paste(card, (left, top), _corners(card.size))
        top += height + GAP
    return whole


def _card(dataset: ShardDataset, i: int) -> Image.Image:
    """One sample: its pictures side by side, its key, who says what."""
    lines: list[tuple[str, str]] = []
    try:
        pictures: list[Image.Image | None] = [_picture(dataset, i, k) for k in range(dataset.num_images(i))]
        for turn in dataset.text(i)["conversations"]:
            lines += _said(turn)
    except BadSampleError as error:
        pictures, lines = [], [(line, DAMAGE) for line in _wrapped(str(error), CARD - 2 * PAD)]
    if len(lines) > MOST_LINES:
        lines = [*lines[: MOST_LINES - 1], ("…", FAINT)]
    card = Image.new("RGB", (CARD, PICTURE_HEIGHT + PAD + SMALL_SIZE + 10 + LINE * len(lines) + PAD), WHITE)
    draw = ImageDraw.Draw(card)
    draw.rectangle((0, 0, CARD, PICTURE_HEIGHT), PAPER)
    if not pictures:
        _write(draw, PAD, PICTURE_HEIGHT // 2 - LINE // 2, "no picture", FAINT, TEXT_SIZE)
    width = CARD // max(1, len(pictures))
    for k, picture in enumerate(pictures):
        assert picture is not None
        picture.thumbnail((width - 8, PICTURE_HEIGHT - 8))
        card.paste(picture, (k * width + (width - picture.width) // 2, (PICTURE_HEIGHT - picture.height) // 2))
    sizes = ", ".join("×".join(map(str, dataset.image_size(i, k))) for k in range(dataset.num_images(i)))
    _write(draw, PAD, PICTURE_HEIGHT + PAD, f"{dataset.key(i)}  {sizes}", FAINT, SMALL_SIZE)
    for number, (line, colour) in enumerate(lines):
        _write(draw, PAD, PICTURE_HEIGHT + PAD + SMALL_SIZE + 10 + LINE * number, line, colour, TEXT_SIZE)
    return card


def _picture(dataset: ShardDataset, i: int, k: int) -> Image.Image:
    return image_file.to_rgb(image_file.open_image(dataset.image_bytes(i, k)))


def _said(turn: dict[str, Any]) -> list[tuple[str, str]]:
    """A turn's lines with their colour; `<image>` marks are left where they are."""
    colour = HUMAN if turn["from"] == "human" else ANSWER
    return [(line, colour) for line in _wrapped(" ".join(str(turn["value"]).split()), CARD - 2 * PAD)]


def _chart(chart: Chart) -> Image.Image:
    """One histogram as a card."""
    line = 17
    card = Image.new("RGB", (CARD, PAD + 2 * LINE + 6 + line * max(1, len(chart.bars)) + PAD), WHITE)
    draw = ImageDraw.Draw(card)
    _write(draw, PAD, PAD, chart.title, INK, TEXT_SIZE)
    _write(draw, PAD, PAD + LINE, chart.note, FAINT, SMALL_SIZE)
    largest = max((bar.count for bar in chart.bars), default=0) or 1
    labels = max((_length(bar.label, SMALL_SIZE) for bar in chart.bars), default=0)
    counts = max((_length(f"{bar.count:,}", SMALL_SIZE) for bar in chart.bars), default=0)
    left = PAD + labels + 8
    room = CARD - PAD - left - counts - 8
    for number, bar in enumerate(chart.bars):
        y = PAD + 2 * LINE + 6 + line * number
        _write(draw, int(PAD + labels - _length(bar.label, SMALL_SIZE)), y, bar.label, FAINT, SMALL_SIZE)
        if bar.count:
            draw.rectangle((left, y + 1, left + max(1, room * bar.count / largest), y + line - 5), BAR)
        _write(draw, int(left + room * bar.count / largest + 6), y, f"{bar.count:,}", INK, SMALL_SIZE)
    return card


def _corners(size: tuple[int, int]) -> Image.Image:
    """A mask that leaves out a card's border."""
    mask = Image.new("L", size, 0)
    ImageDraw.Draw(mask).rounded_rectangle((1, 1, size[0] - 2, size[1] - 1), 7, 255)
    return mask


# ---- text ----------------------------------------------------------------------------------------------------------


@functools.cache
def _fonts(size: int) -> list[Font]:
    found = []
    for name in FONTS:
        try:
            found.append(ImageFont.truetype(name, size))
        except OSError:
            continue
    own = ImageFont.load_default(size)
    return [*found, *([own] if isinstance(own, Font) else [])]


@functools.cache
def _has(size: int, number: int, character: str) -> bool:
    """Whether a font has a character: one it lacks looks like one that nobody has."""
    font = _fonts(size)[number]
    return character.isspace() or bytes(font.getmask(character)) != bytes(font.getmask("\U0010fffe"))


@functools.lru_cache(4096)
def _font(text: str, size: int) -> Font:
    """The first font that lacks the fewest characters of a text."""
    fonts = _fonts(size)
    return fonts[min(range(len(fonts)), key=lambda number: sum(not _has(size, number, c) for c in set(text)))]


def _length(text: str, size: int) -> float:
    return _font(text, size).getlength(text)


def _start_length(text: str, num_characters: int) -> int:
    """Pixels of the first characters, rounded up."""
    return ceil(_length(text[:num_characters], TEXT_SIZE))


def _write(draw: ImageDraw.ImageDraw, x: int, y: int, text: str, colour: str, size: int) -> None:
    draw.text((x, y), text, fill=colour, font=_font(text, size))


def _wrapped(text: str, width: int) -> list[str]:
    """Lines no wider than this, broken at spaces, and inside of words that are wider; as many as a card may show, and one."""
    lines, line = [], ""
    text = "".join(c if c.isprintable() else "�" for c in text[: MOST_LINES * width])  # no character is narrower than a pixel
    for word in text.split(" "):
        if line and _length(f"{line} {word}", TEXT_SIZE) > width:
            lines.append(line)
            line = ""
        line = f"{line} {word}" if line else word
        while _length(line, TEXT_SIZE) > width:
            fits = max(1, bisect_right(range(len(line)), width, key=functools.partial(_start_length, line)) - 1)
            lines.append(line[:fits])
            line = line[fits:]
        if len(lines) > MOST_LINES:
            break
    return [*lines, line]
