"""Numbers about a dataset are true, bars count everything once, and the sheet can be drawn whatever the texts are."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from himix_megatron.data.loading.token_counts import make_column
from himix_megatron.data.shards.reader import ShardDataset
from tests.support.data_fixtures import encoded, make, picture, row
from tools.inspect_shards.contact_sheet import COLUMNS, GAP, LINE_WIDTH, WIDTH, Chart, sheet, width_of, wrapped
from tools.inspect_shards.histogram import MOST_BARS, drawn, histogram, summary
from tools.inspect_shards.statistics import draw, statistics

UNICODE = ["你好，一只猫。", "مرحبا", "Привет ☃ 😀", "a" * 500, "tab\tnul\x00 rtl\u202e", "", "<img>" * 9, "e\u0301\u200d"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """12 rows: 2 pictures for every third, none for the last, one row left out."""
    folder = tmp_path_factory.mktemp("inspect")
    rows = []
    for i in range(12):
        size, form = ((40, 30), "JPEG") if i % 2 else ((20, 50), "PNG")
        (folder / f"{i}").write_bytes(encoded(picture(i, size), form))
        names = None if i == 11 else [f"{i}", "0"] if i % 3 == 0 else f"{i}"
        rows.append(row(i, names, UNICODE[i % len(UNICODE)], "a" * i))
    rows[4]["image"] = "nowhere"
    (folder / "rows.json").write_text(json.dumps(rows))
    made = make(folder / "out", folder / "rows.json", folder, samples_per_shard=5)
    for shard in made.manifest.shards:
        make_column(made.path, shard, "bytes", "tiny")
    return made


def test_statistics_are_those_of_the_source(dataset):
    found = statistics(dataset, num_texts=100)
    assert found.images_per_sample.tolist() == [2, 1, 1, 2, 1, 2, 1, 1, 2, 1, 0]
    assert sorted(set(zip(found.image_widths.tolist(), found.image_heights.tolist(), strict=True))) == [(20, 50), (40, 30)]
    assert found.formats == {"png": 9, "jpg": 5}
    assert found.num_looked_at == 11
    assert found.num_unreadable == 0
    said = [sum(len(turn["value"]) for turn in dataset.text(i)["conversations"]) for i in range(11)]
    assert found.characters.tolist() == said
    assert set(found.turns.tolist()) == {2}
    (tokens,) = found.text_tokens.values()
    assert len(tokens) == 11
    assert (found.image_bytes > 0).all()


def test_some_texts_are_drawn_at_random_and_the_same_again(dataset):
    found = statistics(dataset, num_texts=4)
    assert found.num_looked_at == len(found.characters) == 4
    assert len(found.images_per_sample) == 11
    assert draw(dataset, 4, seed=0) == draw(dataset, 4, seed=0) == sorted(set(draw(dataset, 4, seed=0)))
    assert draw(dataset, 4, seed=0) != draw(dataset, 4, seed=1)


def test_every_number_is_in_one_bar():
    random = np.random.default_rng(0)
    for n in range(200):
        values = np.round(random.lognormal(n % 9, 0.2 + n % 5 / 2, 1 + n * 3)).astype(np.int64)
        bars = histogram(values)
        assert sum(bar.count for bar in bars) == len(values)
        assert 1 <= len(bars) <= MOST_BARS + 1
        if "-" in bars[0].label:
            low, high = map(int, bars[0].label.split("-"))
            assert low <= values.min() <= high
            assert bars[0].count == ((values >= low) & (values <= high)).sum()
        lines = drawn(bars, width=30)
        assert len(lines) == len(bars)
        assert max(line.count("█") for line in lines) == 30
    assert histogram(np.zeros(0, np.int64)) == []
    assert summary(np.zeros(0, np.int64)) == "none"
    assert [(bar.label, bar.count) for bar in histogram(np.array([3, 3, 5]))] == [("3", 2), ("4", 0), ("5", 1)]


def test_bars_have_round_bounds_and_the_tail_shares_one():
    labels = [bar.label for bar in histogram(np.array([*range(1000), 90_000]))]
    assert labels[:2] == ["0-99", "100-199"]
    assert labels[-1] == "1000+"


@pytest.mark.parametrize("text", [*UNICODE, "many words " * 200, "w" * 2000])
def test_wrapped_text_stays_on_the_card_and_loses_nothing(text):
    lines = wrapped(text)
    assert all(width_of(line) <= LINE_WIDTH for line in lines)
    joined = "".join(lines).replace(" ", "")
    printable = "".join(c if c.isprintable() else "�" for c in text).replace(" ", "")
    assert printable.startswith(joined)
    assert joined == printable or len(lines) > 14


def colours_of(path, dataset, samples, charts):
    """Width and height of a sheet, and the colours on it."""
    sheet(path, dataset, samples, "set", "note", charts)
    with Image.open(path) as whole:
        return whole.size, {colour for _, colour in whole.convert("RGB").getcolors(1 << 24)}


def test_the_sheet_shows_every_kind_of_sample(dataset, tmp_path):
    charts = [Chart("lengths", "note", histogram(np.arange(30))), Chart("none", "note", [])]
    whole, colours = colours_of(tmp_path / "sheet.png", dataset, list(range(11)), charts)
    assert whole[0] == round(100 * (GAP + COLUMNS * (WIDTH + GAP)))
    assert whole[1] > 3 * 220
    assert len(colours) > 1000  # pictures are on it


def test_a_damaged_sample_is_told_on_the_sheet(dataset, tmp_path):
    shutil.copytree(dataset.path, tmp_path / "copy")
    tar = tmp_path / "copy" / "shards" / "rows-000000.tar"
    data = bytearray(tar.read_bytes())
    data[515] ^= 1
    tar.write_bytes(data)
    damaged = ShardDataset(tmp_path / "copy")
    assert statistics(damaged, 100).num_unreadable == 1
    red = (0xB9, 0x1C, 0x1C)
    assert red in colours_of(tmp_path / "sheet.png", damaged, [0], [])[1]
    assert red not in colours_of(tmp_path / "sheet.png", dataset, [0], [])[1]


def inspect(*words, encoding="utf-8"):
    command = [sys.executable, "-m", "tools.inspect_shards", *map(str, words)]
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    return subprocess.run(command, capture_output=True, check=False, env=environment)


def test_the_command_prints_numbers_and_draws_the_sheet(dataset, tmp_path):
    done = inspect(dataset.path, "--sheet", tmp_path / "sheet.png", "--sheet-samples", 5)
    assert (done.returncode, done.stderr) == (0, b"")
    printed = done.stdout.decode()
    assert "11 samples, 14 images, 3 shards" in printed.splitlines()[0]
    assert "left out: 1 rows (missing_image 1)" in printed
    assert "images per sample: min 0  median 1" in printed
    assert "text tokens, column" in printed
    with Image.open(tmp_path / "sheet.png") as drawn_sheet:
        assert drawn_sheet.format == "PNG"


def test_a_terminal_without_blocks_gets_other_bars(dataset):
    done = inspect(dataset.path, encoding="ascii")
    assert done.returncode == 0
    assert b"####" in done.stdout


def test_mistakes_are_one_line_and_exit_code_2(dataset, tmp_path):
    for words in ((tmp_path,), (tmp_path / "none",), (dataset.path, "--texts", "0"), (dataset.path, "--shet", "x"), ()):
        done = inspect(*words)
        assert done.returncode == 2, words
        assert done.stderr.startswith(b"error: ")
        assert done.stderr.count(b"\n") == 1
