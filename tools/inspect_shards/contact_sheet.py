"""Samples with their pictures and texts, and histograms, on one page: what `python -m tools.inspect_shards --sheet` draws.

Fonts are those of the machine; a character that none of them has appears as a box.
"""

from __future__ import annotations

import unicodedata
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from himix_megatron.data.errors import BadSampleError
from himix_megatron.data.images import image_file
from himix_megatron.data.shards.reader import ShardDataset
from tools.inspect_shards.histogram import Bar

COLUMNS = 4
WIDTH, GAP, PICTURE_HEIGHT, LINE = 3.2, 0.2, 2.2, 0.17
"""Width of a cell, distance of cells, height of a cell's pictures and of a text line, in inches."""
LINE_WIDTH = 44
"""Characters of a text line; wide ones (CJK, emoji) count twice."""
MOST_LINES = 14
"""Most text lines of a sample."""
INK, FAINT, HUMAN, ANSWER, DAMAGE, BAR = "#1f2937", "#6b7280", "#1d4ed8", "#047857", "#b91c1c", "#60a5fa"
# Of Linux, macOS and Windows; the later ones for writing systems that the first lack.
FONTS = (
    *("DejaVu Sans", "Noto Sans", "Liberation Sans", "Arial", "Helvetica", "Noto Sans CJK SC", "WenQuanYi Zen Hei"),
    *("Droid Sans Fallback", "Arial Unicode MS", "Microsoft YaHei", "Noto Sans Arabic", "Noto Sans Devanagari", "Symbola"),
)


@dataclass(frozen=True, slots=True)
class Chart:
    """One histogram of the sheet."""

    title: str
    note: str
    bars: list[Bar]


@dataclass(slots=True)
class _Cell:
    """One sample or chart: what is drawn on top, and (text, colour) of the lines below."""

    lines: list[tuple[str, str]]
    pictures: list[Any] = field(default_factory=list)
    colour: str = "#f3f4f6"
    """Behind the pictures."""
    bars: list[Bar] = field(default_factory=list)


def sheet(path: Path, dataset: ShardDataset, samples: list[int], title: str, note: str, charts: list[Chart]) -> None:
    """Write a PNG: title, cells of these samples in rows, histograms below. Damaged samples show the error on red."""
    import matplotlib
    from matplotlib import font_manager
    from matplotlib.figure import Figure

    cells = [_sample(dataset, i) for i in samples]
    histograms = [_Cell([(chart.title, INK), (chart.note, FAINT)], bars=chart.bars) for chart in charts]
    rows = [some[first : first + COLUMNS] for some in (cells, histograms) for first in range(0, len(some), COLUMNS)]
    heights = [PICTURE_HEIGHT + LINE * (1 + max(len(cell.lines) for cell in row)) + GAP for row in rows]
    width, height = GAP + COLUMNS * (WIDTH + GAP), sum(heights) + 4 * GAP
    known = {font.name for font in font_manager.fontManager.ttflist}
    with (
        matplotlib.rc_context({"font.family": [name for name in FONTS if name in known], "font.size": 8}),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # one for every character that no font has
        figure, top = Figure((width, height)), height - GAP
        figure.text(GAP / width, top / height, title, color=INK, size=16, va="top", parse_math=False)
        figure.text(GAP / width, (top - 2 * GAP) / height, note, color=FAINT, va="top", parse_math=False)
        top -= 3 * GAP
        for row, row_height in zip(rows, heights, strict=True):
            for column, cell in enumerate(row):
                left, bottom = GAP + column * (WIDTH + GAP), top - PICTURE_HEIGHT
                for number in range(max(1, len(cell.pictures))):
                    each = WIDTH / max(1, len(cell.pictures))
                    box = ((left + number * each) / width, bottom / height, each / width, PICTURE_HEIGHT / height)
                    _draw(figure.add_axes(box, facecolor=cell.colour), cell, number)
                for number, (line, colour) in enumerate(cell.lines, 1):
                    figure.text(left / width, (bottom - LINE * number) / height, line, color=colour, parse_math=False)
            top -= row_height
        figure.savefig(path, format="png", dpi=100)


def _draw(axes: Any, cell: _Cell, number: int) -> None:
    """The pictures or the bars of a cell."""
    if cell.bars:
        bars = axes.barh(range(len(cell.bars)), [bar.count for bar in cell.bars], color=BAR)
        axes.bar_label(bars, [f"{bar.label}: {bar.count:,}" for bar in cell.bars], padding=3, size=7)
        axes.margins(x=0.4)
        axes.invert_yaxis()
    axes.set_yticks([])
    axes.set_xticks([])
    axes.spines[:].set_visible(False)
    if cell.pictures:
        axes.imshow(cell.pictures[number])


def _sample(dataset: ShardDataset, i: int) -> _Cell:
    """One sample: its pictures side by side, its key and sizes, the questions and answers."""
    sizes = ", ".join("×".join(map(str, dataset.image_size(i, k))) for k in range(dataset.num_images(i)))
    lines = [(f"{dataset.key(i)}  {sizes or 'no picture'}", FAINT)]
    try:
        pictures = [image_file.to_rgb(image_file.open_image(dataset.image_bytes(i, k))) for k in range(dataset.num_images(i))]
        for picture in pictures:
            picture.thumbnail((400, 400))
        for turn in dataset.text(i)["conversations"]:
            colour = HUMAN if turn["from"] == "human" else ANSWER
            lines += [(line, colour) for line in wrapped(" ".join(str(turn["value"]).split()))]
    except BadSampleError as error:
        return _Cell([*lines, *((line, DAMAGE) for line in wrapped(str(error)))], colour=DAMAGE)
    return _Cell(lines if len(lines) <= MOST_LINES else [*lines[: MOST_LINES - 1], ("…", FAINT)], pictures)


def width_of(text: str) -> int:
    """Columns of a text; combining characters take none."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def wrapped(text: str, width: int = LINE_WIDTH) -> list[str]:
    """Lines of at most this width, broken at spaces, and inside longer words; as many as a cell may show, and one more."""
    lines = [""]
    for word in "".join(c if c.isprintable() else "�" for c in text[: 2 * MOST_LINES * width]).split(" "):
        if lines[-1] and width_of(f"{lines[-1]} {word}") > width:
            lines.append("")
        line = f"{lines[-1]} {word}" if lines[-1] else word
        while width_of(line) > width:
            fits = next(n for n in range(len(line), 0, -1) if width_of(line[:n]) <= width)
            lines[-1], line = line[:fits], line[fits:]
            lines.append("")
        lines[-1] = line
    return lines[: MOST_LINES + 1]
