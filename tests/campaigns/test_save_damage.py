"""A thousand flipped bits and three hundred cuts over all files of a checkpoint, the frozen tower's too, each before a start.

    make campaign-saves FLIPS=1000 CUTS=300 SEED=1

Each is seen before anything of the checkpoint is read, its file is named, and the checkpoint before is taken.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support.corruptions import check, damages, starts
from tests.support.interrupted_saves import saving_config
from tests.support.ranks import run_ranks
from tests.support.small_runs import train

FLIPS, CUTS, SEED = (int(os.environ.get(name) or usual) for name, usual in (("FLIPS", 1000), ("CUTS", 300), ("SEED", 1)))

pytestmark = pytest.mark.campaign


def test_every_flipped_bit_and_every_cut_is_seen(mixed_dataset: Path, tmp_path: Path) -> None:
    run_ranks(train, 2, saving_config(mixed_dataset, tmp_path, steps=2, layout={"tensor": 2}), start_gloo=False)
    found = damages(tmp_path, FLIPS, CUTS, seed=SEED)
    config = saving_config(mixed_dataset, tmp_path, steps=3)
    check(found, run_ranks(starts, 1, config, found, start_gloo=False, timeout_seconds=900)[0])
    print(f"{FLIPS} flipped bits and {CUTS} cuts over {len({file for file, *_ in found})} files, seed {SEED}: all seen")
