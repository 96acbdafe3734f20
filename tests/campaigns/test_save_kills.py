"""Ranks killed with -9 at every point of a save: each rank, async and sync, the first save and the second, four layouts.

    make campaign-saves                    288 kills (20 minutes on 2 cores)
    make campaign-saves LAYOUTS="tensor 2" one layout of them

Each start continues what the kill before it left, so each kill is followed by a real restart. The lines are appended to
runs/campaigns/save-kills.jsonl.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from tests.support import ROOT
from tests.support.interrupted_saves import LAYOUTS, POINTS
from tests.support.kill_matrix import RANKS, Kill, chain

REPORT = ROOT / "runs" / "campaigns" / "save-kills.jsonl"
CHOSEN = [name for name in LAYOUTS if name in (os.environ.get("LAYOUTS") or ",".join(LAYOUTS)).split(",")]

pytestmark = pytest.mark.campaign


@pytest.mark.parametrize("mode", ["async", "sync"])
@pytest.mark.parametrize("layout", CHOSEN)
def test_every_point_on_every_rank(mixed_dataset: Path, tmp_path: Path, layout: str, mode: str) -> None:
    kills = [Kill(layout, mode, point, rank, save) for save in (1, 2) for point in POINTS for rank in range(RANKS)]
    begun = time.monotonic()
    lines = chain(mixed_dataset, tmp_path, kills)
    lost = [line["lost_steps"] for line in lines]
    assert max(lost) <= 1
    summary = {"layout": layout, "mode": mode, "kills": len(lines), "steps_lost": sum(lost)}
    print(json.dumps(summary | {"seconds": round(time.monotonic() - begun)}))
    REPORT.parent.mkdir(parents=True, exist_ok=True)
    with REPORT.open("a") as report:
        report.writelines(json.dumps({"layout": layout, "mode": mode} | line) + "\n" for line in lines)
