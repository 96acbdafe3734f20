"""The benchmark's own parts: its pictures are photo-like and repeatable, its lines decide the exit code."""

from __future__ import annotations

import io
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from tests.support import ROOT
from tests.support.data_fixtures import make
from tools.bench.data import (
    BATCH,
    Arguments,
    bench_pack,
    normalised,
    our_pixels,
    rate_of,
    tars_of,
    their_pixels,
    times,
)
from tools.bench.measure import Line, take_turns
from tools.bench.photos import WANTED_BYTES, photo, write_source


def test_pictures_are_as_large_as_photographs_and_the_same_on_every_run():
    for number in range(4):
        data = photo(number)
        assert data == photo(number)
        assert 0.8 * WANTED_BYTES < len(data) <= WANTED_BYTES
        picture = Image.open(io.BytesIO(data))
        assert 375 <= min(picture.size) < max(picture.size) <= 640
        assert np.asarray(picture, np.float32).std() > 20


def test_a_line_is_held_from_its_number_on():
    assert Line("ratio", 3.0, 3).holds
    assert not Line("ratio", 2.99, 3).holds
    assert Line("levels", 2, 2, at_most=True).holds
    assert not Line("levels", 3, 2, at_most=True).holds


def test_candidates_take_turns_and_the_first_turn_is_not_counted():
    turns = []

    def candidate(name):
        def ready():
            turns.append(name)
            return iter([1, 2])

        return ready

    rates = take_turns({"a": candidate("a"), "b": candidate("b")}, 3, measure=rate_of)
    assert turns == ["a", "b"] * 4
    assert {name: len(values) for name, values in rates.items()} == {"a": 3, "b": 3}
    assert times({"a": [6.0, 1.0, 100.0], "b": [2.0, 2.0, 9.0]}, "a", "b", 3).value == 3


def test_packing_holds_its_lines():
    lines = bench_pack(Arguments(only=("pack",), scale=0.05))
    assert [line.holds for line in lines] == [True, True]


def test_both_sides_of_the_decoding_deliver_the_same_pictures(tmp_path):
    annotations, images = write_source(tmp_path / "source", BATCH)
    dataset = make(tmp_path / "out", annotations, images)
    (ours,) = our_pixels(dataset, BATCH)
    (theirs,) = their_pixels(tars_of(dataset), BATCH)
    assert (normalised(ours) - theirs).abs().max() <= 2.01 / 255 / 0.5


def run(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tools.bench.data", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_command_prints_ratios_and_help_teaches():
    done = run("--only", "pack", "--scale", "0.05")
    assert (done.returncode, done.stderr) == (0, "")
    assert "2 of 2 lines hold" in done.stdout
    assert "make bench-data" in run("--help").stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--only", "write"), "--only is 'write': wanted one of read"),
        (("--scale", "0"), "--scale is 0.0: wanted 0.005 to 10"),
        (("--repetitions", "0"), "--repetitions is 0: wanted 1 or more"),
    ],
)
def test_a_mistake_is_one_line(words, message):
    done = run(*words)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
