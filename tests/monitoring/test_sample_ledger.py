"""The ledger is written into the run folder and nowhere else."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from himix_megatron.monitoring.sample_ledger import Ledger

ALONE: Any = SimpleNamespace(rank=0, replica_rank=0)


@pytest.mark.parametrize("name", ["ledger", "ledger/steps.jsonl", "ledger/rank-000.jsonl"])
def test_a_ledger_is_not_written_through_a_link(tmp_path: Path, name: str) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    (run / name).parent.mkdir(parents=True)
    if name == "ledger":
        other.mkdir()
    else:
        other.write_text("of somebody else, without a line break")
    (run / name).symlink_to(other)
    with pytest.raises(ValueError, match="is a symbolic link"):
        Ledger(run, ALONE, enabled=True, sources=())
    assert list(other.iterdir()) == [] if name == "ledger" else other.read_text() == "of somebody else, without a line break"
