"""The tower's check runs, and every way computes the same features."""

from __future__ import annotations

import math
import time
from pathlib import Path

from tools.gpu_check.runner import Context
from tools.gpu_check.tower import MOST_DIFFERENCE, tower


def test_every_way_to_run_the_tower_gives_the_same_features(tmp_path: Path) -> None:
    lines = {line.what: line for line in tower(Context(tmp_path, True, time.monotonic() + 60))}
    differences = {what: line.value for what, line in lines.items() if what.startswith("features")}
    assert len(differences) >= 9
    assert all(value <= MOST_DIFFERENCE for what, value in differences.items() if "FP8" not in what), differences
    assert all(value <= 0.1 for value in differences.values()), differences
    assert all(line.holds for line in lines.values())
    failed = [what for what in lines if "does not run" in what]
    # What a CPU cannot: cuDNN's attention, and in some versions of torch FP8 products with a scale for each row.
    assert all("cuDNN" in what or "FP8, a scale for each row" in what for what in failed), failed
    assert all(math.isnan(lines[what].value) for what in failed)
