"""Killed at any moment, preprocessing ends byte-identical on the next run. `make campaign-data` does this many more times."""

import random

import pytest

from tests.support.data_fixtures import EMOJI
from tests.support.preprocess_kills import Source, trial, undisturbed


@pytest.fixture(scope="module")
def emoji(tmp_path_factory):
    source = Source("emoji", EMOJI / "instruct.json", EMOJI / "images", samples_per_shard=2)
    return source, undisturbed(source, tmp_path_factory.mktemp("wanted"))


@pytest.mark.parametrize(("number", "engine"), [(0, "local"), (1, "local"), (2, "local"), (3, "ray")])
def test_a_killed_run_is_finished_byte_for_byte_by_the_next(emoji, tmp_path, number, engine):
    source, wanted = emoji
    outcome = trial(source, wanted, tmp_path, random.Random(f"kill {number}"), engine)
    assert not outcome.error, outcome
