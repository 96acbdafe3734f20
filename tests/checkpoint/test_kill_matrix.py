"""Whoever is killed, and wherever in a save: a whole checkpoint is left, and at most the interval since it is lost."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.interrupted_saves import POINTS
from tests.support.kill_matrix import Kill, chain


@pytest.mark.parametrize(("layout", "shift"), [("tensor 2", 0), ("data 2 distributed", 1)], ids=["tensor 2", "data 2"])
def test_a_kill_in_a_save_costs_at_most_the_interval(mixed_dataset: Path, tmp_path: Path, layout: str, shift: int) -> None:
    """Each point once; who is killed and how it saves takes turns. All combinations: tests/campaigns/test_save_kills.py."""
    kills = [
        Kill(layout, mode=("async", "sync")[(i // 2 + shift) % 2], point=point, rank=(i + shift) % 2, save=1 + (i // 4) % 2)
        for i, point in enumerate(POINTS)
    ]
    lines = chain(mixed_dataset, tmp_path, kills)
    assert max(line["lost_steps"] for line in lines) <= 1
