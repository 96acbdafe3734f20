"""Kills inside saves, in a chain: each start of a run continues what the kill before it left, and is killed in its turn."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from himix_megatron.checkpoint.manifest import complete_checkpoints, step_of, verify_checkpoint

from .interrupted_saves import LAYOUTS, saving_config, train_killed
from .ranks import run_ranks

RANKS = 2


@dataclass(frozen=True, slots=True)
class Kill:
    """Where a start is killed."""

    layout: str
    mode: str
    point: str
    rank: int
    save: int
    """Of this start's saves, from 1."""


def whole_after(kill: Kill, saved: int) -> set[int]:
    """Steps that the newest whole checkpoint may be of, after a start that continued from `saved` saved that often more."""
    before, after = saved + kill.save - 1, saved + kill.save
    if kill.point in ("tracker", "prune"):
        return {after}
    if kill.point == "rename" and kill.rank != 0:
        return {before, after}  # rank 0 renames meanwhile
    if kill.point in ("begin", "snapshot") and kill.mode == "async" and kill.save > 1:
        return {before}  # the save before it has been waited for
    return {before}


def strike(data: Path, run: Path, kill: Kill, saved: int) -> int:
    """Start the run, and see it killed. Returns: the step of the newest checkpoint, which is whole."""
    config = saving_config(data, run, steps=10_000, layout=LAYOUTS[kill.layout], mode=kill.mode)
    with pytest.raises(RuntimeError, match=f"rank {kill.rank} died with exit code -9"):
        run_ranks(train_killed, RANKS, config, kill.point, kill.rank, kill.save, start_gloo=False)
    found = complete_checkpoints(run)
    newest = step_of(found[-1]) if found else 0
    assert newest in whole_after(kill, saved), (kill, saved, newest)
    for folder in found:
        assert verify_checkpoint(folder) == [], (kill, verify_checkpoint(folder))
    if saved:
        restored = re.findall(r"restored \S+step-(\d+)", (run / "log" / "rank-000.log").read_text())
        assert int(restored[-1]) == saved, (kill, restored)  # it began where the kill before it had left off
    return newest


def chain(data: Path, run: Path, kills: Iterable[Kill]) -> list[dict[str, Any]]:
    """Strike one run again and again, then look at what is left. Returns: a line on each kill."""
    saved, lines = 0, []
    for kill in kills:
        newest = strike(data, run, kill, saved)
        lines.append({"point": kill.point, "rank": kill.rank, "save": kill.save, "lost_steps": saved + kill.save - newest})
        saved = newest
    left = {path.name for path in (run / "checkpoints").iterdir()}
    assert sum(name.startswith("attempt-") for name in left) == 1, left
    assert all(name.startswith(("attempt-", "step-")) or name == "latest" for name in left), left
    return lines
